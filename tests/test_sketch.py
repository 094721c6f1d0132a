"""The sketched Gramian: what it keeps of a gradient, and what a step makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import min_norm_point
from ranks import relative_error
from torch import Tensor, nn
from ways import values

import grain_ddp._core.sketched as sketched_module
from grain_ddp import GrainState, StepRecord, min_norm
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.agreement import MARKS
from grain_ddp._math.sketch import Sketch, rescale
from grain_ddp._wire.wire import Wire

NAN, INF = float("nan"), float("inf")


def sketched(rows: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The Gramian of sketches of k numbers, the one scaled to the exact norms, and its error."""
    sketches = [Sketch(k, row, seed) for row in rows]
    for sketch, row in zip(sketches, rows, strict=True):
        sketch.add(row)
    sums = torch.stack([sketch.sums for sketch in sketches]).double()
    plain = sums @ sums.T
    return plain, *rescale(plain, torch.stack([sketch.square for sketch in sketches]))


def excess(rows: Tensor, k: int) -> tuple[float, float]:
    """By how much ‖d‖² exceeds the optimum, and the smallest ⟨d, gᵢ⟩, both over ‖d‖²."""
    wide = rows.double()
    d = torch.from_numpy(min_norm(sketched(rows, k)[1].numpy()).weights) @ wide
    best = float(torch.tensor(min_norm((wide @ wide.T).numpy()).norm_squared))
    return float(d @ d) / best - 1, float((wide @ d).min() / (d @ d))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_and_dtypes(data: st.DataObject) -> None:
    """What is added in parts is the same sketch, and its norm is exact."""
    k, length = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 300))
    seed = data.draw(st.integers(0, 2**31))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    row = torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    whole, parts = Sketch(k, row, seed), Sketch(k, row, seed)
    whole.add(row)
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        parts.add(row[start:stop])
    torch.testing.assert_close(parts.values, whole.values)
    assert parts.count == whole.count == length
    torch.testing.assert_close(parts.square, row.double().square().sum(), rtol=1e-6, atol=0)
    if length <= k:  # nothing is lost: the numbers themselves, with signs
        assert whole.exact
        torch.testing.assert_close(whole.sums.abs(), row.abs().to(whole.sums.dtype))


@pytest.mark.parametrize("width", [1, 64, 1000, 1024])
def test_errors_are_those_of_k_random_sums(width: int) -> None:
    """Also where a few columns of a matrix hold 90 % of the energy, and its width divides k."""
    k, rows = 1024, torch.randn(2, 64, 1024)
    if width > 1:
        rows = torch.randn(2, 64 * 1024 // width, width)
        rows[:, :, :3] *= (3 * (width - 3) / 3) ** 0.5 * 1.7
    flat = rows.flatten(1)
    exact = flat.double() @ flat.double().T
    scale = exact.diagonal().sqrt().outer(exact.diagonal().sqrt())
    errors = torch.stack([((sketched(flat, k, s)[0] - exact) / scale) for s in range(60)])
    assert errors.mean(0).abs().max() < 5 * (2 / k / 60) ** 0.5  # on average, none
    assert errors.square().mean(0).sqrt().max() < 1.5 * (2 / k) ** 0.5


def test_the_error_that_is_told() -> None:
    """That of the squared norms is about that of the inner products."""
    k, rows = 500, torch.randn(16, 50_000)
    exact = rows.double() @ rows.double().T
    _, scaled, error = sketched(rows, k)
    assert 0.5 * (2 / k) ** 0.5 < error < 2 * (2 / k) ** 0.5
    torch.testing.assert_close(scaled.diagonal(), exact.diagonal(), rtol=1e-6, atol=0)
    off = (scaled - exact) / exact.diagonal().mean()
    assert off.square().mean().sqrt() < 2 * error


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e15, 1e30])
def test_scales(scale: float) -> None:
    """A common factor, and one of a row, do not matter."""
    rows = torch.randn(4, 5000) + 0.3
    factors = torch.tensor([[scale], [1.0], [1.0], [1.0]])
    expected = sketched(rows, 700)[1] * factors.double() * factors.double().T
    found = sketched(rows * factors, 700)[1]
    norms = expected.diagonal().sqrt()
    assert ((found - expected).abs() <= 1e-5 * norms.outer(norms)).all()


