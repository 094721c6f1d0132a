"""Groups of several ranks, and several groups on one rank: node groups and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from oracle import min_norm_point
from ranks import (
    flat,
    local_gradients,
    loss,
    network,
    relative_error,
    same_everywhere,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import grain_ddp._core.transposed as transposed
from grain_ddp import GrainState, grain_hook, reduce_gradients
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.passes import Passes
from grain_ddp._core.views import cut
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp.simulation import simulate

LENGTHS = [1, 3, 1000, 100_003, 7]

# groups as a user names them, the ranks that they stand for, and how many ranks there are
GROUPS: list[tuple[Any, list[list[int]]]] = [
    (1, [[0], [1], [2]]),
    (2, [[0, 1]]),
    (2, [[0, 1], [2, 3]]),
    (4, [[0, 1, 2, 3]]),
    ([[2, 0], [1, 3]], [[2, 0], [1, 3]]),
    ([[1], [0]], [[1], [0]]),
    (3, [[0, 1, 2], [3, 4, 5]]),
    (2, [[0, 1], [2, 3], [4, 5]]),
    (2, [[0, 1], [2]]),
    ([[3, 0, 2], [1]], [[3, 0, 2], [1]]),
]
SKETCHES = [None, sum(LENGTHS)]  # the latter loses nothing


def gradient(rank: int, bucket: int, length: int) -> torch.Tensor:
    common = torch.randn(length, generator=torch.Generator().manual_seed(bucket))
    own = torch.randn(length, generator=torch.Generator().manual_seed(100 + 10 * bucket + rank))
    return (0.3 * common + own) * (1 + rank / 4)


def aggregate(options: dict[str, Any], ours: list[int], dtypes: list[torch.dtype]) -> Any:
    """Every bucket's result, and the record, of a step in which messages are many and small."""
    transposed.MESSAGE_BYTES, transposed.SCRATCH_BYTES = 1 << 16, 1 << 19
    aggregation = Aggregation(GrainState(**options), TorchWire(dist.group.WORLD))
    found = []
    for _ in range(2):  # memory is used again
        found = [
            gradient(ours[dist.get_rank()], b, length).to(dtype)
            for b, (length, dtype) in enumerate(zip(LENGTHS, dtypes, strict=True))
        ]
        for buffer in found:
            aggregation.push(buffer)
        record = aggregation.finish()
    assert all(same_everywhere(buffer) for buffer in found)
    if record is not None:
        assert same_everywhere(torch.from_numpy(record.weights))
    return found, record


def means(groups: list[list[int]]) -> list[list[torch.Tensor]]:
    """[group][bucket], in float64."""
    return [
        [
            torch.stack([gradient(rank, b, length) for rank in group]).double().mean(0)
            for b, length in enumerate(LENGTHS)
        ]
        for group in groups
    ]


FP32 = [torch.float32] * len(LENGTHS)


@pytest.mark.parametrize(("named", "groups"), GROUPS, ids=str)
@pytest.mark.parametrize("scope", ["global", "bucket"])
@pytest.mark.parametrize("sketch", SKETCHES)
def test_groups_equal_an_independent_solver(
    named: Any, groups: list[list[int]], scope: str, sketch: int | None
) -> None:
    n = sum(map(len, groups))
    options = {"groups": named, "scope": scope, "sketch": sketch}
    found, record = run(n, aggregate, options, list(range(n)), FP32)[0]
    rows = means(groups)
    if scope == "global":
        whole = torch.stack([torch.cat(row) for row in rows])
        exact = list(torch.from_numpy(min_norm_point(whole)).split(LENGTHS))
        assert record.weights.shape == (len(groups),)
    else:
        exact = [torch.from_numpy(min_norm_point(torch.stack(b))) for b in zip(*rows, strict=True)]
        assert record.weights.shape == (len(LENGTHS), len(groups))
    for result, expected in zip(found, exact, strict=True):
        scale = torch.cat(exact).norm() if scope == "global" else expected.norm() + 1e-1
        assert (result.double() - expected).norm() <= 1e-5 * scale


