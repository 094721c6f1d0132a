"""The DDP hook: the aggregate in every mode of DDP, and errors where there cannot be one."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from oracle import min_norm_point
from ranks import (
    SIZES,
    batch,
    flat,
    gather,
    local_gradients,
    loss,
    network,
    relative_error,
    same_everywhere,
)
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook, noop_hook
from grain_ddp._wire.neighbours import SWITCH

SMALL = 0.001  # MB: several buckets for the test network


def wrap(state: GrainState | None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = DistributedDataParallel(network(dtype), bucket_cap_mb=SMALL, **options)
    if state is not None:
        model.register_comm_hook(state, grain_hook)
    return model


def exact(model: Any, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(min_norm_point(local_gradients(model.module, step, dtype)))


def train(ddp: dict[str, Any], options: dict[str, Any], steps: int = 4, eager: bool = True) -> Any:
    """Largest error of the gradients against the independent solver; parameters bit-equal."""
    state = GrainState(**options)
    model = wrap(state, **ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    worst, counts = 0.0, []
    for step in range(steps):
        expected = exact(model, step)
        if step == 2 and eager:
            optimizer.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad()
        loss(model, step).backward()
        found = flat(p.grad for p in model.parameters())
        if state.scope == "global":
            worst = max(worst, relative_error(found, expected))
        optimizer.step()
        assert state.last is not None
        counts.append(1 if state.scope == "global" else len(state.last.weights))
        assert same_everywhere(flat(model.parameters()))
        assert same_everywhere(torch.from_numpy(np.atleast_2d(state.last.weights)))
    assert state.step == steps
    return worst, counts


@pytest.mark.parametrize("n", SIZES)
def test_parameters_and_weights_are_the_same_everywhere_and_right(n: int) -> None:
    for worst, _ in run(n, train, {}, {}):
        assert worst < 1e-5
    for _, counts in run(n, train, {}, {"scope": "bucket"}):
        assert counts[0] == 1  # DDP's first step has one bucket, later ones have more
        assert counts[-1] > 1


@pytest.mark.parametrize(
    "ddp",
    [
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ],
    ids=str,
)
def test_modes_of_ddp(ddp: dict[str, Any]) -> None:
    for worst, _ in run(3, train, ddp, {}):
        assert worst < 1e-5
    run(3, train, ddp, {"scope": "bucket"})


def mean_against_plain(scope: str, dtype: torch.dtype, record_every: int) -> float:
    state = GrainState(scope=scope, weighting="mean", record_every=record_every)
    ours, plain = wrap(state, dtype), wrap(None, dtype)
    worst = 0.0
    for step in range(4):
        for model in (ours, plain):
            model.zero_grad()
            loss(model, step, dtype).backward()
        found, expected = (flat(p.grad for p in model.parameters()) for model in (ours, plain))
        worst = max(worst, relative_error(found, expected))
    return worst


@pytest.mark.parametrize("n", SIZES)
def test_mean_is_plain_ddp(n: int) -> None:
    for scope, every in [("global", 1), ("bucket", 1), ("global", 3)]:
        assert max(run(n, mean_against_plain, scope, torch.float32, every)) < 1e-6
    assert max(run(n, mean_against_plain, "global", torch.bfloat16, 1)) < 1e-2


def half_precision(dtype: torch.dtype) -> tuple[float, float]:
    state = GrainState()
    model = wrap(state, dtype)
    expected = exact(model, 0, dtype)
    loss(model, 0, dtype).backward()
    found = flat(p.grad for p in model.parameters())
    assert same_everywhere(found)
    return relative_error(found, expected), float(state.last.weights.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [2, 3])
def test_half_precision_to_its_rounding(n: int, dtype: torch.dtype) -> None:
    for error, total in run(n, half_precision, dtype):
        assert error < torch.finfo(dtype).eps
        assert total == pytest.approx(1)


class Mixed(nn.Module):
    """fp32, fp64 and bf16 parameters in one model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(11, 47)
        self.second = nn.Linear(47, 29, dtype=torch.float64)
        self.third = nn.Linear(29, 3, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x).double()).bfloat16()).float()


