"""FSDP2: every unit's aggregate in every mode of FSDP, and errors where there cannot be one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from oracle import min_norm_point
from ranks import batch, flat, gather, loss, network, relative_error, same_everywhere
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import grain_ddp._core.sharded as sharded_module
import grain_ddp.fsdp
from grain_ddp import GrainState
from grain_ddp._core.agreement import MARKS
from grain_ddp._wire.torch_wire import TorchWire

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_reduce_scatter"), reason="FSDP2 needs PyTorch 2.9"
)
RATE, MOMENTUM = 0.5, 0.9
UNITS = (slice(0, 2), slice(2, 4), slice(4, 6))  # of the parameters: two layers, and the root
Rule = Callable[[Tensor], Tensor]


def min_norm(rows: Tensor) -> Tensor:
    return torch.from_numpy(min_norm_point(rows))


def mean(rows: Tensor) -> Tensor:
    return rows.mean(0)


def sharded(net: nn.Sequential | None = None, **options: Any) -> Any:
    """The test network in three FSDP units."""
    net = network() if net is None else net
    for part in (net[0], net[2], net):
        fully_shard(part, **options)
    return net


def wrap(options: dict[str, Any], **fsdp: Any) -> tuple[Any, GrainState]:
    model, state = sharded(**fsdp), GrainState(**options)
    grain_ddp.fsdp.apply(model, state)
    return model, state


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def whole(parameters: Any) -> Tensor:
    return flat(p.full_tensor() for p in parameters)


def gradient(model: nn.Module) -> Tensor:
    return whole(p.grad for p in model.parameters())


def twin_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy without FSDP, at the same parameters."""
    twin = network(dtype)
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.copy_(getattr(theirs, "full_tensor", lambda p=theirs: p)())
    return twin