@pytest.mark.parametrize(
    "options",
    [
        {"wire_dtype": torch.bfloat16},
        {"wire_dtype": torch.bfloat16, "scope": "bucket"},
        {"weighting": "inverse_norm"},
        {"cap": 1.2},
        {"weighting": "mean"},
        {"warmup_steps": 5},
        {"warmup_steps": 5, "wire_dtype": torch.bfloat16},
        {"weighting": "mean", "record_every": 2},
    ],
    ids=str,
)
def test_options_with_groups(options: dict[str, Any]) -> None:
    """Against the twin, of the group means; with mixed dtypes."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float64]
    groups = [[0, 1], [2, 3]]
    found, _ = run(4, aggregate, {**options, "groups": 2}, list(range(4)), dtypes)[0]
    rows = [[b.to(t) for b, t in zip(row, dtypes, strict=True)] for row in means(groups)]
    if "warmup_steps" in options:
        options = {**options, "weighting": "mean"}
    simulated, _ = simulate(rows, GrainState(**options))
    coarse = "wire_dtype" in options
    for result, expected, dtype in zip(found, simulated, dtypes, strict=True):
        bound = 0.03 if coarse or dtype == torch.bfloat16 else 1e-5
        assert relative_error(result, expected) < bound


def misfit(groups: Any) -> None:
    Aggregation(GrainState(groups=groups), TorchWire(dist.group.WORLD))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0], [1]], "name each of the 3 ranks once"),
        ([[0], [1], [1]], "name each of the 3 ranks once"),
    ],
    ids=str,
)
def test_groups_that_do_not_fit_are_an_error_on_every_rank(groups: Any, message: str) -> None:
    for outcome in launch(3, misfit, groups):
        assert outcome.error is not None
        assert "ValueError: grain_ddp: groups" in outcome.error
        assert message in outcome.error


@pytest.mark.parametrize("groups", ["host", 0, True, [], [[]], [0, 1], [["a"]], 1.5], ids=str)
def test_groups_that_are_none(groups: Any) -> None:
    with pytest.raises(ValueError, match="groups must be"):
        GrainState(groups=groups)


def on_one_host() -> Any:
    aggregation = Aggregation(GrainState(groups="node"), TorchWire(dist.group.WORLD))
    buffer = torch.full((5,), float(dist.get_rank()))
    aggregation.push(buffer)
    return buffer, aggregation.finish()


def test_one_host_is_one_group() -> None:
    for buffer, record in run(3, on_one_host):
        torch.testing.assert_close(buffer, torch.full((5,), 1.0))
        assert record.weights.tolist() == [1.0]


class TwoHosts(TorchWire):
    """Believes that ranks of one parity share a host."""

    def host(self) -> tuple[str, ...]:
        return (f"host {self.rank % 2}",)


def on_two_hosts() -> Any:
    aggregation = Aggregation(GrainState(groups="node"), TwoHosts(dist.group.WORLD))
    buffer = gradient(dist.get_rank(), 0, 1001)
    aggregation.push(buffer)
    return buffer, aggregation.finish()


def test_hosts_are_groups() -> None:
    rows = torch.stack([gradient(rank, 0, 1001) for rank in range(4)]).double()
    expected = torch.from_numpy(min_norm_point(rows.view(2, 2, -1).mean(0)))
    for buffer, record in run(4, on_two_hosts):
        assert record.weights.shape == (2,)
        assert relative_error(buffer, expected) < 1e-5


def train_in_groups(
    options: dict[str, Any], groups: list[list[int]], ddp: dict[str, Any] | None
) -> float:
    """Steps by DDP or (None) by reduce_gradients: the worst error of an aggregate."""
    module, state = network(), GrainState(**options)
    model: nn.Module = module
    if ddp is not None:
        model = DistributedDataParallel(module, bucket_cap_mb=0.002, **ddp)
        model.register_comm_hook(state, grain_hook)
    optimizer, worst = torch.optim.SGD(model.parameters(), lr=0.5), 0.0
    for step in range(4):
        rows = local_gradients(module, step)
        rows = torch.stack([rows[group].mean(0) for group in groups])
        optimizer.zero_grad()
        loss(model, step).backward()
        if ddp is None:
            reduce_gradients(model.parameters(), state)
        found = flat(p.grad for p in model.parameters())
        worst = max(worst, relative_error(found, torch.from_numpy(min_norm_point(rows))))
        optimizer.step()
    assert same_everywhere(flat(model.parameters()))
    return worst


def train_in_every_way() -> list[float]:
    ways: list[Any] = [{}, {"gradient_as_bucket_view": True}, None]
    return [
        train_in_groups({"groups": groups, "sketch": sketch}, named, ddp)
        for ddp in ways
        for groups, named in ((2, [[0, 1], [2, 3]]), ([[3], [0, 1, 2]], [[3], [0, 1, 2]]))
        for sketch in (None, 4000)  # which has room for every number
    ]


def test_ddp_and_the_loop_with_groups() -> None:
    for errors in run(4, train_in_every_way):
        assert max(errors) < 1e-5, errors


# Micro-batches: m passes of n ranks are n·m groups.


def exact_passes(module: nn.Module, steps: range) -> torch.Tensor:
    """The aggregate of every rank's gradients at these batches, by the independent solver."""
    rows = torch.stack([local_gradients(module, step) for step in steps], 1)  # [n, m, d]
    return torch.from_numpy(min_norm_point(rows.flatten(0, 1)))


