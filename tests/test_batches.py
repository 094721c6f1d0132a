"""What ranks say of their batches: labels that make groups, samples that count, losses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run
from oracle import min_norm_point, min_norm_weights
from ranks import relative_error
from torch import Tensor
from ways import play, values

from grain_ddp import GrainState, StepRecord
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.sharded import ShardedAggregation
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp._wire.wire import Wire

LENGTHS = [7, 500, 31]


def gradient(rank: int, bucket: int, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + 100 * bucket + rank)
    return torch.randn(LENGTHS[bucket], generator=generator) + 0.2


def rows(n: int, number: int = 0) -> Tensor:
    """Of each rank, in float64."""
    every = [torch.cat([gradient(r, b, number) for b in range(len(LENGTHS))]) for r in range(n)]
    return torch.stack(every).double()


def train(
    wire: Wire, options: dict[str, Any], said: list[list[dict[str, Any] | None]], empty: int = -1
) -> tuple[list[Tensor], list[StepRecord | None]]:
    """Steps of one pass, or of m, in which rank r says ``said[pass][r]``; results and records."""
    state = GrainState(**options)
    aggregation = Aggregation(state, wire)
    results, records = [], []
    for number, ranks in enumerate(said):
        batch = ranks[wire.rank]
        if batch is not None:
            state.batch(**batch)
        buffers = [gradient(wire.rank, b, number) for b in range(len(LENGTHS))]
        if wire.rank == empty:
            buffers[0][0] = float("nan")  # the mean over nothing
        for buffer in buffers:
            aggregation.push(buffer)
        records.append(aggregation.finish())
        results.append(torch.cat(buffers))
    return results, records


def grouped(every: Tensor, groups: list[list[int]], counts: list[float]) -> Tensor:
    c = torch.tensor(counts, dtype=torch.float64)
    means = [(every[g] * c[g, None]).sum(0) / c[g].sum() for g in groups]
    return torch.from_numpy(min_norm_point(torch.stack(means)))


@pytest.mark.parametrize("way", ["threads", "network"])
@pytest.mark.parametrize("sketch", [None, 4096])
def test_labels_make_groups_step_by_step(way: str, sketch: int | None) -> None:
    said: list[list[dict[str, Any] | None]] = [
        [{"label": "math", "samples": 5}, {"label": "code", "samples": 2},
         {"label": "math", "samples": 1}, {"label": "Prosa, é", "samples": 4}],
        [{"label": "code", "samples": 5}, {"label": "code", "samples": 2},
         {"label": "math", "samples": 1}, {"label": "math", "samples": 3}],
    ]  # fmt: skip
    options = {"groups": "label", "sketch": sketch}
    found = values(way, 4, train, options, said)
    (first, second), records = found[0]
    assert all(torch.equal(one[0][k], found[0][0][k]) for one in found for k in range(2))
    groups = [[0, 2], [1], [3]]
    assert relative_error(first, grouped(rows(4), groups, [5, 2, 1, 4])) < 1e-5
    assert relative_error(second, grouped(rows(4, 1), [[2, 3], [0, 1]], [5, 2, 1, 3])) < 1e-5
    assert records[0].labels == records[1].labels == ("math", "code", "Prosa, é")
    assert records[1].weights[2] == 0  # absent
    assert records[1].active == (0, 1)
    assert records[0].samples.tolist() == [5, 2, 1, 4]
    assert records[0].losses is None


@pytest.mark.parametrize("scope", ["global", "bucket"])
@pytest.mark.parametrize("sketch", [None, 4096])
@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_the_mean_over_samples(scope: str, sketch: int | None, nonfinite: str) -> None:
    counts = [3.0, 1.0, 0.0]
    said: list[list[dict[str, Any] | None]] = [[{"samples": c} for c in counts]] * 2
    options = {"weighting": "mean", "scope": scope, "sketch": sketch, "nonfinite": nonfinite}
    (_, last), records = values("threads", 3, train, options, said, 2)[0]
    expected = (rows(3, 1)[:2] * torch.tensor([[0.75], [0.25]], dtype=torch.float64)).sum(0)
    assert relative_error(last, expected) < 1e-6
    np.testing.assert_allclose(np.atleast_2d(records[1].weights)[0], [0.75, 0.25, 0], atol=1e-12)


def test_samples_take_the_length_of_a_batch_out_of_the_weights() -> None:
    """Of groups of ranks, whose means are over their samples."""
    said: list[list[dict[str, Any] | None]] = [[{"samples": c} for c in (3, 1, 2, 2)]]
    (result, *_), _ = values("threads", 4, after_the_first, {"groups": 2}, said)[0]
    assert relative_error(result, grouped(rows(4), [[0, 1], [2, 3]], [3, 1, 2, 2])) < 1e-5


def after_the_first(wire: Wire, options: dict[str, Any], said: Any) -> Any:
    """The state says what it says before it is first used."""
    state = GrainState(**options)
    state.batch(**said[0][wire.rank])
    aggregation = Aggregation(state, wire)
    buffers = [gradient(wire.rank, b) for b in range(len(LENGTHS))]
    for buffer in buffers:
        aggregation.push(buffer)
    record = aggregation.finish()
    return [torch.cat(buffers)], [record]


def sharded(sketch: int | None, said: list[list[dict[str, Any]]]) -> list[float]:
    """What each owner gets of the aggregate, step by step: the errors."""
    wire = TorchWire(dist.group.WORLD)
    state, errors = GrainState(groups="label", sketch=sketch), []
    aggregation = ShardedAggregation(state, wire)
    labels: list[str] = []
    for number, ranks in enumerate(said):
        state.batch(**ranks[wire.rank])
        whole = torch.cat([gradient(wire.rank, b, number) for b in range(len(LENGTHS))])
        parts = whole.tensor_split(wire.size)
        aggregation.push([[part] for part in parts])
        record = aggregation.finish()
        labels += [one["label"] for one in ranks if one["label"] not in labels]
        groups = [[i for i, one in enumerate(ranks) if one["label"] == label] for label in labels]
        counts = [one["samples"] for one in ranks]
        best = grouped(rows(wire.size, number), list(filter(None, groups)), counts)
        errors.append(relative_error(parts[wire.rank], best.tensor_split(wire.size)[wire.rank]))
        assert record is not None
        assert record.labels == tuple(dict.fromkeys(labels))
    return errors


@pytest.mark.parametrize("sketch", [None, 4096])
def test_labels_where_gradients_are_sharded(sketch: int | None) -> None:
    said = [
        [
            {"label": label, "samples": samples}
            for label, samples in zip(step, (1, 2, 3), strict=True)
        ]
        for step in ("aba", "bca")
    ]
    assert max(max(errors) for errors in run(3, sharded, sketch, said)) < 1e-5


def test_micro_batches_with_labels() -> None:
    said: list[list[dict[str, Any] | None]] = [
        [{"label": "a", "loss": 1.5}, {"label": "b", "loss": torch.tensor(2.0)}],
        [{"label": "b", "loss": 3}, {"label": "b", "loss": float("nan")}],
    ]
    options = {"groups": "label", "microbatches": 2}
    (_, result), (_, record) = values("threads", 2, train, options, said)[0]
    one, two = rows(2), rows(2, 1)
    expected = min_norm_point(torch.stack([one[0], (one[1] + two[0] + two[1]) / 3]))
    assert relative_error(result, torch.from_numpy(expected)) < 1e-5
    assert record.labels == ("a", "b")
    np.testing.assert_array_equal(record.losses, [1.5, 3, 2, float("nan")])  # rank by rank


def test_losses_alone_change_nothing() -> None:
    said: list[list[dict[str, Any] | None]] = [[{"loss": 1.0}, {"loss": 2.0}]]
    (result,), (record,) = values("threads", 2, train, {}, said)[0]
    assert relative_error(result, torch.from_numpy(min_norm_weights(rows(2))) @ rows(2)) < 1e-5
    assert record.losses.tolist() == [1, 2]
    assert record.labels is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([[{"label": "a"}, None]], "what state.batch tells must be the same on every rank"),
        ([[{"label": "a"}, {"samples": 1}]], "what state.batch tells must be the same"),
        ([[{"label": "a"}] * 2, [{"label": "a"}, None]], r"on ranks \[1\] it was not called"),
    ],
    ids=str,
)
def test_a_rank_that_says_something_else_is_an_error_on_all(said: Any, expected: str) -> None:
    for outcome in play("threads", 2, train, {"groups": "label"}, said):
        assert outcome.error is not None
        assert "ValueError: grain_ddp: " in outcome.error
        assert re.search(expected, outcome.error)


def out_of_order(wire: Wire) -> tuple[Tensor, StepRecord | None]:
    """The state is in use before it is told of samples."""
    state = GrainState(groups=[[1], [2], [0]], weighting="mean")
    aggregation = Aggregation(state, wire)
    state.batch(samples=[5, 1, 2][wire.rank])
    buffer = gradient(wire.rank, 1)
    aggregation.push(buffer)
    return buffer, aggregation.finish()


def test_samples_belong_to_their_ranks_whatever_the_order_of_groups() -> None:
    result, record = values("threads", 3, out_of_order)[0]
    counts = torch.tensor([5, 1, 2], dtype=torch.float64) / 8
    every = torch.stack([gradient(rank, 1) for rank in range(3)]).double()
    assert relative_error(result, counts @ every) < 1e-6
    assert record.weights == pytest.approx([1 / 8, 2 / 8, 5 / 8])


@pytest.mark.parametrize("m", [1, 2])
def test_after_an_error_a_step_is_told_anew(m: int) -> None:
    """What was said of the step that failed does not count in the next one."""
    for result in values("threads", 2, after_an_error, m):
        assert result == [[1, 2][r] for r in range(2) for _ in range(m)]


def after_an_error(wire: Wire, m: int) -> list[float]:
    failed = False

    def weighting(gramian: Tensor) -> Tensor:
        nonlocal failed
        if not failed:
            failed = True
            raise RuntimeError("once")
        return torch.full((len(gramian),), 1 / len(gramian))

    state = GrainState(groups="label", microbatches=m, weighting=weighting)
    aggregation, record = Aggregation(state, wire), None
    for label in ("of the first step", "of the second step"):
        try:
            for _ in range(m):
                state.batch(label=label, samples=1 + wire.rank)
                aggregation.push(torch.ones(5))
                record = aggregation.finish()
        except RuntimeError:
            continue
    assert record is not None
    assert record.samples is not None
    return record.samples.tolist()


def too_late(wire: Wire) -> list[str]:
    """Samples are told when groups of two have been formed that average without them."""
    state, found = GrainState(groups=2), list[str]()
    aggregation = Aggregation(state, wire)
    for _ in range(2):
        state.batch(samples=1 + wire.rank)
        with pytest.raises(ValueError, match=r"state\.batch tells samples, but groups") as error:
            aggregation.push(torch.ones(5))
        found.append(str(error.value))
    return found


def test_samples_that_come_too_late_are_an_error_in_every_step() -> None:
    assert [len(found) for found in values("threads", 4, too_late)] == [2] * 4


def broken_off(wire: Wire) -> list[float]:
    """A step of two buckets whose second one never comes; its rank says what the next one is of."""
    state = GrainState(groups="label")
    aggregation = Aggregation(state, wire)
    state.batch(label="lost", samples=7)
    aggregation.push(torch.ones(5))
    state.batch(label="found", samples=1 + wire.rank)
    aggregation.abandon()
    aggregation.push(torch.ones(5))
    record = aggregation.finish()
    assert record is not None
    assert record.labels == ("found",)
    assert record.samples is not None
    return record.samples.tolist()


def test_what_was_said_of_a_step_that_broke_off_is_forgotten() -> None:
    assert values("threads", 2, broken_off) == [[1, 2], [1, 2]]


def reloaded(wire: Wire) -> list[tuple[str, ...] | None]:
    state, found = GrainState(groups="label"), list[tuple[str, ...] | None]()
    for labels, scope in (("ab", "global"), ("ba", "bucket")):
        state.load_state_dict({**state.state_dict(), "scope": scope})
        aggregation = Aggregation(state, wire)
        state.batch(label=labels[wire.rank])
        aggregation.push(torch.ones(5))
        record = aggregation.finish()
        assert record is not None
        found.append(record.labels)
    return found


def test_labels_keep_their_places_when_an_option_changes() -> None:
    assert values("threads", 2, reloaded)[0] == [("a", "b"), ("a", "b")]


def watched(wire: Wire) -> list[StepRecord]:
    """Two labels on four ranks; NaN on one of them in a step that is not recorded."""
    found: list[StepRecord] = []
    state = GrainState(
        groups="label", weighting="mean", guard="warn", record_every=2, on_step=found.append
    )
    aggregation = Aggregation(state, wire)
    for step in range(3):
        state.batch(label="ab"[wire.rank % 2])
        buffer = gradient(wire.rank, 1, step)
        if step == 1 and wire.rank == 1:
            buffer[0] = float("nan")
        aggregation.push(buffer)
        aggregation.finish()
    return found


def test_a_suspect_between_two_records_leaves_the_number_of_groups() -> None:
    """Else a report would begin anew with it."""
    found = values("threads", 4, watched)[0]
    assert [len(record.suspects) for record in found] == [0, 1, 0]
    assert [record.gramian.shape for record in found] == [(2, 2)] * 3


def suspected(wire: Wire) -> tuple[Tensor, StepRecord | None]:
    """Two labels that cancel to 1e-3 without rank 0's gradient, which is out of all proportion."""
    state = GrainState(groups="label", guard="drop")
    aggregation = Aggregation(state, wire)
    state.batch(label="ab"[wire.rank % 2], samples=2)
    buffer = opposed(wire.rank)
    if wire.rank == 0:
        buffer *= 1e6
    aggregation.push(buffer)
    return buffer, aggregation.finish()