def exact(
    net: nn.Module, steps: list[int], rule: Rule = min_norm, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Unit by unit the aggregate of the gradients that `steps` add up to, in float64."""
    net.zero_grad()
    for step in steps:
        (loss(net, step, dtype) / len(steps)).backward()
    parameters = list(net.parameters())
    parts = []
    for unit in UNITS:
        own = flat(p.grad for p in parameters[unit]).double()
        parts.append(rule(torch.stack(gather(own))))
    return torch.cat(parts)


def step_with(net: nn.Module, optimizer: torch.optim.Optimizer, total: Tensor) -> None:
    parameters = list(net.parameters())
    for p, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).float()
    optimizer.step()


def reference(
    steps: int, rule: Rule = min_norm, *, passes: int = 1, each: bool = True, clip: float = 0
) -> Tensor:
    """What the parameters should be, from gathered gradients, with none of the package."""
    net = network()
    optimizer = optimizer_of(net)
    for step in range(steps):
        every = [step * passes + k for k in range(passes)]
        if each:
            total = sum((exact(net, [k], rule) / passes for k in every), torch.zeros(()))
        else:
            total = exact(net, every, rule)
        if clip:
            total = total * min(1.0, clip / (float(total.norm()) + 1e-6))
        step_with(net, optimizer, total)
    return flat(net.parameters())


def train(model: Any, optimizer: Any, steps: range, clip: float = 0) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def alike(state: GrainState, n: int) -> None:
    """The record is complete, and the same on every rank."""
    assert state.last is not None
    assert state.last.weights.shape == (len(UNITS), n)
    np.testing.assert_allclose(state.last.weights.sum(1), 1)
    assert same_everywhere(torch.from_numpy(state.last.weights))
    assert same_everywhere(torch.from_numpy(state.last.gramian))


def parity(every: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    expected, worst = reference(4), 0.0
    for options, fsdp in every:
        model, state = wrap(options, **fsdp)
        train(model, optimizer_of(model), range(4))
        found = whole(model.parameters())
        assert same_everywhere(found)
        assert state.step == 4
        alike(state, dist.get_world_size())
        worst = max(worst, relative_error(found, expected))
    return worst


@pytest.mark.parametrize("n", [2, 3, 4])
def test_parameters_and_weights_are_the_same_everywhere_and_right(n: int) -> None:
    modes = [{"reshard_after_forward": True}, {"reshard_after_forward": False}] if n < 4 else [{}]
    assert max(run(n, parity, [({}, mode) for mode in modes])) < 1e-5


def first(gramian: Tensor) -> Tensor:
    """A weighting of the user's own."""
    return torch.eye(len(gramian))[0]


def inverse_norm(rows: Tensor) -> Tensor:
    weights = 1 / rows.square().sum(1)
    return (weights / weights.sum()) @ rows


def grouped(groups: list[list[int]], rows: Tensor) -> Tensor:
    return min_norm(torch.stack([rows[group].mean(0) for group in groups]))


def single_gradients(cases: list[tuple[dict[str, Any], str, float]]) -> None:
    """One backward pass each: with options, under a policy of mixed precision."""
    half, wide = torch.bfloat16, torch.float32
    policies = {
        "fp32": (wide, MixedPrecisionPolicy()),
        "bf16": (half, MixedPrecisionPolicy(half)),
        "bf16, reduced in fp32": (half, MixedPrecisionPolicy(half, wide)),
        "fp16": (torch.float16, MixedPrecisionPolicy(torch.float16)),
    }
    for options, policy, bound in cases:
        dtype, fsdp = policies[policy]
        model, state = wrap(options, mp_policy=fsdp)
        rule: Rule = {first: lambda rows: rows[0], "inverse_norm": inverse_norm, "mean": mean}.get(
            state.weighting, min_norm
        )
        if state.options.kind(state.step).averages or state.cap == 1:
            rule = mean
        if state.groups != "rank":
            rule = functools.partial(grouped, [[0, 1], [2]] if state.groups == 2 else state.groups)
        expected = exact(twin_of(model, dtype), [3], rule, dtype)
        loss(model, 3).backward()
        assert relative_error(gradient(model), expected) < bound, (options, policy)
        assert (state.last is None) == (state.warmup_steps == 1)


def test_precisions_and_options() -> None:
    cases = [
        ({}, "bf16", 2**-8),
        ({}, "bf16, reduced in fp32", 1e-5),
        ({}, "fp16", 2**-10),  # FSDP sums, and divides afterwards
        ({"weighting": "mean"}, "fp16", 2**-10),
        ({"warmup_steps": 1}, "fp32", 1e-6),
        ({"cap": 1}, "fp32", 1e-5),
        ({"wire_dtype": torch.bfloat16}, "fp32", 2e-2),
        ({"nonfinite": "drop"}, "fp32", 1e-5),
        ({"weighting": first}, "bf16", 2**-8),
        ({"weighting": "inverse_norm"}, "fp32", 1e-5),
        ({"sketch": 4000}, "fp32", 1e-5),
        ({"sketch": 4000}, "bf16", 2**-7),  # weighed before FSDP sums, in its dtype
        ({"weighting": "mean", "sketch": 50}, "fp32", 1e-6),
        ({"groups": 2}, "fp32", 1e-5),
        ({"groups": [[2, 0], [1]], "sketch": 4000}, "fp32", 1e-5),
    ]
    run(3, single_gradients, cases)


def against_plain() -> None:
    """The mean, recorded or not, is what FSDP makes without the package."""
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16)):
        plain = sharded(mp_policy=policy)
        model, state = wrap({"weighting": "mean", "record_every": 2}, mp_policy=policy)
        for step in range(3):
            for one in (plain, model):
                one.zero_grad()
                loss(one, step).backward()
            bound = 1e-6 if policy.param_dtype is None else 2**-7
            assert relative_error(gradient(model), gradient(plain)) < bound
        assert state.step == 3
        assert state.last is not None
        assert state.last.step == 2


@pytest.mark.parametrize("n", [2, 3])
def test_mean_is_plain_fsdp(n: int) -> None:
    run(n, against_plain)


