"""The transpose-reduce on gloo, against an independent solver and against its in-process twin."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from oracle import min_norm_point
from ranks import SIZES, relative_error, same_everywhere

import grain_ddp._core.transposed as transposed
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.sharded import ShardedAggregation
from grain_ddp._core.state import GrainState
from grain_ddp._math.record import StepRecord
from grain_ddp._wire import thread_wire
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp._wire.wire import cut
from grain_ddp.simulation import simulate

LENGTHS = [1, 2, 7, 1000, 100_003]  # elements of the buckets; the largest takes several messages


def gradient(rank: int, bucket: int, length: int, dtype: torch.dtype = torch.float32) -> Any:
    """Correlated between ranks, of different norms: no corner of the simplex."""
    common = torch.randn(length, generator=torch.Generator().manual_seed(bucket))
    own = torch.randn(length, generator=torch.Generator().manual_seed(100 + 10 * bucket + rank))
    return ((0.3 * common + own) * (1 + rank / 4)).to(dtype)


def aggregate(
    options: dict[str, Any],
    buckets: list[torch.Tensor],
    message_bytes: int = 1 << 16,
    scratch_bytes: int = 32 << 20,
) -> tuple[list[torch.Tensor], StepRecord | None]:
    transposed.MESSAGE_BYTES = message_bytes  # in this rank's process
    transposed.SCRATCH_BYTES = scratch_bytes
    aggregation = Aggregation(GrainState(**options), TorchWire(dist.group.WORLD))
    results = [bucket.clone() for bucket in buckets]
    for result in results:
        aggregation.push(result)
    record = aggregation.finish()
    assert all(same_everywhere(result) for result in results)
    if record is not None:
        assert same_everywhere(torch.from_numpy(record.weights))
    return results, record


def of_lengths(options: dict[str, Any], dtype: torch.dtype, **limits: int) -> Any:
    rank = dist.get_rank()
    buckets = [gradient(rank, b, length, dtype) for b, length in enumerate(LENGTHS)]
    return aggregate(options, buckets, **limits)


def twin(n: int, options: dict[str, Any], dtype: torch.dtype) -> tuple[list[torch.Tensor], Any]:
    every = [[gradient(r, b, d, dtype) for b, d in enumerate(LENGTHS)] for r in range(n)]
    return simulate(every, GrainState(**options))


def expected(n: int, scope: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """By the independent solver, in float64, from all gradients."""
    rows = [
        torch.stack([gradient(r, b, d, dtype) for r in range(n)]).double()
        for b, d in enumerate(LENGTHS)
    ]
    if scope == "bucket":
        return [torch.from_numpy(min_norm_point(r)) for r in rows]
    return list(torch.from_numpy(min_norm_point(torch.cat(rows, dim=1))).split(LENGTHS))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_equals_an_independent_solver(n: int, scope: str) -> None:
    for dtype, bound in [(torch.float32, 1e-5), (torch.float64, 1e-10)]:
        results, record = run(n, of_lengths, {"scope": scope}, dtype)[0]
        for found, exact in zip(results, expected(n, scope, dtype), strict=True):
            # A bucket of a global step is part of a vector: its error is relative to all of it.
            # The last term is for n gradients in 1 or 2 dimensions, whose hull may contain 0.
            whole = torch.cat(expected(n, scope, dtype)) if scope == "global" else exact
            rounding = 10 * torch.finfo(dtype).eps * len(exact) ** 0.5
            assert (found.double() - exact).norm() <= bound * whole.norm() + rounding
        weights = np.atleast_2d(record.weights)
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_no_group_is_conflicted_with(n: int) -> None:
    """⟨d, g_i⟩ ≥ ‖d‖² − 1e-5 · ‖d‖ · max ‖g‖ for every group."""
    for scope in ("global", "bucket"):
        results, _ = run(n, of_lengths, {"scope": scope}, torch.float32)[0]
        rows = [
            torch.stack([gradient(r, b, d) for r in range(n)]).double()
            for b, d in enumerate(LENGTHS)
        ]
        parts = [(torch.cat(results), torch.cat(rows, 1))]
        if scope == "bucket":
            parts += zip(results, rows, strict=True)
        for d, g in parts:
            products, norm = g @ d.double(), d.double().norm()
            slack = 1e-5 * norm * g.norm(dim=1).max()
            if g is parts[0][1] and scope == "bucket":
                assert (products >= -slack).all()  # each bucket has another d: no conflict in sum
            else:
                assert (products >= norm**2 - slack).all()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "bucket"},
        {"wire_dtype": torch.bfloat16},
        {"scope": "bucket", "wire_dtype": torch.float16},
        {"weighting": "inverse_norm"},
        {"cap": 1.5},
        {"weighting": "mean"},
    ],
    ids=str,
)
def test_equals_its_twin(n: int, options: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        results, record = run(n, of_lengths, options, dtype)[0]
        simulated, twin_record = twin(n, options, dtype)
        narrowest = max(torch.finfo(t).eps for t in (dtype, options.get("wire_dtype", dtype)))
        if n > 1:  # of one rank nothing travels, so nothing is rounded either
            for found, other in zip(results, simulated, strict=True):
                torch.testing.assert_close(found, other, rtol=8 * narrowest, atol=1e-6)
            np.testing.assert_allclose(record.gramian, twin_record.gramian, rtol=1e-6, atol=1e-3)
        np.testing.assert_allclose(record.weights, twin_record.weights, atol=1e-6)


@pytest.mark.parametrize("scope", ["global", "bucket"])
@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [2, 3])
def test_little_scratch_changes_nothing(n: int, scope: str, wire_dtype: Any) -> None:
    """Rows that must give up their scratch wait in the bucket itself."""
    options = {"scope": scope, "wire_dtype": wire_dtype}
    plenty, _ = run(n, of_lengths, options, torch.float32)[0]
    for messages in (1, 3):
        little, _ = run(n, limited, options, 1 << 14, n * messages << 14, deadline=60)[0]
        for found, other in zip(little, plenty, strict=True):
            rtol = 1e-5 if wire_dtype is None else 2 * torch.finfo(wire_dtype).eps
            torch.testing.assert_close(found, other, rtol=rtol, atol=1e-6)


def limited(options: dict[str, Any], message_bytes: int, scratch_bytes: int) -> Any:
    return of_lengths(
        options, torch.float32, message_bytes=message_bytes, scratch_bytes=scratch_bytes
    )


def mixed_dtypes() -> Any:
    rank = dist.get_rank()
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    buckets = [gradient(rank, b, 5001, dtype) for b, dtype in enumerate(dtypes)]
    return aggregate({}, buckets), [bucket.double() for bucket in buckets]


def test_mixed_dtypes_share_one_weight_vector() -> None:
    every = run(3, mixed_dtypes)
    (results, _), _ = every[0]
    rows = torch.stack([torch.cat(buckets) for _, buckets in every])
    exact = torch.from_numpy(min_norm_point(rows)).split(5001)
    for found, part in zip(results, exact, strict=True):
        assert relative_error(found, part) < {2: 5e-3, 4: 1e-6, 8: 1e-6}[found.itemsize]


def planted(kind: str, options: dict[str, Any]) -> Any:
    rank = dist.get_rank()
    buckets = [gradient(rank, b, 1000) for b in range(2)]
    if (rank == 1 and kind == "zero") or kind == "all zero":
        buckets = [torch.zeros_like(bucket) for bucket in buckets]
    elif rank == 1:
        buckets[0][17] = float(kind)
    return aggregate(options, buckets), buckets


@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_a_zero_gradient_is_absent(scope: str) -> None:
    every = run(3, planted, "zero", {"scope": scope})
    (results, record), _ = every[0]
    rows = (
        [[torch.cat(b) for _, b in every]]
        if scope == "global"
        else zip(*(b for _, b in every), strict=True)
    )
    exact = [min_norm_point(torch.stack(list(row))) for row in rows]
    assert relative_error(torch.cat(results), torch.from_numpy(np.concatenate(exact))) < 1e-5
    assert (record.weights[..., 1] == 0).all()
    assert record.active == ((0, 2) if scope == "global" else ((0, 2), (0, 2)))


def test_only_zero_gradients_give_zero() -> None:
    (results, record), _ = run(2, planted, "all zero", {})[0]
    assert not any(result.any() for result in results)
    assert record.active == ()


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_propagate_reaches_every_rank(bad: str, scope: str) -> None:
    for (results, _), _ in run(3, planted, bad, {"scope": scope}):
        assert not results[0].isfinite().all()  # and equal on every rank: see aggregate()


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16], ids=str)
def test_drop_leaves_the_others(wire_dtype: Any) -> None:
    every = run(3, planted, "nan", {"nonfinite": "drop", "wire_dtype": wire_dtype})
    (results, record), _ = every[0]
    rows = torch.stack([torch.cat(b) for r, (_, b) in enumerate(every) if r != 1])
    error = relative_error(torch.cat(results), torch.from_numpy(min_norm_point(rows)))
    assert error < (1e-5 if wire_dtype is None else 1e-2)
    assert record.dropped == (1,)


def many_steps(options: dict[str, Any], steps: int) -> Any:
    seen: list[int] = []
    state = GrainState(on_step=lambda record: seen.append(record.step), **options)
    aggregation = Aggregation(state, TorchWire(dist.group.WORLD))
    returned = []
    for step in range(steps):
        buffer = gradient(dist.get_rank(), step, 100)
        aggregation.push(buffer)
        record = aggregation.finish()
        mean = torch.stack([gradient(r, step, 100) for r in range(dist.get_world_size())]).mean(0)
        returned.append((None if record is None else record.step, relative_error(buffer, mean)))
    assert state.step == steps
    return seen, returned


def test_warmup_and_record_every() -> None:
    seen, returned = run(2, many_steps, {"warmup_steps": 3, "record_every": 2}, 8)[0]
    assert seen == [4, 6]
    assert [step for step, _ in returned] == [None] * 4 + [4, None, 6, None]
    assert [error < 1e-6 for _, error in returned] == [True] * 3 + [False] * 5


def test_monitor_mode_is_the_mean_and_records() -> None:
    for wire_dtype, bound in [(None, 1e-6), (torch.bfloat16, 1e-2)]:
        options = {"weighting": "mean", "record_every": 3, "wire_dtype": wire_dtype}
        seen, returned = run(3, many_steps, options, 7)[0]
        assert seen == [0, 3, 6]
        assert all(error < bound for _, error in returned)


def all_but_cancel(scope: str) -> None:
    state = GrainState(weighting="mean", scope=scope)
    aggregation = Aggregation(state, TorchWire(dist.group.WORLD))
    buffers = [gradient(0, step, 1000) for step in range(3)]
    if dist.get_rank():
        for buffer in buffers:
            buffer.mul_(-1 - 2**-23)
    means = [buffer / 2 for buffer in buffers]
    for mean in means:
        dist.all_reduce(mean)
    for buffer in buffers:
        aggregation.push(buffer)
    record = aggregation.finish()
    assert record is not None
    assert (record.weights == 0.5).all()
    for buffer, mean in zip(buffers, means, strict=True):
        assert mean.any()
        torch.testing.assert_close(buffer, mean, rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_monitor_mode_is_the_mean_to_the_last_bit(scope: str) -> None:
    """Also where GRAIN would call what is left a zero gradient."""
    run(2, all_but_cancel, scope)


def disagree(name: str, values: list[Any]) -> None:
    aggregate({name: values[dist.get_rank()]}, [torch.ones(3)])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("scope", ["global", "global", "bucket"]),
        ("record_every", [1, 2, 1]),
        ("wire_dtype", [None, None, torch.bfloat16]),
        ("nonfinite", ["drop", "propagate", "propagate"]),
    ],
)
def test_other_options_on_another_rank_are_an_error_on_all(name: str, values: list[Any]) -> None:
    for outcome in launch(3, disagree, name, values):
        assert outcome.error is not None
        assert f"ValueError: grain_ddp: {name} must be the same on every rank" in outcome.error
        assert f"this is rank {outcome.rank}" in outcome.error


def too_few(wire: Any, kind: str) -> None:
    options = {"microbatches": 2} if kind == "microbatches" else {}
    made = ShardedAggregation if kind == "sharded" else Aggregation
    made(GrainState(weighting="multi_krum", **options), wire)  # no step is made


@pytest.mark.parametrize("kind", ["whole", "microbatches", "sharded"])
def test_too_few_groups_for_krum_are_refused_before_a_step(kind: str) -> None:
    n = 2 if kind == "microbatches" else 4
    for error in thread_wire.run(n, too_few, kind):
        assert "needs at least 5 groups" in str(error)
        assert "there are 4" in str(error)
    assert thread_wire.run(5, too_few, kind) == [None] * 5
    assert thread_wire.run(1, too_few, "whole") == [None]  # the identity


def raise_in_weighting(gramian: torch.Tensor) -> torch.Tensor:
    raise ArithmeticError("planted")


def recover() -> Any:
    rules = iter([raise_in_weighting, lambda gramian: torch.tensor([0.25, 0.5, 0.25])])
    state = GrainState(weighting=lambda gramian: next(rules)(gramian))
    aggregation = Aggregation(state, TorchWire(dist.group.WORLD))
    with pytest.raises(ArithmeticError):
        aggregation.push(torch.ones(100_000))
        aggregation.finish()
    assert not aggregation.pending
    assert state.step == 0
    buffer = torch.full((1000,), 1.0 + dist.get_rank())
    aggregation.push(buffer)
    aggregation.finish()
    return buffer.unique().tolist()


def test_after_an_error_on_every_rank_a_step_works() -> None:
    assert run(3, recover) == [[2.0]] * 3


def die_in_mid_step() -> None:
    aggregation = Aggregation(GrainState(), TorchWire(dist.group.WORLD))
    if dist.get_rank() == 1:
        import os

        os._exit(9)
    aggregation.push(torch.ones(1_000_000))
    aggregation.finish()


def test_a_dead_rank_is_an_error_on_the_others() -> None:
    outcomes = launch(3, die_in_mid_step, timeout=5, deadline=40)
    assert outcomes[1].exitcode == 9
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error is not None
        assert "RuntimeError" in outcome.error


def freed() -> bool:
    gc.disable()
    aggregation = Aggregation(GrainState(), TorchWire(dist.group.WORLD))
    buffer = torch.ones(1000)
    reference = weakref.ref(buffer)
    aggregation.push(buffer, buffer.zero_)
    del buffer
    aggregation.finish()
    return reference() is None


def test_a_finished_bucket_does_not_wait_for_the_garbage_collector() -> None:
    assert run(2, freed) == [True, True]


def memory_taken() -> int:
    """Allocations in the last of three steps, whose first bucket is a small one."""
    aggregation = Aggregation(GrainState(), TorchWire(dist.group.WORLD))
    for _ in range(3):
        with mock.patch.object(torch, "empty", wraps=torch.empty) as empty:
            for length in (100, 1000, 1000):
                aggregation.push(torch.ones(length))
            aggregation.finish()
    return empty.call_count


def test_scratch_is_kept_from_step_to_step() -> None:
    assert run(2, memory_taken) == [0, 0]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [1, 5, 7, 100, 1023])
@pytest.mark.parametrize("message", [1, 10, 1000])
def test_cut_covers_a_bucket_once(n: int, length: int, message: int) -> None:
    pieces = cut(length, n, message)
    covered = sorted(x for piece in pieces for slot in piece for x in range(length)[slot])
    assert covered == list(range(length))
    assert all(len(piece) == n for piece in pieces)
    *others, last = [slot.stop - slot.start for piece in pieces for slot in piece]
    assert max(others, default=0) <= message
    assert last < message + n
    assert len(pieces) == max(-(-(length // n) // message), 1)


def nearly_cancel(options: dict[str, Any], ratio: float) -> Any:
    """Gradients whose min-norm point is so much shorter than they are: (error, least product)."""
    n, d = dist.get_world_size(), 5000
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows[-1] = -rows[:-1].sum(0)  # 0 is in the hull, and off it by a direction of all
    rows += ratio * torch.randn(d, generator=generator, dtype=torch.float64)
    rows = rows.float()
    exact = torch.from_numpy(min_norm_point(rows))
    (found,), _ = aggregate(options, [rows[dist.get_rank()].clone()])
    least = (rows.double() @ found.double()).min() / exact.square().sum()
    return relative_error(found, exact), float(least), float(exact.norm() / rows[0].norm())


@pytest.mark.parametrize("scope", ["global", "bucket"])
@pytest.mark.parametrize("n", [3, 4])
def test_gradients_that_nearly_cancel(n: int, scope: str) -> None:
    for ratio in (1e-2, 1e-3, 1e-4, 2e-5):
        for error, least, found in run(n, nearly_cancel, {"scope": scope}, ratio):
            assert found < 2 * ratio
            assert error < 1e-6
            assert least > 1 - 1e-6 / found  # the design asks for ten times that


def nearly_cancel_in_two_dtypes(scope: str) -> Any:
    """As `nearly_cancel`, half of the columns in float64: the error, with one weight vector."""
    n, d = dist.get_world_size(), 3000
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows[-1] = -rows[:-1].sum(0)
    rows += 1e-4 * torch.randn(d, generator=generator, dtype=torch.float64)
    rows[:, d // 2 :] = rows[:, d // 2 :].float()
    own = rows[dist.get_rank()]
    results, record = aggregate({"scope": scope}, [own[: d // 2].clone(), own[d // 2 :].float()])
    assert record is not None
    if scope == "bucket":
        return 0.0
    exact = torch.from_numpy(min_norm_point(rows))
    return relative_error(torch.cat([result.double() for result in results]), exact)


@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_buckets_of_two_dtypes_share_their_weights(scope: str) -> None:
    """Also where one of them, and not the first, asks for the Gramian to be made anew."""
    assert max(run(3, nearly_cancel_in_two_dtypes, scope)) < 1e-6
