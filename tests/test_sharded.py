"""The transpose-reduce for owners of parts: each gets its part, whoever owns how much."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from oracle import min_norm_point
from ranks import SIZES, gather, relative_error

import grain_ddp._core.sharded as sharded_module
from grain_ddp import GrainState, min_norm
from grain_ddp._core.agreement import MARKS
from grain_ddp._core.groups import partition
from grain_ddp._core.sharded import ShardedAggregation, share
from grain_ddp._core.views import length, part, read, write
from grain_ddp._wire.neighbours import SWITCH
from grain_ddp._wire.torch_wire import TorchWire

Cut = list[list[tuple[int, int]]]  # for each push, its lengths and whose they are


def cuts(n: int) -> dict[str, Cut]:
    return {
        "even": [[(300, rank) for rank in range(n)]],
        "of one": [[(1000, n - 1)]],
        "of two, and interleaved": [[(500, 0), (3, n - 1), (700, 0), (900, n - 1), (1, 0)]],
        "several, one owner missing": [
            [(40 + 7 * j, j) for j in range(n - 1)] + [(5, 0)],
            [(9, 0)],
        ],
    }


class Counting(TorchWire):
    """Notes how many bytes each exchange sends."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.sent: list[int] = []  # that of the wires inside, too

    def exchange(self, send: Any, receive: Any, *what: Any) -> Any:
        self.sent += [t.nbytes for j, t in enumerate(send) if j != self.rank]
        return super().exchange(send, receive, *what)


def aggregate(
    cut: Cut, options: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype, scale: float
) -> Any:
    """(largest error of this rank's part, bytes sent); gradients share half of their direction."""
    for name, value in sizes.items():
        setattr(sharded_module, name, value)
    wire = Counting(dist.group.WORLD)
    state = GrainState(**options)
    aggregation = ShardedAggregation(state, wire, scale=scale)
    results, wholes = [], []
    for k, push in enumerate(cut):
        total = sum(size for size, _ in push)
        common = torch.randn(total, generator=torch.Generator().manual_seed(k))
        own = torch.randn(total, generator=torch.Generator().manual_seed(10 + wire.rank))
        gradient = (common + own).to(dtype)
        wholes.append(torch.stack(gather(gradient)).double())
        owned: list[list[torch.Tensor]] = [[] for _ in range(wire.size)]
        mine = torch.zeros(total, dtype=torch.bool)
        offset = 0
        for size, owner in push:
            owned[owner].append(gradient[offset : offset + size])
            mine[offset : offset + size] = owner == wire.rank
            offset += size
        aggregation.push(owned)
        results.append((gradient, mine))
    record = aggregation.finish()
    assert record is not None
    groups = partition(state.groups, wire)
    wholes = [torch.stack([rows[group].mean(0) for group in groups]) for rows in wholes]
    if state.scope == "global":
        points = torch.from_numpy(min_norm_point(torch.cat(wholes, 1))).split(
            [rows.shape[1] for rows in wholes]
        )
    else:
        points = [torch.from_numpy(min_norm_point(rows)) for rows in wholes]
        assert len(record.weights) == len(cut)
    worst = 0.0
    for (gradient, mine), point in zip(results, points, strict=True):
        if mine.any():
            worst = max(worst, relative_error(gradient[mine], scale * point[mine]))
    return worst, sum(wire.sent)


def every_cut(every_options: list[dict[str, Any]], every_sizes: list[dict[str, int]]) -> float:
    worst = 0.0
    for cut in cuts(dist.get_world_size()).values():
        for options in every_options:
            for sizes in every_sizes:
                error, _ = aggregate(cut, options, sizes, torch.float32, 1)
                worst = max(worst, error)
    return worst


@pytest.mark.parametrize("n", SIZES)
def test_each_owner_gets_its_part(n: int) -> None:
    few = {"SLACK": 0, "MESSAGE_BYTES": 256, "SCRATCH_BYTES": 2000}
    none = {"SLACK": 0, "MESSAGE_BYTES": 1 << 20, "SCRATCH_BYTES": 0}
    scopes = [{"scope": "global"}, {"scope": "bucket"}]
    assert max(run(n, every_cut, scopes, [{}, few, none])) < 1e-5


def groups_and_sketches(memory: str) -> float:
    os.environ[SWITCH] = memory
    every = [
        {"scope": scope, "groups": groups, "sketch": sketch}
        for scope in ("global", "bucket")
        for groups in ("rank", 2, [[0], [3, 1, 2]])
        for sketch in (None, 4000)
        if groups != "rank" or sketch
    ]
    return every_cut(every, [{}])