def passes(m: int, options: dict[str, Any], ddp: dict[str, Any] | None) -> float:
    """Steps of m passes, by DDP or (None) by reduce_gradients: the worst error of an aggregate."""
    transposed.MESSAGE_BYTES = 1 << 10
    state, module = GrainState(microbatches=m, **options), network()
    model: nn.Module = module
    if ddp is not None:
        model = DistributedDataParallel(module, bucket_cap_mb=0.002, **ddp)
        model.register_comm_hook(state, grain_hook)
    optimizer, worst = torch.optim.SGD(model.parameters(), lr=0.5), 0.0
    for step in range(3):
        batches = range(step * m, step * m + m)
        expected = exact_passes(module, batches)
        optimizer.zero_grad()
        for i in batches:
            assert state.step == step
            loss(model, i).backward()
            if ddp is None:
                reduce_gradients(model.parameters(), state)
            if i < batches[-1]:
                assert not any(p.grad.any() for p in model.parameters())
        found = flat(p.grad for p in model.parameters())
        worst = max(worst, relative_error(found, expected))
        assert same_everywhere(found)
        assert state.last.weights.shape[-1] == m * dist.get_world_size()
        optimizer.step()
    return worst


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("m", [2, 3])
def test_microbatches_equal_an_independent_solver(n: int, m: int) -> None:
    assert max(run(n, passes, m, {}, None)) < 1e-5
    assert max(run(n, passes, m, {}, {})) < 1e-5
    assert max(run(n, passes, m, {}, {"gradient_as_bucket_view": True})) < 1e-5


def test_microbatches_under_a_static_graph() -> None:
    assert max(run(2, passes, 2, {}, {"static_graph": True})) < 1e-5