def scaled() -> None:
    """Whatever FSDP divides by, and wherever, Σ w g takes the place of the mean."""
    model, _ = wrap({})
    expected = exact(twin_of(model), [0])
    divided = expected * dist.get_world_size() / 5
    for sums, factor in [(False, None), (True, None), (False, 5), (True, 5)]:
        model, _ = wrap({})
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_force_sum_reduction_for_comms(sums)
                if factor is not None:
                    unit.set_gradient_divide_factor(factor)
        loss(model, 0).backward()
        assert relative_error(gradient(model), divided if factor else expected) < 1e-5


def test_sums_and_divisors() -> None:
    run(3, scaled)


def accumulated() -> None:
    passes, size = 3, dist.get_world_size()
    # Without communication between: a group is a rank's accumulated gradient.
    model, state = wrap({})
    optimizer = optimizer_of(model)
    for step in range(3):
        optimizer.zero_grad()
        for k in range(passes):
            model.set_requires_gradient_sync(k == passes - 1)
            (loss(model, step * passes + k) / passes).backward()
            assert state.step == step + (k == passes - 1)
        optimizer.step()
    alike(state, size)
    found = whole(model.parameters())
    assert relative_error(found, reference(3, passes=passes, each=False)) < 1e-5
    # With it: each pass aggregates, and makes a record.
    model, state = wrap({})
    optimizer = optimizer_of(model)
    for step in range(3):
        optimizer.zero_grad()
        for k in range(passes):
            (loss(model, step * passes + k) / passes).backward()
        optimizer.step()
    assert state.step == 3 * passes
    alike(state, size)
    assert relative_error(whole(model.parameters()), reference(3, passes=passes)) < 1e-5


def clipped() -> None:
    model, _ = wrap({})
    train(model, optimizer_of(model), range(3), clip=0.05)
    assert relative_error(whole(model.parameters()), reference(3, clip=0.05)) < 1e-5


def accumulated_and_clipped() -> None:
    accumulated()
    clipped()


def test_accumulation_and_clipping() -> None:
    run(3, accumulated_and_clipped)