@pytest.mark.parametrize("memory", ["0", "1"])
def test_groups_and_sketches(memory: str) -> None:
    """Of any size, in both scopes; a sketch with room for all loses nothing."""
    assert max(run(4, groups_and_sketches, memory)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_scale(dtype: torch.dtype) -> None:
    for cut in cuts(3).values():
        sizes = {"SLACK": 0, "MESSAGE_BYTES": 256, "SCRATCH_BYTES": 0}
        found = run(3, aggregate, cut, {}, sizes, dtype, 3)
        assert max(error for error, _ in found) < (4e-3 if dtype == torch.bfloat16 else 1e-12)


def test_a_narrow_wire() -> None:
    for cut in cuts(3).values():
        for scratch in (0, 32 << 20):
            sizes = {"SLACK": 0, "MESSAGE_BYTES": 256, "SCRATCH_BYTES": scratch}
            options = {"wire_dtype": torch.bfloat16}
            found = run(3, aggregate, cut, options, sizes, torch.float32, 1)
            assert max(error for error, _ in found) < 2e-2


def test_bytes_are_those_of_a_reduce_scatter() -> None:
    """And of a buffer with one owner never more than those of an all-reduce."""
    n, size = 4, 40_000
    triangle = (n - 1) * (n * (n + 1) // 2 + MARKS) * 8
    even = [[(size // n, rank) for rank in range(n)]]
    for _, sent in run(n, aggregate, even, {}, {}, torch.float32, 1):
        assert sent - triangle == (n - 1) * size // n * 4
    found = run(n, aggregate, [[(size, 2)]], {}, {"SLACK": 0}, torch.float32, 1)
    assert all(sent - triangle <= size * 4 for _, sent in found)


def test_shares_are_fair() -> None:
    sharded_module.SLACK, before = 0, sharded_module.SLACK
    try:
        values = torch.arange(100)
        owned = [[values[:7], values[7:93]], [], [values[93:]]]
        weighed, moved = share(owned)
        assert [length(views) for views in weighed] == [34, 34, 32]
        assert sorted(torch.cat([v for views in weighed for v in views]).tolist()) == [*range(100)]
        assert sum(len(view) for _, owner, view in moved if owner == 0) == 59
        assert all(weigher != owner for weigher, owner, _ in moved)
    finally:
        sharded_module.SLACK = before


def test_views_are_one_tensor() -> None:
    values = torch.arange(10.0)
    views = [values[8:], values[:0], values[2:5]]
    assert torch.cat(part(views, 1, 4)).tolist() == [9, 2, 3]
    assert part(views, 5, 9) == []
    assert read(views, torch.empty(0)).tolist() == [8, 9, 2, 3, 4]
    assert read([], torch.empty(0, dtype=torch.float16)).dtype == torch.float16
    write(views, -torch.arange(5.0))
    assert values.tolist() == [0, 1, -2, -3, -4, 5, 6, 7, 0, -1]


def spoilt(nonfinite: str) -> Any:
    rank = dist.get_rank()
    aggregation = ShardedAggregation(GrainState(nonfinite=nonfinite), TorchWire(dist.group.WORLD))
    gradient = torch.full((30,), 1.0 + rank)
    if rank == 1:
        gradient[25] = float("nan")
    aggregation.push([[view] for view in gradient.split(10)])
    record = aggregation.finish()
    assert record is not None
    if nonfinite == "drop":
        assert gradient.isfinite().all()
    return gradient[10 * rank : 10 * rank + 10].tolist(), record.dropped


def test_what_is_not_finite() -> None:
    found = run(3, spoilt, "drop")
    assert [dropped for _, dropped in found] == [(1,)] * 3
    assert all(values == [1.0] * 10 for values, _ in found)
    found = run(3, spoilt, "propagate")
    assert [any(v != v for v in values) for values, _ in found] == [False, False, True]


def broken() -> Any:
    """A push that fails leaves nothing behind; the next step is right."""
    wire = TorchWire(dist.group.WORLD)
    rules = iter([lambda gramian: gramian, lambda gramian: min_norm(gramian).weights])
    state = GrainState(weighting=lambda gramian: next(rules)(gramian))
    aggregation = ShardedAggregation(state, wire)
    gradient = torch.ones(8)
    aggregation.push([[view] for view in gradient.split(4)])
    with pytest.raises(ValueError, match="finite weights"):
        aggregation.finish()
    gradient.fill_(1.0 + wire.rank)
    aggregation.push([[view] for view in gradient.split(4)])
    assert aggregation.finish() is not None
    return gradient[4 * wire.rank : 4 * wire.rank + 4].tolist()


def test_an_error_leaves_nothing_behind() -> None:
    assert run(2, broken) == [[1.0] * 4] * 2


def disagree() -> None:
    ShardedAggregation(GrainState(cap=1 + dist.get_rank()), TorchWire(dist.group.WORLD))


def test_different_options_are_an_error_everywhere() -> None:
    for outcome in launch(2, disagree):
        assert outcome.error is not None
        assert "cap must be the same on every rank" in outcome.error