def bucketwise(options: dict[str, Any]) -> Any:
    """Two passes of two buckets by the aggregation itself, each time in other parts."""
    state = GrainState(microbatches=2, **options)
    aggregation = Aggregation(state, TorchWire(dist.group.WORLD))
    rank, lengths = dist.get_rank(), [1000, 13]
    buffers = []
    for i in range(2):
        buffers = [gradient(2 * rank + i, b, length) for b, length in enumerate(lengths)]
        for b, buffer in enumerate(buffers):
            aggregation.push(buffer, parts=[((b, "only"), len(buffer))])
        record = aggregation.finish()
    assert record is None or record.weights.shape[-1] == 2 * dist.get_world_size()
    return buffers


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "bucket"},
        {"wire_dtype": torch.bfloat16},
        {"weighting": "mean"},
        {"warmup_steps": 1},
        {"warmup_steps": 1, "wire_dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2])
def test_options_with_microbatches(options: dict[str, Any], n: int) -> None:
    rows = [[gradient(i, b, length) for b, length in enumerate([1000, 13])] for i in range(2 * n)]
    found = run(n, bucketwise, options)[0]
    twin = dict(options, weighting="mean") if "warmup_steps" in options else options
    simulated, _ = simulate(rows, GrainState(**twin))
    for result, expected in zip(found, simulated, strict=True):
        assert relative_error(result, expected) < (0.02 if "wire_dtype" in options else 1e-5)


def nan_in_a_pass(nonfinite: str) -> Any:
    state = GrainState(microbatches=2, nonfinite=nonfinite)
    aggregation = Aggregation(state, TorchWire(dist.group.WORLD))
    for i in range(2):
        buffer = gradient(2 * dist.get_rank() + i, 0, 100)
        if (dist.get_rank(), i) == (1, 0):
            buffer[5] = float("nan")
        aggregation.push(buffer)
        record = aggregation.finish()
    return buffer, record


def test_a_pass_that_is_not_finite() -> None:
    for buffer, record in run(2, nan_in_a_pass, "drop"):
        assert record.dropped == (2,)
        rows = torch.stack([gradient(i, 0, 100) for i in (0, 1, 3)])
        assert relative_error(buffer, torch.from_numpy(min_norm_point(rows))) < 1e-5
    assert all(buffer.isnan().any() for buffer, _ in run(2, nan_in_a_pass, "propagate"))


def broken_pass() -> float:
    """An exception in a second pass: the next step starts over."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.002)
    model.register_comm_hook(GrainState(microbatches=2), grain_hook)
    for i in range(2):  # the buckets have their final form
        loss(model, i).backward()
    model.zero_grad()
    loss(model, 2).backward()

    def fail(gradient: torch.Tensor) -> None:
        raise KeyError("planted")

    handle = model.module[0].weight.register_hook(fail)
    with pytest.raises(KeyError):
        loss(model, 3).backward()
    handle.remove()
    model.reducer._reset_state()
    model.zero_grad()
    expected = exact_passes(model.module, range(4, 6))
    for i in (4, 5):
        loss(model, i).backward()
    return relative_error(flat(p.grad for p in model.parameters()), expected)


def test_a_pass_that_breaks_off() -> None:
    assert max(run(2, broken_pass)) < 1e-5


def unused_parameters() -> None:
    model = DistributedDataParallel(network(), find_unused_parameters=True)
    model.register_comm_hook(GrainState(microbatches=2), grain_hook)
    loss(model, 0).backward()


def test_microbatches_need_every_parameter() -> None:
    for outcome in launch(2, unused_parameters):
        assert outcome.error is not None
        assert "microbatches needs every parameter in every pass" in outcome.error


def test_microbatches_and_node_groups_are_refused() -> None:
    with pytest.raises(ValueError, match='needs groups="rank"'):
        GrainState(microbatches=2, groups="node")
    for wrong in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match="microbatches must be"):
            GrainState(microbatches=wrong)


def test_one_process_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dist.is_initialized()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    torch.manual_seed(0)
    model, state = nn.Linear(5, 3), GrainState(microbatches=3)
    rows = []
    for i in range(3):
        twin = nn.Linear(5, 3)
        twin.load_state_dict(model.state_dict())
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
        for net in (twin, model):
            net(x).square().sum().backward()
        rows.append(flat(p.grad for p in twin.parameters()))
        record = reduce_gradients(model.parameters(), state)
        assert (record is None) == (i < 2)
    expected = torch.from_numpy(min_norm_point(torch.stack(rows)))
    assert relative_error(flat(p.grad for p in model.parameters()), expected) < 1e-5
    assert record is not None
    assert record.weights.shape == (3,)


def test_one_of_several_processes_needs_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="not initialised"):
        reduce_gradients(model.parameters(), GrainState(microbatches=2))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_passes_survive_other_buckets(n: int) -> None:
    """Rows kept in one layout come out of another, whatever is new, gone or in another order."""
    kept, a, b, c = Passes(n, 3), torch.arange(7.0), torch.arange(10.0, 15), torch.arange(20.0, 23)
    kept.add(torch.cat([a, b]), [("a", 7), ("b", 5)], 2)
    kept.done = 1
    kept.add(torch.cat([b + 100, c + 100]), [("b", 5), ("c", 3)], 2)
    kept.add(a + 100, [("a", 7)], 2)
    kept.done = 2
    blocks = kept.add(torch.cat([c, a, b]) + 200, [("c", 3), ("a", 7), ("b", 5)], 2)
    expected = [torch.cat([0 * c, a, b]), torch.cat([c, a, b]) + 100, torch.cat([c, a, b]) + 200]
    for block, slots in zip(blocks, cut(15, n, 2), strict=True):
        rows = [[row[slot] for row in expected] for slot in slots]  # of each rank
        assert torch.equal(block, torch.cat([part for own in rows for part in own]))
    out = torch.empty(15)
    kept.mean(blocks, out, 2)
    torch.testing.assert_close(out, torch.stack(expected).mean(0))
    with pytest.raises(ValueError, match="expected a bucket of 4 elements"):
        kept.add(a, [("d", 4)], 2)
