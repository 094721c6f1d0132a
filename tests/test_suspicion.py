"""Who stands out: what was planted is found, in the right row and tensor, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from grain_ddp._math.suspicion import History, minority

TENSORS = 12


def steps(
    rows: int, count: int, seed: int = 0, noise: float = 0.15
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Peaks and norms of sound steps: hard batches, tensors of their own size, power laws."""
    rng = np.random.default_rng(seed)
    size = np.exp(3 * rng.normal(size=TENSORS))
    for step in range(count):
        hard = 0.2 * rng.normal(size=(rows, 1))
        norms = hard + noise * rng.laplace(size=(rows, TENSORS))
        peaks = norms - 2 + noise * rng.exponential(size=(rows, TENSORS))
        scale = size * (1 + 0.5 * np.sin(step / 30))
        yield scale * np.exp(peaks), scale * np.exp(norms)


def settled(rows: int, seed: int = 0, count: int = 150) -> History:
    history = History(rows, TENSORS)
    for peaks, norms in steps(rows, count, seed):
        assert history.look(peaks, norms) == []
    return history


def one_more(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    return next(steps(rows, 1, seed))


def like(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A step as those of `settled`."""
    every = list(steps(rows, 151))
    return every[-1]


def told(found: list[Any]) -> list[tuple[int, str, int | None]]:
    return [(one.row, one.kind, one.tensor) for one in found]


@pytest.mark.parametrize("rows", [2, 4, 8, 32])
def test_sound_steps_raise_no_alarm(rows: int) -> None:
    history, alarms = History(rows, TENSORS), 0
    for peaks, norms in steps(rows, 4000 if rows < 32 else 1000, seed=3):
        alarms += len(history.look(peaks, norms))
    assert alarms <= 1


@pytest.mark.parametrize("rows", [2, 3, 4, 8, 33])
def test_a_large_entry_is_found_in_its_row_and_tensor(rows: int) -> None:
    history = settled(rows)
    peaks, norms = like(rows)
    peaks[rows - 1, 5] *= 300
    norms[rows - 1, 5] = np.hypot(norms[rows - 1, 5], peaks[rows - 1, 5])
    (one,) = history.look(peaks, norms)
    assert (one.row, one.kind, one.tensor) == (rows - 1, "peak", 5)
    assert one.score > history.threshold


def test_the_scale_of_all_tensors_is_of_the_norm() -> None:
    history = settled(8)
    peaks, norms = like(8)
    peaks[3] *= 1e3
    norms[3] *= 1e3
    assert [one.row for one in history.look(peaks, norms)] == [3]


def test_a_spike_of_all_ranks_is_no_fault() -> None:
    history = settled(8)
    for peaks, norms in steps(8, 20, noise=0.5):
        assert history.look(1e4 * peaks, 1e4 * norms) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named_from_the_first_step(value: float) -> None:
    history = History(4, TENSORS)
    peaks, norms = one_more(4)
    peaks[1, 4:] = norms[1, 4:] = value
    assert told(history.look(peaks, norms)) == [(1, "nonfinite", 4)]


def test_what_is_not_finite_on_most_rows_is_nobodys_fault() -> None:
    history = History(4, TENSORS)
    peaks, norms = one_more(4)
    peaks[:3] = norms[:3] = np.inf
    assert history.look(peaks, norms) == []


def test_a_norm_whose_square_overflowed_is_a_large_one() -> None:
    history = settled(4)
    peaks, norms = like(4)
    peaks[2, 0], norms[2, 0] = 1e30, np.inf
    assert told(history.look(peaks, norms)) == [(2, "peak", 0)]


def test_zero_and_stale_gradients_are_named() -> None:
    history = settled(4)
    peaks, norms = like(4)
    peaks[2, 7] = norms[2, 7] = 0
    peaks[1] = norms[1] = 0
    assert told(history.look(peaks, norms)) == [(1, "zero", None), (2, "zero", 7)]
    again, lengths = one_more(4, seed=5)
    again[3], lengths[3] = peaks[3], norms[3]
    assert (3, "stale", None) in told(history.look(again, lengths))


def test_a_rank_without_data_is_named_once() -> None:
    history = settled(4)
    for k, (peaks, norms) in enumerate(steps(4, 30)):
        peaks[1] = norms[1] = 0
        found = history.look(peaks, norms)
        assert told(found) == ([(1, "zero", None)] if k == 0 else [])


@pytest.mark.parametrize(("factor", "tensor"), [(1.1, 3), (0.9, 3), (1.25, None)])
def test_small_deviations_that_stay_are_named(factor: float, tensor: int | None) -> None:
    history, found = settled(8), []
    for peaks, norms in steps(8, 700, seed=7):
        part = slice(None) if tensor is None else tensor
        peaks[5, part] *= factor
        norms[5, part] *= factor
        found += history.look(peaks, norms)
    assert {one.row for one in found} == {5}
    assert (found[0].kind, found[0].tensor) == ("norm", tensor)


def test_ranks_whose_data_differ_are_no_suspects() -> None:
    history = History(8, TENSORS)
    rng = np.random.default_rng(0)
    own = np.exp(0.1 * rng.normal(size=(8, TENSORS)))
    for peaks, norms in steps(8, 1000):
        assert history.look(own * peaks, own * norms) == []


def test_every_rank_decides_alike() -> None:
    first, second = settled(4), settled(4)
    peaks, norms = like(4)
    peaks[1, 2] *= 40
    assert first.look(peaks, norms) == second.look(peaks.copy(), norms.copy())


def test_the_minority_is_wrong() -> None:
    digests = np.ones((4, 3), dtype=np.int64)
    every = np.ones(3, dtype=bool)
    assert minority(digests, every) == []
    digests[2, 1:] = 7
    assert told(minority(digests, every)) == [(2, "replica", 1)]
    assert minority(digests, np.array([True, False, False])) == []
    digests[3, 1:] = 7  # two against two: nobody knows
    assert [one.row for one in minority(digests, every)] == [0, 1, 2, 3]