def mixed_model() -> float:
    model = DistributedDataParallel(Mixed())
    model.register_comm_hook(GrainState(), grain_hook)
    twin = Mixed()
    loss(twin, 0).backward()
    rows = torch.stack(gather(flat(p.grad.double() for p in twin.parameters())))
    loss(model, 0).backward()
    found = flat(p.grad.double() for p in model.parameters())
    return relative_error(found, torch.from_numpy(min_norm_point(rows)))


def test_mixed_dtypes_in_one_model() -> None:
    assert max(run(3, mixed_model)) < 4e-3


def accumulate() -> float:
    """Under no_sync a group's gradient is its sum over the passes, as DDP's would be."""
    model = wrap(GrainState())
    rows = sum(local_gradients(model.module, step) for step in range(3))
    for step in range(3):
        if step < 2:
            with model.no_sync():
                loss(model, step).backward()
        else:
            loss(model, step).backward()
    found = flat(p.grad for p in model.parameters())
    return relative_error(found, torch.from_numpy(min_norm_point(rows)))


def test_no_sync() -> None:
    assert max(run(3, accumulate)) < 1e-5


class Branches(nn.Module):
    """Some ranks, or some steps, use only one branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(11, 40)
        self.left = nn.Linear(40, 3)
        self.right = nn.Linear(40, 3)

    def forward(self, x: torch.Tensor, branches: str) -> torch.Tensor:
        hidden = torch.tanh(self.stem(x))
        return sum(getattr(self, branch)(hidden) for branch in branches.split())


def unused(branches: list[list[str]], ddp: dict[str, Any], options: dict[str, Any]) -> Any:
    """``branches[step][rank]`` are the branches used."""
    state = GrainState(**options)
    model = DistributedDataParallel(
        Branches(), bucket_cap_mb=SMALL / 10, find_unused_parameters=True, **ddp
    )
    model.register_comm_hook(state, grain_hook)
    worst = 0.0
    for step, ranks in enumerate(branches):
        x, y = batch(step)
        mine = ranks[dist.get_rank()]
        twin = copy.deepcopy(model.module)
        twin.zero_grad()
        nn.functional.cross_entropy(twin(x, mine), y).backward()
        row = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters())
        model.zero_grad()
        nn.functional.cross_entropy(model(x, mine), y).backward()
        found = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
        expected = torch.from_numpy(min_norm_point(torch.stack(gather(row.double()))))
        if state.scope == "global":
            worst = max(worst, relative_error(found, expected))
        assert same_everywhere(found)
        assert state.step == step + 1
    return worst


@pytest.mark.parametrize("ddp", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_unused_parameters(ddp: dict[str, Any]) -> None:
    branches = [["left right"] * 2, ["left", "right"], ["left", "left"], ["right", "left right"]]
    assert max(run(2, unused, branches, ddp, {})) < 1e-5
    run(2, unused, branches, ddp, {"scope": "bucket"})


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="option of torch 2.9"
)
@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_buckets_that_ddp_skips(scope: str) -> None:
    """The last bucket need not reach the hook."""
    ddp = {"skip_all_reduce_unused_params": True}
    branches = [["right", "right"]] * 4  # the same throughout, as this option wants it
    assert max(run(2, unused, branches, ddp, {"scope": scope})) < 1e-5


def uneven(scope: str) -> Any:
    """Rank 0 has 2 batches, rank 1 has 3, rank 2 has 5."""
    state = GrainState(scope=scope)
    model = wrap(state)
    active = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join([model]):
        for step in range([2, 3, 5][dist.get_rank()]):
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()
            active.append(np.atleast_2d(np.array(state.last.weights)).max(0).nonzero()[0].tolist())
            found = flat(p.grad for p in model.parameters())
            assert found.norm() > 0
    assert same_everywhere(flat(model.parameters()))
    return active


@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_join_with_uneven_inputs(scope: str) -> None:
    active = run(3, uneven, scope)[2]
    assert active == [[0, 1, 2], [0, 1, 2], [1, 2], [2], [2]]


def scaled() -> Any:
    """An overflow on one rank skips the step on all; the scaler's scale stays the same."""
    state = GrainState()
    model = wrap(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    history = []
    for step in range(3):
        before = flat(model.parameters()).clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            value = loss(model, step)
        if step == 1 and dist.get_rank() == 1:
            value = value * float("inf")
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        history.append((torch.equal(before, flat(model.parameters())), scaler.get_scale()))
        assert same_everywhere(flat(model.parameters()))
    return history


def test_grad_scaler_skips_on_every_rank() -> None:
    for history in run(2, scaled):
        assert history == [(False, 1024.0), (True, 512.0), (False, 512.0)]


def other_group() -> Any:
    """Two models side by side on ranks {0, 1} and {2, 3, 4}; nobody names a group."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3, 4])]
    mine = groups[dist.get_rank() > 1]
    state = GrainState()
    model = wrap(state, process_group=mine)
    twin = network()
    loss(twin, 0).backward()
    rows = torch.stack(gather(flat(p.grad for p in twin.parameters()).double(), mine))
    loss(model, 0).backward()
    found = flat(p.grad for p in model.parameters())
    explicit = wrap(GrainState(mine), process_group=mine)
    loss(explicit, 0).backward()
    assert torch.equal(found, flat(p.grad for p in explicit.parameters()))
    expected = torch.from_numpy(min_norm_point(rows))
    return relative_error(found, expected), len(state.last.weights)


def test_a_group_that_is_not_the_default_one() -> None:
    found = run(5, other_group)
    assert [n for _, n in found] == [2, 2, 3, 3, 3]
    assert max(error for error, _ in found) < 1e-5


def wrong_group() -> None:
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        model = wrap(GrainState(dist.group.WORLD), process_group=pair)
        loss(model, 0).backward()


def test_a_group_that_is_not_the_models_is_an_error() -> None:
    outcomes = launch(3, wrong_group, timeout=5)
    for outcome in outcomes[:2]:
        assert outcome.error is not None
        assert (
            "process_group has ranks [0, 1, 2], but the model's has ranks [0, 1]" in outcome.error
        )


def compiled(optimize: Any) -> float:
    torch._dynamo.config.optimize_ddp = optimize
    model = DistributedDataParallel(network())
    model.register_comm_hook(GrainState(), grain_hook)
    expected = exact(model, 0)
    step = torch.compile(model, backend="aot_eager")
    loss(step, 0).backward()
    return relative_error(flat(p.grad for p in model.parameters()), expected)


@pytest.mark.parametrize("optimize", ["ddp_optimizer", "no_optimization"])
def test_torch_compile(optimize: str) -> None:
    assert max(run(2, compiled, optimize, deadline=180, timeout=120)) < 1e-5


def python_reducer() -> None:
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = wrap(GrainState())
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss(torch.compile(model, backend="aot_eager"), 0).backward()


def test_the_compile_mode_that_cannot_work_is_refused() -> None:
    for outcome in launch(2, python_reducer, deadline=180, timeout=60):
        assert outcome.error is not None
        assert "python_reducer calls hooks once per " in outcome.error


def planted_exception() -> Any:
    """An on_step that raises, everywhere, at step 1: the state is clean and training goes on."""

    def fail(record: Any) -> None:
        if record.step == 1:
            raise KeyError("planted")

    state = GrainState(on_step=fail)
    model = wrap(state)
    raised = []
    for step in range(4):
        expected = exact(model, step)
        model.zero_grad()
        try:
            loss(model, step).backward()
        except KeyError:
            raised.append(step)
            model.reducer._reset_state()  # DDP's own, after an exception in backward
            continue
        found = flat(p.grad for p in model.parameters())
        assert relative_error(found, expected) < 1e-5
    return raised, state.step


def test_an_exception_in_the_loop() -> None:
    assert run(3, planted_exception) == [([1], 4)] * 3


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("planted")


def broken_backward(scope: str) -> Any:
    """The model's own backward raises when some buckets are already under way."""
    state = GrainState(scope=scope)
    model = wrap(state)
    for step in range(5):
        expected = exact(model, step)
        model.zero_grad()
        if step == 3:
            handle = model.module[1].register_forward_hook(lambda _m, _i, out: Fails.apply(out))
            with pytest.raises(ArithmeticError):
                loss(model, step).backward()
            handle.remove()
            assert state.owner.aggregation.pending
            model.reducer._reset_state()
            continue
        loss(model, step).backward()
        if scope == "global":
            found = flat(p.grad for p in model.parameters())
            assert relative_error(found, expected) < 1e-5
    return state.step


@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_a_backward_pass_that_breaks_off(scope: str) -> None:
    assert run(3, broken_backward, scope) == [4] * 3


def weigh_first(gramian: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(gramian), dtype=gramian.dtype)[0]


def resume(way: str) -> Any:
    """4 steps in one go, and 2 + 2 with the state saved in between."""

    def steps(model: Any, first: int, last: int) -> torch.Tensor:
        for step in range(first, last):
            model.zero_grad()
            loss(model, step).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        return flat(model.parameters())

    options: dict[str, Any] = {"warmup_steps": 1, "weighting": weigh_first, "record_every": 2}
    whole = wrap(GrainState(**options))
    expected = steps(whole, 0, 4)

    state = GrainState(**options)
    model = wrap(state)
    steps(model, 0, 2)
    if way == "pickle":
        restored = pickle.loads(pickle.dumps(state))
    else:
        restored = GrainState(weighting=weigh_first)
        restored.load_state_dict(state.state_dict())
    assert restored.process_group is None
    assert restored.step == 2
    assert restored.warmup_steps == 1
    second = DistributedDataParallel(model.module, bucket_cap_mb=SMALL)
    second.register_comm_hook(restored, grain_hook)
    found = steps(second, 2, 4)
    assert torch.equal(found, expected)
    return restored.step, restored.last.step


@pytest.mark.parametrize("way", ["pickle", "state_dict"])
def test_resume(way: str) -> None:
    assert run(2, resume, way) == [(4, 2)] * 2


def sparse() -> None:
    model = DistributedDataParallel(nn.Embedding(10, 3, sparse=True))
    model.register_comm_hook(GrainState(), grain_hook)
    model(torch.tensor([1, 2])).sum().backward()


def no_state() -> None:
    model = DistributedDataParallel(network())
    model.register_comm_hook(None, grain_hook)
    loss(model, 0).backward()


def shared_state() -> None:
    state = GrainState()
    models = [wrap(state), wrap(state)]
    loss(models[0], 0).backward()


def other_options() -> None:
    rank = dist.get_rank()
    model = wrap(GrainState(scope="bucket" if rank == 1 else "global"))
    loss(model, 0).backward()


def other_step() -> None:
    state = GrainState(warmup_steps=3)
    if dist.get_rank() == 1:
        state.load_state_dict({**state.state_dict(), "step": 2})
    model = wrap(state)
    loss(model, 0).backward()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (sparse, "expected dense gradients, but bucket 0 on rank {rank} is torch.sparse_coo"),
        (no_state, "needs a GrainState, but found NoneType"),
        (shared_state, "registered with 2 models"),
        (other_options, "scope must be the same on every rank, but it is rank 0: 'global'"),
        (other_step, "step must be the same on every rank, but it is rank 0: 0, rank 1: 2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_errors_on_every_rank(function: Any, message: str) -> None:
    for outcome in launch(2, function, timeout=10):
        assert outcome.error is not None
        assert message.format(rank=outcome.rank) in outcome.error


def dies(memory: str) -> None:
    os.environ[SWITCH] = memory
    model = wrap(GrainState())
    for step in range(4):
        if step == 2 and dist.get_rank() == 1:
            os._exit(9)
        loss(model, step).backward()


@pytest.mark.parametrize("memory", ["1", "0"])
def test_a_dead_rank_is_an_error_on_the_others(memory: str) -> None:
    outcomes = launch(3, dies, memory, timeout=5, deadline=40)
    assert outcomes[1].exitcode == 9
    for outcome in (outcomes[0], outcomes[2]):
        assert "grain_ddp: lost the connection to rank " in str(outcome.error)
        # With the backend's own as its cause, or what was seen of the process.
        assert ("rank 1: it has died. " if memory == "1" else "gloo") in str(outcome.error)


def without_communication() -> bool:
    model = DistributedDataParallel(network())
    model.register_comm_hook(None, noop_hook)
    twin = network()
    for each in (model, twin):
        loss(each, 0).backward()
    return torch.equal(*(flat(p.grad for p in each.parameters()) for each in (model, twin)))


def test_the_noop_hook_leaves_local_gradients() -> None:
    assert run(2, without_communication) == [True, True]


class TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.linear(x).to(torch.bfloat16))
        return found.float()


def two_dtypes(options: dict[str, Any], arguments: dict[str, Any]) -> float:
    """In the first pass of a static graph DDP gives all buckets the number 0."""
    plain, hooked = (DistributedDataParallel(TwoDtypes(), **arguments) for _ in range(2))
    state = GrainState(weighting="mean", **options)
    hooked.register_comm_hook(state, grain_hook)
    worst = 0.0
    for step in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        for model in (plain, hooked):
            model.zero_grad()
            model(x).square().mean().backward()
        found, expected = (flat(p.grad for p in m.parameters()) for m in (hooked, plain))
        worst = max(worst, relative_error(found, expected))
    assert state.step == 4
    return worst


@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_a_static_graph_with_two_dtypes(scope: str) -> None:
    for arguments in ({"static_graph": True}, {"find_unused_parameters": True}, {}):
        assert max(run(2, two_dtypes, {"scope": scope}, arguments)) < 1e-2


def delayed() -> None:
    module = network()
    name, p = next(iter(module.named_parameters()))
    model = DistributedDataParallel(
        module, delay_all_reduce_named_params=[(name, p)], param_to_hook_all_reduce=p
    )
    model.register_comm_hook(GrainState(), grain_hook)
    loss(model, 0).backward()


def joins(divide: bool, weighting: str) -> Any:
    model = DistributedDataParallel(network())
    model.register_comm_hook(GrainState(weighting=weighting), grain_hook)
    with model.join(divide_by_initial_world_size=divide):
        for step in range(1 + dist.get_rank()):
            model.zero_grad()
            loss(model, step).backward()
    return flat(p.grad for p in model.parameters())


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (delayed, (), "delay_all_reduce_named_params=...) averages those parameters past"),
        (joins, (False, "mean"), "join(divide_by_initial_world_size=False) divides by the ranks"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_goes_past_a_hook_is_refused(
    function: Any, arguments: tuple[Any, ...], message: str
) -> None:
    for outcome in launch(2, function, *arguments, timeout=10):
        assert outcome.error is not None
        assert message in outcome.error


def test_uneven_inputs_leave_absent_ranks_without_a_weight() -> None:
    """The rank that is still there has the whole weight; DDP would divide by one."""
    left = run(2, joins, False, "min_norm")
    torch.testing.assert_close(left[1], run(1, alone)[0])


def alone() -> Any:
    """The gradient of the second rank's second step, by itself."""
    model = network()
    x, y = batch(1, rank=1)
    nn.functional.cross_entropy(model(x), y).backward()
    return flat(p.grad for p in model.parameters())


class Power(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(1.0 + dist.get_rank()))

    def forward(self) -> torch.Tensor:
        return self.p**3


def second_order(hooked: bool) -> Any:
    """(DDP itself takes it from models such as this one only.)"""
    model = DistributedDataParallel(Power())
    if hooked:
        model.register_comm_hook(GrainState(weighting="mean"), grain_hook)
    found = []
    for _ in range(3):
        model.zero_grad()
        model().backward(create_graph=True)
        grad = model.module.p.grad
        found.append((grad.detach().clone(), grad.requires_grad))
    return found


def test_a_graph_of_the_backward_pass() -> None:
    found, expected = run(2, second_order, True), run(2, second_order, False)
    assert found == expected