def test_what_is_not_finite_or_zero() -> None:
    rows = torch.randn(4, 300)
    rows[1, 7], rows[2] = NAN, 0
    found = sketched(rows, 50)[1]
    assert not found[1].isfinite().any()
    assert (found[2, [0, 2, 3]] == 0).all()
    assert found[[0, 0, 3, 3], [0, 3, 0, 3]].isfinite().all()
    rows[1, 7] = INF
    assert not sketched(rows, 50)[1][1, 1].isfinite()


class Attention(nn.Module):
    def __init__(self, width: int, vocabulary: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.embedding(x)))
        return out


def test_real_gradients() -> None:
    """A small transformer on its own source: 2 million parameters, eight groups."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(__file__).read_bytes())) % 128
    model = Attention(192, 128, 5)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    rows = []
    for step in range(28):
        starts = torch.randint(0, len(text) - 33, (4,))
        batch = torch.stack([text[s : s + 33] for s in starts])
        model.zero_grad()
        out = model(batch[:, :-1])
        nn.functional.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten()).backward()
        if step < 20:
            optimizer.step()
        else:
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    gradients = torch.stack(rows)
    assert gradients.shape[1] > 2_000_000
    more, least = excess(gradients, 1 << 20)
    assert 0 <= more < 1e-5
    assert least > 0.995
    more, _ = excess(gradients, 1 << 13)  # it is a sketch
    assert more > 1e-6


# A step.

LENGTHS = [1, 3, 1000, 5003, 7]


def gradient(rank: int, bucket: int, length: int) -> Tensor:
    common = torch.randn(length, generator=torch.Generator().manual_seed(bucket))
    own = torch.randn(length, generator=torch.Generator().manual_seed(100 + 10 * bucket + rank))
    return 0.3 * common + own


def step(
    wire: Wire, options: dict[str, Any], broken: int | None = None, steps: int = 2
) -> tuple[Tensor, StepRecord | None, int]:
    """The result of the last step, its record, and how many bytes the exchanges sent in it."""
    sent, exchange = 0, type(wire).exchange

    def counting(wire: Wire, send: Any, receive: Any, *what: Any) -> Any:
        nonlocal sent
        sent += sum(t.nbytes for j, t in enumerate(send) if j != wire.rank)
        return exchange(wire, send, receive, *what)

    wire.__class__ = type("Counting", (type(wire),), {"exchange": counting})
    aggregation = Aggregation(GrainState(**options), wire)
    buffers: list[Tensor] = []
    record: StepRecord | None = None
    for _ in range(steps):
        buffers = [gradient(wire.rank, b, length) for b, length in enumerate(LENGTHS)]
        if wire.rank == broken:
            buffers[2][5] = NAN
        sent = 0
        for buffer in buffers:
            aggregation.push(buffer)
        record = aggregation.finish()
    return torch.cat(buffers), record, sent


def rows(n: int) -> Tensor:
    every = [[gradient(r, b, length) for b, length in enumerate(LENGTHS)] for r in range(n)]
    return torch.stack([torch.cat(buckets) for buckets in every]).double()


@pytest.mark.parametrize("way", ["threads", "network"])
@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_a_step_conflicts_with_nobody_but_for_the_error(way: str, scope: str) -> None:
    every = values(way, 3, step, {"sketch": 600, "scope": scope})
    result, record, _ = every[0]
    assert all(torch.equal(other, result) for other, _, _ in every)
    assert 0 < record.sketch_error < 0.3
    products = rows(3) @ result.double()
    assert (products > 0).all()
    if scope == "global":
        best = torch.from_numpy(min_norm_point(rows(3)))
        assert relative_error(result, best) < 0.2
        assert relative_error(result, torch.from_numpy(record.weights) @ rows(3)) < 1e-6


def test_options_with_a_sketch() -> None:
    """What has other weights, or none, does as without a sketch."""
    for options, broken in (
        ({"weighting": "inverse_norm"}, None),
        ({"weighting": "upgrad", "scope": "bucket"}, None),
        ({"cap": 1.5, "normalize": True}, None),
        ({"nonfinite": "drop"}, 1),
        ({"nonfinite": "propagate"}, 1),
        ({"warmup_steps": 2}, None),
        ({"weighting": "mean", "record_every": 2, "scope": "bucket"}, None),
    ):
        plain = values("threads", 3, step, options, broken)[0]
        found = values("threads", 3, step, {**options, "sketch": 2**13}, broken)[0]
        torch.testing.assert_close(found[0], plain[0], rtol=1e-5, atol=1e-6, equal_nan=True)
        assert (found[1] is None) == (plain[1] is None)
        if found[1] is not None and plain[1] is not None:
            assert found[1].status == plain[1].status
            assert found[1].dropped == plain[1].dropped
            assert plain[1].sketch_error is None


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_the_mean_of_groups_of_other_sizes_is_that_of_all_ranks(nonfinite: str) -> None:
    options = {"weighting": "mean", "groups": [[1], [0, 2]], "nonfinite": nonfinite}
    result, record, _ = values("threads", 3, step, options)[0]
    assert relative_error(result, rows(3).mean(0)) < 1e-6
    assert record.weights == pytest.approx([1 / 3, 2 / 3])


def guarded(wire: Wire) -> Tensor:
    """With so little memory that a rank waits for others to read what it sent."""
    options = {"sketch": 2**15, "scope": "bucket", "groups": 2, "guard": "drop"}
    aggregation = Aggregation(GrainState(**options), wire)
    buffers = [gradient(wire.rank, b, n) for b, n in enumerate([1, 30001, 1, 1, 9001])]
    before = sketched_module.SCRATCH_BYTES
    sketched_module.SCRATCH_BYTES = 100
    try:
        for buffer in buffers:
            aggregation.push(buffer)
        aggregation.finish()
    finally:
        sketched_module.SCRATCH_BYTES = before
    return torch.cat(buffers)


def test_the_guard_waits_for_nobody_who_waits_for_memory() -> None:
    """One rank of a group may have no column of a bucket, and so go ahead of the other."""
    found = values("memory", 4, guarded)
    assert all(torch.equal(one, found[0]) for one in found)
    assert found[0].isfinite().all()


def test_only_the_sketch_is_exchanged() -> None:
    """In bfloat16; the gradients go through the backend's own sum."""
    k, n = 600, 3
    _, _, sent = values("threads", n, step, {"sketch": k})[0]
    gramian = (n - 1) * 8 * (n * (n + 1) // 2 + n + MARKS)  # the norms too
    assert sent - gramian <= (n - 1) * (2 * k // n + 16)


def watched(wire: Wire, many: int) -> tuple[Tensor, StepRecord | None, int]:
    sketched_module.MANY, sketched_module.WATCHING = many, 1500  # in this rank's process
    return step(wire, {"weighting": "mean"}, steps=3)


def test_watching_takes_a_sketch() -> None:
    """Of many numbers, where ranks do not read each other's memory; training is as without."""
    before = sketched_module.MANY, sketched_module.WATCHING
    try:
        for way, many, taken in (
            ("threads", 6014, True),
            ("threads", 6015, False),
            ("network", 6014, True),
            ("memory", 6014, False),
        ):
            result, record, _ = values(way, 3, watched, many)[0]
            assert relative_error(result, rows(3).mean(0)) < 1e-6
            assert record.step == 2
            assert (record.sketch_error is not None) == taken, (way, many)
            exact = (rows(3) @ rows(3).T).numpy()
            assert abs(record.gramian - exact).max() < (0.3 if taken else 1e-6) * exact.max()
    finally:
        sketched_module.MANY, sketched_module.WATCHING = before


@pytest.mark.parametrize("other", [{"microbatches": 2}, {"wire_dtype": torch.bfloat16}], ids=str)
def test_what_does_not_go_with_a_sketch(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"sketch does not go with {next(iter(other))}"):
        GrainState(sketch=100, **other)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "all"])
def test_sizes_that_are_none(k: Any) -> None:
    with pytest.raises(ValueError, match="sketch must be None or an int"):
        GrainState(sketch=k)