class Recomputed(nn.Module):
    """A layer whose activations are computed again in the backward pass."""

    def __init__(self, part: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


def recomputed() -> None:
    """One record per step, also where checkpoints run backward passes inside of it."""
    for reentrant in (False, True):
        for inside in (False, True):
            net = network()
            for k in (0, 2):
                block = Recomputed(net[k], reentrant)
                fully_shard(block if inside else block.part)
                net[k] = block
            fully_shard(net)
            steps: list[int] = []
            state = GrainState(scope="bucket", on_step=lambda r, s=steps: s.append(r.step))
            grain_ddp.fsdp.apply(net, state)
            for step in range(2):
                net.zero_grad()
                expected = exact(twin_of(net), [step])
                x, y = batch(step)
                nn.functional.cross_entropy(net(x.requires_grad_()), y).backward()
                assert relative_error(gradient(net), expected) < 1e-5
                alike(state, dist.get_world_size())
            assert steps == [0, 1]


def test_recomputed_activations() -> None:
    run(2, recomputed)


def compiled() -> float:
    model, state = wrap({})
    expected = exact(twin_of(model), [0])
    loss(torch.compile(model, backend="aot_eager"), 0).backward()
    alike(state, dist.get_world_size())
    return relative_error(gradient(model), expected)


def test_torch_compile() -> None:
    assert max(run(2, compiled, deadline=180, timeout=120)) < 1e-5


def hybrid() -> None:
    """Each replica aggregates for itself, and FSDP averages the replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def rule(rows: Tensor) -> Tensor:
        return (min_norm(rows[:2]) + min_norm(rows[2:])) / 2

    for policy, dtype, bound in [
        (MixedPrecisionPolicy(), torch.float32, 1e-5),
        (MixedPrecisionPolicy(torch.float16), torch.float16, 2**-9),
    ]:
        model, state = wrap({}, mesh=mesh, mp_policy=policy)
        expected = exact(twin_of(model, dtype), [0], rule, dtype)
        loss(model, 0).backward()
        assert relative_error(gradient(model), expected) < bound
        assert state.last is not None
        weights = gather(torch.from_numpy(state.last.weights))
        assert weights[0].shape == (len(UNITS), 2)
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[2], weights[3])
    model, state = wrap({}, mesh=mesh)
    train(model, optimizer_of(model), range(4))
    found = whole(model.parameters())
    assert same_everywhere(found)
    assert relative_error(found, reference(4, rule)) < 1e-5
    # Replicas may be averaged less often than shards are aggregated.
    model, state = wrap({}, mesh=mesh)
    for k in range(2):
        model.set_requires_all_reduce(k == 1)
        (loss(model, k) / 2).backward()
    twin = network()
    expected = (exact(twin, [0], rule) + exact(twin, [1], rule)) / 2
    assert relative_error(gradient(model), expected) < 1e-5
    assert state.step == 2


def test_replicas_of_shards() -> None:
    run(4, hybrid)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank hands to the wire, exchange by exchange."""
    sent: list[int] = []
    original = TorchWire.exchange

    def exchange(self: TorchWire, send: Any, receive: Any, *what: Any) -> Any:
        sent.append(sum(t.nbytes for j, t in enumerate(send) if j != self.rank))
        return original(self, send, receive, *what)

    TorchWire.exchange = exchange  # type: ignore[method-assign]
    yield sent
    TorchWire.exchange = original  # type: ignore[method-assign]


def wired() -> None:
    n, padded = dist.get_world_size(), 0
    for p in network().parameters():  # FSDP pads the first dimension
        padded += -(-p.shape[0] // n) * n * p[0].numel()
    gramians = len(UNITS) * (n - 1) * (n * (n + 1) // 2 + MARKS) * 8
    powers = len(UNITS) * (n - 1) * 2  # one with each message of a narrower dtype
    scatter = (n - 1) * padded // n
    for options, policy, expected in [
        ({}, MixedPrecisionPolicy(), 4 * scatter + gramians),
        ({}, MixedPrecisionPolicy(torch.bfloat16), 2 * scatter + gramians),
        ({"wire_dtype": torch.bfloat16}, MixedPrecisionPolicy(), 2 * scatter + gramians + powers),
        ({"warmup_steps": 1}, MixedPrecisionPolicy(), 4 * scatter),
    ]:
        model, _ = wrap(options, mp_policy=policy)
        with counted() as sent:
            loss(model, 0).backward()
        assert sum(sent) == expected


def test_bytes_are_those_of_a_reduce_scatter() -> None:
    run(3, wired)


def saved_and_resumed(folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    options: dict[str, Any] = {"cap": 2.5, "wire_dtype": torch.bfloat16, "record_every": 2}
    model, state = wrap(options)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    weights, moments = get_state_dict(model, optimizer)
    # A GrainState has what the checkpoint calls Stateful.
    dcp.save({"model": weights, "optimizer": moments, "grain": state}, checkpoint_id=folder)
    train(model, optimizer, range(3, 6))

    other, resumed = wrap({})
    torch.nn.init.zeros_(next(other.parameters()))
    again = optimizer_of(other)
    weights, moments = get_state_dict(other, again)
    dcp.load({"model": weights, "optimizer": moments, "grain": resumed}, checkpoint_id=folder)
    set_state_dict(other, again, model_state_dict=weights, optim_state_dict=moments)
    assert (resumed.step, resumed.cap, resumed.wire_dtype) == (3, 2.5, torch.bfloat16)
    train(other, again, range(3, 6))
    assert torch.equal(whole(other.parameters()), whole(model.parameters()))
    assert resumed.step == state.step == 6
    assert resumed.last is not None
    assert state.last is not None
    assert resumed.last.step == state.last.step == 4
    assert (resumed.last.weights == state.last.weights).all()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    run(2, saved_and_resumed, str(tmp_path))


def saved_by_some(folder: str, again: bool) -> Any:
    import torch.distributed.checkpoint as dcp

    model, state = wrap({})
    if not again:
        train(model, optimizer_of(model), range(2))
        dcp.save({"model": model.state_dict(), "grain": state}, checkpoint_id=folder)
        return whole(model.parameters())
    weights = model.state_dict()
    dcp.load({"model": weights, "grain": state}, checkpoint_id=folder)
    model.load_state_dict(weights)
    found = whole(model.parameters())
    train(model, optimizer_of(model), range(2, 3))
    alike(state, dist.get_world_size())
    return found, state.step


def test_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    saved = run(2, saved_by_some, str(tmp_path), False)[0]
    for found, steps in run(3, saved_by_some, str(tmp_path), True):
        assert torch.equal(found, saved)
        assert steps == 3


def complex_numbers() -> float:
    """What plain FSDP makes of a complex parameter, and the mean by GRAIN."""
    found = []
    for apply in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(7, 3, dtype=torch.complex64)
        fully_shard(model)
        if apply:
            grain_ddp.fsdp.apply(model, GrainState(scope="bucket", weighting="mean"))
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(5, 7, generator=generator, dtype=torch.complex64)
        model(x).abs().square().mean().backward()
        found.append(torch.view_as_real(model.weight.grad.full_tensor()))
    assert found[0][..., 1].abs().max() > 0.1
    return relative_error(*found)


def test_complex_parameters() -> None:
    assert max(run(2, complex_numbers)) < 1e-6


class Boom(Exception):
    pass


def broken() -> None:
    """An error at the last of the units: after a reset the next step is right and complete."""
    calls, shapes = 0, []

    def rule(gramian: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Boom
        return torch.full((len(gramian),), 1 / len(gramian))

    model, state = wrap({"weighting": rule, "on_step": lambda r: shapes.append(r.weights.shape)})
    loss(model, 0).backward()
    model.zero_grad()
    with pytest.raises(Boom):
        loss(model, 1).backward()
    model.reset_iter_state()
    model.zero_grad()
    expected = exact(twin_of(model), [2], mean)
    loss(model, 2).backward()
    assert relative_error(gradient(model), expected) < 1e-5
    assert shapes == [(3, 2), (3, 2)]
    assert state.step == 2
    # An error of somebody else, between the units: what was reduced does not count.
    handle = model[0].register_forward_hook(lambda m, x, out: out.register_hook(raising) and None)
    with pytest.raises(Boom):
        loss(model, 3).backward()
    handle.remove()
    model.reset_iter_state()
    loss(model, 4).backward()
    assert shapes == [(3, 2)] * 3
    assert state.step == 3


def raising(gradient: Tensor) -> None:
    raise Boom


def test_an_error_leaves_nothing_behind() -> None:
    run(2, broken)


def spoilt() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    for nonfinite in ("drop", "propagate"):
        model, state = wrap({"nonfinite": nonfinite})
        rows = []
        for unit in UNITS:
            own = twin_of(model)
            loss(own, 0).backward()
            rows.append(torch.stack(gather(flat(p.grad for p in list(own.parameters())[unit]))))
        expected = torch.cat([min_norm(one[:1]) if n == 2 else min_norm(one) for one in rows])
        ((loss(model, 0)) * (float("inf") if rank == 1 else 1.0)).backward()
        assert state.last is not None
        found = gradient(model)
        if nonfinite == "drop":
            assert state.last.dropped == ((1,),) * len(UNITS)
            assert relative_error(found, expected) < 1e-5
        else:
            assert not found.isfinite().all()
            assert same_everywhere(found)


def test_what_is_not_finite() -> None:
    run(2, spoilt)


class Forked(nn.Module):
    """The odd ranks and the even ones take different ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(11, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[dist.get_rank() % 2](self.trunk(x))


def partial() -> None:
    """Frozen units are left out; what has no gradient on some ranks is zero there, or absent."""
    n, rank = dist.get_world_size(), dist.get_rank()
    net = network()
    net[0].requires_grad_(False)
    model, state = sharded(net), GrainState(scope="bucket")
    grain_ddp.fsdp.apply(model, state)
    expected = exact(twin_of(model), [0])
    loss(model, 0).backward()
    assert state.last is not None
    assert state.last.weights.shape == (2, n)
    found = whole(p.grad for p in model.parameters() if p.grad is not None)
    assert relative_error(found, expected[-len(found) :]) < 1e-5

    model, state = wrap({})
    (loss(model, 0) * float(rank != 0)).backward()
    assert state.last is not None
    assert state.last.active == (tuple(range(1, n)),) * len(UNITS)

    forked, twin = Forked(), Forked()
    fully_shard(forked.trunk)
    fully_shard(forked)
    forked.set_reduce_scatter_unused_params(True)
    grain_ddp.fsdp.apply(forked, GrainState(scope="bucket"))
    for one in (forked, twin):
        loss(one, 0).backward()
    for p in twin.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    parameters = list(twin.parameters())
    units = (parameters[:2], parameters[2:])
    expected = torch.cat(
        [min_norm(torch.stack(gather(flat(p.grad for p in unit).double()))) for unit in units]
    )
    assert relative_error(gradient(forked), expected) < 1e-5


def test_what_has_no_gradient() -> None:
    run(3, partial)


def separate() -> None:
    """Another process group for the reduction, and a model that was used before."""
    model = sharded()
    with torch.no_grad():
        loss(model, 5)  # leaves the root unsharded
    state = GrainState(scope="bucket")
    grain_ddp.fsdp.apply(model, state)
    if hasattr(model, "set_separate_reduce_scatter_group"):
        model.set_separate_reduce_scatter_group()
        theirs = model._get_fsdp_state()._fsdp_param_groups[0]._reduce_scatter_process_group
    expected = exact(twin_of(model), [0])
    loss(model, 0).backward()
    assert relative_error(gradient(model), expected) < 1e-5
    if hasattr(model, "set_separate_reduce_scatter_group"):
        assert state.owner.aggregation.wire.group is theirs


def test_a_process_group_for_the_reduction() -> None:
    run(2, separate)


def alone() -> list[str]:
    """On one rank FSDP reduces nothing: training goes on, and a warning is logged."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grain_ddp").addHandler(handler)
    model, state = wrap({})
    train(model, optimizer_of(model), range(3))
    assert relative_error(whole(model.parameters()), reference(3, mean)) < 1e-6
    assert (state.step, state.last) == (0, None)
    return heard


def test_one_rank_is_the_identity() -> None:
    (heard,) = run(1, alone)
    assert len(heard) == 1
    assert "sharded over one rank" in heard[0]


def ways_to_shard() -> None:
    """Modules in one unit, other dimensions, two models in one pass; pieces stashed away."""
    for name, value in {"SLACK": 0, "MESSAGE_BYTES": 64, "SCRATCH_BYTES": 0}.items():
        setattr(sharded_module, name, value)

    def halves() -> tuple[nn.Sequential, nn.Sequential]:
        torch.manual_seed(0)
        front = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh())
        return front, nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3))

    front, back = halves()
    for part in (front, back):
        columns = {"shard_placement_fn": lambda p: Shard(p.ndim - 1) if p.shape[-1] == 8 else None}
        fully_shard([part[0], part[-1 if part is back else 2]], **columns)
        fully_shard(part)
    states = [GrainState(scope="bucket") for _ in range(2)]
    for part, state in zip((front, back), states, strict=True):
        grain_ddp.fsdp.apply(part, state)
    twins = halves()
    for f, b in ((front, back), twins):
        loss(nn.Sequential(f, b), 0).backward()
    for part, twin, state in zip((front, back), twins, states, strict=True):
        rows = torch.stack(gather(flat(p.grad for p in twin.parameters()).double()))
        assert relative_error(gradient(part), min_norm(rows)) < 1e-5
        assert state.last is not None
        assert state.last.weights.shape == (1, dist.get_world_size())
        assert state.step == 1


def test_ways_to_shard() -> None:
    run(2, ways_to_shard)


def refused() -> None:
    """What cannot be honoured is an error that says why."""
    size, rank = dist.get_world_size(), dist.get_rank()

    def error(model: nn.Module, match: str, kind: type = ValueError, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            grain_ddp.fsdp.apply(model, GrainState(**options))

    error(sharded(), "microbatches must be 1", microbatches=2)
    error(network(), "Call fully_shard.* first", TypeError)
    with pytest.raises(TypeError, match="expected a GrainState, but found dict"):
        grain_ddp.fsdp.apply(sharded(), {})  # type: ignore[arg-type]
    lone = [dist.new_group([k]) for k in range(size)][rank]
    error(sharded(), rf"has ranks \[{rank}\], but the model", process_group=lone)

    model, state = wrap({})
    error(model, "was called for this model, or a part of it, before")
    with pytest.raises(ValueError, match="serves the FSDP2 model"):
        grain_ddp.fsdp.apply(sharded(), state)
    state.load_state_dict({**state.state_dict(), "cap": 2})  # other options: to be agreed anew
    grain_ddp.fsdp.apply(other := sharded(), state)
    assert other is not model
    with pytest.raises(ValueError, match="was given to the FSDP2 model"):
        loss(model, 0).backward()
    model, state = wrap({})
    state.load_state_dict({"scope": "global"})
    loss(model, 0).backward()
    assert state.scope == "bucket"  # the only one

    model = network()
    fully_shard(model, ignored_params={model[2].weight})
    error(model, "parameter 2.weight is not sharded")
    model[2].weight.requires_grad_(False)
    grain_ddp.fsdp.apply(model, GrainState(scope="bucket"))
    error(sharded(network().requires_grad_(False)), "no parameter of the model requires")

    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("all", "one"))
    error(sharded(mesh=mesh), "2 replicas and shards over 1 rank")
    model = network()
    fully_shard(model[0], mesh=mesh["one"])
    fully_shard(model, mesh=mesh["all"])
    error(model, "Give every fully_shard the same mesh")
    model = network()
    parallelize_module(model, mesh["one"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["all"])
    error(model, "Tensor parallelism is not supported")

    model = sharded()
    grain_ddp.fsdp.apply(model[2], GrainState(scope="bucket"))
    with pytest.raises(ValueError, match="with a part of an FSDP model"):
        loss(model, 0).backward()
    model, _ = wrap({})
    model.append(fully_shard(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="fully_shard was called for 1 more modules"):
        loss(model, 0).backward()


def test_what_is_refused() -> None:
    run(2, refused)


def test_an_older_pytorch_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "set_custom_reduce_scatter")
    with pytest.raises(RuntimeError, match=rf"needs PyTorch 2.9 .*{torch.__version__[:4]}"):
        grain_ddp.fsdp.apply(network(), GrainState(scope="bucket"))


def disagree(caps: list[float], shape: tuple[int, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    wrap({"cap": caps[dist.get_rank()]}, mesh=mesh)


@pytest.mark.parametrize(
    ("caps", "shape"), [([1, 2], (2,)), ([1, 1, 2, 2], (2, 2)), ([1, 2, 1, 1], (2, 2))], ids=str
)
def test_different_options_are_an_error_everywhere(
    caps: list[float], shape: tuple[int, ...]
) -> None:
    for outcome in launch(len(caps), disagree, caps, shape):
        assert outcome.error is not None
        assert "grain_ddp: cap " in outcome.error
        assert "must be the same on every rank" in outcome.error