def opposed(rank: int) -> Tensor:
    common = torch.randn(5000, generator=torch.Generator().manual_seed(9))
    own = torch.randn(5000, generator=torch.Generator().manual_seed(rank))
    return (common if rank % 2 else -common) + 1e-3 * own


def test_who_is_left_out_stays_out_where_the_gramian_is_made_anew() -> None:
    result, record = values("threads", 4, suspected)[0]
    every = torch.stack([opposed(rank) for rank in range(4)]).double()
    means = torch.stack([every[2], (every[1] + every[3]) / 2])
    assert [one.rank for one in record.suspects] == [0]
    assert relative_error(result, torch.from_numpy(min_norm_point(means))) < 1e-3
    assert record.samples.tolist() == [2, 2, 2, 2]


def test_nothing_is_left_of_a_gradient_over_no_samples() -> None:
    (result,), (record,) = values("threads", 1, train, {}, [[{"samples": 0}]], 0)[0]
    assert not result.any()
    assert record.weights == [0]


def test_the_mean_where_only_empty_batches_are_finite() -> None:
    said: list[list[dict[str, Any] | None]] = [[{"samples": 3}, {"samples": 0}]]
    options = {"weighting": "mean", "nonfinite": "drop"}
    (result,), (record,) = values("threads", 2, train, options, said, 0)[0]
    assert not result.any()
    assert record.weights.tolist() == [0, 0]


