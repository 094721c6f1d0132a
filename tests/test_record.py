"""What can be read off a Gramian, against the gradients themselves."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_ddp._math.record import StepRecord, named


def record_of(rows: np.ndarray, weights: np.ndarray) -> StepRecord:
    every = tuple(range(len(rows)))
    return StepRecord(0, rows @ rows.T, weights, 0.0, "", every, ())


def test_readings_are_those_of_the_gradients() -> None:
    rows = np.random.default_rng(0).normal(size=(4, 6))
    weights = np.array([0.7, 0.1, 0.1, 0.1])
    record = record_of(rows, weights)
    mean, aggregate = rows.mean(0), weights @ rows
    norms = np.linalg.norm(rows, axis=1)
    assert record.norm_mean == pytest.approx(np.linalg.norm(mean))
    assert record.norm_aggregate == pytest.approx(np.linalg.norm(aggregate))
    np.testing.assert_allclose(record.norms, norms)
    np.testing.assert_allclose(record.cosine, rows @ rows.T / np.outer(norms, norms))
    for i, row in enumerate(rows):
        others = rows.sum(0) - row
        expected = row @ others / np.linalg.norm(row) / np.linalg.norm(others)
        assert record.cosine_to_others[i] == pytest.approx(expected)
    assert record.conflicts_mean == (rows @ mean < 0).sum()
    assert record.conflicts_aggregate == (rows @ aggregate < 0).sum()
    assert record.conflicts_mean + record.conflicts_aggregate > 0  # so the above says something


def test_noise_scale_finds_the_planted_one() -> None:
    """g_i = G + noise with tr Σ = 1000 and ‖G‖² = 100: the estimate tends to 10."""
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(200):
        rows = 1.0 + np.sqrt(10) * rng.normal(size=(16, 100))
        estimates.append(record_of(rows, np.full(16, 1 / 16)).noise_scale)
    assert np.median(estimates) == pytest.approx(10, rel=0.05)


def test_noise_scale_at_its_limits() -> None:
    assert np.isnan(record_of(np.ones((1, 3)), np.ones(1)).noise_scale)
    assert record_of(np.array([[1.0], [-1.0]]), np.full(2, 0.5)).noise_scale == np.inf
    assert record_of(np.ones((3, 3)), np.full(3, 1 / 3)).noise_scale == 0


def test_buckets_add_up_to_the_whole_gradient() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=(3, 4)), rng.normal(size=(3, 5))]
    weights = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    record = StepRecord(
        0, np.stack([p @ p.T for p in parts]), weights, np.zeros(2), ("", ""), ((), ()), ((), ())
    )
    rows = np.concatenate(parts, axis=1)
    aggregate = np.concatenate([w @ p for w, p in zip(weights, parts, strict=True)])
    assert record.norm_mean == pytest.approx(np.linalg.norm(rows.mean(0)))
    assert record.norm_aggregate == pytest.approx(np.linalg.norm(aggregate))
    assert record.conflicts_aggregate == (rows @ aggregate < 0).sum()


@pytest.mark.filterwarnings("error")
def test_zero_and_non_finite_gradients_have_readings() -> None:
    zero = record_of(np.zeros((2, 3)), np.zeros(2))
    np.testing.assert_array_equal(zero.cosine, 0)
    assert zero.norm_aggregate == 0
    broken = record_of(np.array([[np.nan], [1.0]]), np.full(2, 0.5))
    assert np.isnan(broken.norm_aggregate)
    assert broken.conflicts_mean == 0
    infinite = StepRecord(0, np.full((2, 2), np.inf), np.full(2, 0.5), np.nan, "", (0, 1), ())
    assert infinite.norm_mean == np.inf
    assert infinite.cosine.shape == (2, 2)
    assert np.isnan(infinite.noise_scale) or infinite.noise_scale == np.inf


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record_of(np.ones((1, 1)), np.ones(1)).step = 3  # type: ignore[misc]


def test_a_zero_gradient_has_no_direction() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = record_of(rows, np.full(3, 1 / 3)).cosine_to_others
    np.testing.assert_allclose(found, [np.sqrt(0.5), 0, np.sqrt(0.5)])
    np.testing.assert_array_equal(record_of(rows[:1], np.ones(1)).cosine_to_others, [0])


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.integers(2, 6), st.integers(0, 10**6), st.data())
def test_readings_at_any_scale(n: int, seed: int, data: st.DataObject) -> None:
    """One row may be 1e30 times another, and all may have a factor in common."""
    rows = np.random.default_rng(seed).normal(size=(n, 2 * n))
    exponents = st.floats(-30, 30)
    scales = 10 ** np.array(data.draw(st.lists(exponents, min_size=n, max_size=n)))
    rows *= scales[:, None] * 10 ** data.draw(exponents)
    weights = np.random.default_rng(seed).dirichlet(np.ones(n))
    record = record_of(rows, weights)
    norms, whole = np.linalg.norm(rows, axis=1), weights @ rows
    np.testing.assert_allclose(record.norms, norms)
    assert record.norm_aggregate == pytest.approx(np.linalg.norm(whole), rel=1e-6, abs=0)
    assert record.norm_mean == pytest.approx(np.linalg.norm(rows.mean(0)), rel=1e-6, abs=0)
    np.testing.assert_allclose(record.cosine, rows @ rows.T / norms / norms[:, None], atol=1e-12)
    for i, row in enumerate(rows):
        others = np.delete(rows, i, 0).sum(0)
        expected = row / norms[i] @ (others / np.linalg.norm(others))
        assert record.cosine_to_others[i] == pytest.approx(expected, abs=1e-6)
    for found, direction in (
        (record.conflicts_mean, rows.mean(0)),
        (record.conflicts_aggregate, whole),
    ):
        cosines = rows @ direction / norms / np.linalg.norm(direction)
        assert (cosines < -1e-5).sum() <= found <= (cosines < 0).sum()


def test_groups_named_in_any_bucket() -> None:
    assert named(()) == named(((), ())) == set()
    assert named((0, 2)) == named(((2,), (0,), ())) == {0, 2}