def cancelling(wire: Wire, groups: Any) -> StepRecord | None:
    """Ranks 0 and 1, of one group, cancel to rounding."""
    state = GrainState(groups=groups)
    if groups == "label":
        state.batch(label="aab"[wire.rank])
    buffer = torch.randn(100_000, generator=torch.Generator().manual_seed(wire.rank // 2))
    small = 1e-5 * torch.randn(100_000, generator=torch.Generator().manual_seed(7))
    buffer = small - buffer if wire.rank == 1 else small + buffer
    aggregation = Aggregation(state, wire)
    aggregation.push(buffer)
    return aggregation.finish()


@pytest.mark.parametrize("groups", ["label", [[0, 1], [2]]], ids=str)
def test_no_square_is_negative(groups: Any) -> None:
    """A log with one could not be read."""
    assert (values("threads", 3, cancelling, groups)[0].gramian.diagonal() >= 0).all()


def test_what_is_said_is_checked() -> None:
    state = GrainState()
    for wrong in (
        {"label": ""},
        {"label": "é" * 25},
        {"label": "\ud800"},
        {"label": "a\0"},
        {"label": 3},
        {"samples": -1},
        {"samples": True},
        {"samples": float("nan")},
        {"loss": "low"},
        {"loss": torch.ones(2)},
    ):
        with pytest.raises(ValueError, match=f"grain_ddp: .*{next(iter(wrong))}"):
            state.batch(**wrong)  # type: ignore[arg-type]
    state.batch(label="a", samples=1)
    state.batch(label="a", samples=2.5)  # the gradients of both add up
    with pytest.raises(ValueError, match="has one label, but its passes have 'a' and 'b'"):
        state.batch(label="b", samples=1)
    with pytest.raises(ValueError, match="it told label and samples, and now loss"):
        state.batch(loss=1)


def test_the_mean_of_labels_is_one_of_those_that_are_there() -> None:
    said: list[list[dict[str, Any] | None]] = [[{"label": one} for one in "abc"]]
    said += [[{"label": "a"}] * 3]
    options = {"groups": "label", "weighting": "mean"}
    _, records = values("threads", 3, train, options, said)[0]
    assert records[1].norm_mean == pytest.approx(records[1].norm_aggregate)
    assert records[0].norm_mean == pytest.approx(records[0].norm_aggregate)
    assert np.isnan(records[1].noise_scale)
    assert records[1].conflicts_mean == 0


def test_an_empty_batch_is_no_suspect() -> None:
    said: list[list[dict[str, Any] | None]] = [[{"samples": c} for c in (3, 2, 0)]] * 3
    options = {"weighting": "mean", "guard": "raise"}
    results, records = values("threads", 3, train, options, said, 2)[0]
    assert all(result.isfinite().all() for result in results)
    assert not any(record.suspects for record in records)


def test_krum_needs_more_groups_than_labels_may_be() -> None:
    with pytest.raises(ValueError, match="needs five groups in every step"):
        GrainState(groups="label", weighting="krum")


def nearly_opposed(wire: Wire) -> tuple[Tensor, StepRecord | None]:
    """Two rows of one label that all but cancel, and another one."""
    draw = torch.Generator().manual_seed(0)
    b, e, other = (torch.randn(20_000, generator=draw) for _ in range(3))
    rows = [b + 1e-5 * e, -b + 1e-5 * e, 3 * other]
    state = GrainState(groups="label")
    aggregation = Aggregation(state, wire)
    state.batch(label="ab"[wire.rank == 2])
    buffer = rows[wire.rank].clone()
    aggregation.push(buffer)
    return torch.stack([row.double() for row in rows]), aggregation.finish()


def test_rows_that_cancel_inside_of_a_group() -> None:
    every, record = values("threads", 3, nearly_opposed)[0]
    exact = torch.stack([every[:2].mean(0), every[2]])
    assert record.active == (0, 1)
    np.testing.assert_allclose(record.weights, min_norm_weights(exact), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(record.norms, exact.norm(dim=1), rtol=1e-3)
