"""UPGrad, min-norm of unit rows and Krum against independent solvers and their own conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracle import min_norm_weights
from scipy.optimize import minimize, nnls

from grain_ddp._math.rules import krum, normalized_min_norm, upgrad

Rows = NDArray[np.float64]


def rows_of(kind: str, n: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng([seed, n])
    J = rng.normal(size=(n, 3 * n + 2))
    match kind:
        case "flat":  # more groups than dimensions: the Gramian is singular
            return J[:, : max(n // 3, 1)]
        case "wide scales":
            return J * 10.0 ** rng.uniform(-30, 30, size=(n, 1))
        case "equal":
            J[n // 2 :] = J[: n - n // 2]
        case "opposite":
            J[n // 2 :] = -J[: n - n // 2]
        case "one against all":
            J += 1
            J[0] = -J.sum(0)
    return J


KINDS = ["random", "flat", "wide scales", "equal", "opposite", "one against all"]
SIZES = [1, 2, 3, 4, 5, 8, 17, 64]


def projected(J: Rows, i: int) -> Rows:
    """Row i on the dual cone of all rows, by nonnegative least squares on the rows themselves."""
    units = J / np.linalg.norm(J, axis=1, keepdims=True)
    z, _ = nnls(units.T, -units[i], maxiter=100 * len(J))
    return np.asarray((units[i] + z @ units) * np.linalg.norm(J[i]))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_upgrad_is_the_mean_of_the_projected_rows(kind: str, n: int) -> None:
    J = rows_of(kind, n)
    w = upgrad(J @ J.T)
    expected = np.mean([projected(J, i) for i in range(n)], axis=0)
    scale = np.linalg.norm(J, axis=1)
    assert np.linalg.norm(w @ J - expected) <= 1e-10 * scale.max()
    assert w.min() >= 1 / n
    # It opposes no group, and no sum of nonnegative multiples of rows was added in vain.
    assert (J @ (w @ J) / scale).min() >= -1e-10 * scale.max()


@pytest.mark.parametrize("n", [2, 3, 8, 64])
@pytest.mark.parametrize("kind", ["random", "one against all"])
def test_upgrad_equals_torchjd(kind: str, n: int) -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    linalg = pytest.importorskip("torchjd._linalg")
    # What it adds to the diagonal by default moves its weights by about 1e-4.
    exact = linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)
    J = rows_of(kind, n)
    theirs = torchjd.UPGradWeighting(projector=exact)(torch.from_numpy(J @ J.T)).numpy()
    np.testing.assert_allclose(upgrad(J @ J.T), theirs, rtol=1e-6)


def test_upgrad_without_conflict_is_the_mean() -> None:
    J = np.abs(rows_of("random", 8))
    assert (upgrad(J @ J.T) == 1 / 8).all()


@pytest.mark.parametrize("n", [4, 33])
def test_upgrad_does_not_depend_on_scale(n: int) -> None:
    J = rows_of("random", n)
    w = upgrad(J @ J.T)
    np.testing.assert_allclose(upgrad(1e-60 * (J @ J.T)), w, rtol=1e-9)
    np.testing.assert_allclose(upgrad(1e200 * (J @ J.T)), w, rtol=1e-9)


def test_upgrad_of_opposite_and_of_equal_rows() -> None:
    np.testing.assert_allclose(upgrad(np.array([[1.0, -1.0], [-1.0, 1.0]])), [1, 1], rtol=1e-9)
    w = upgrad(rows_of("equal", 8) @ rows_of("equal", 8).T)
    np.testing.assert_allclose(w[:4], w[4:], rtol=1e-3)


def test_upgrad_of_a_gramian_rounded_to_bf16() -> None:
    J = rows_of("flat", 12)
    G = J @ J.T
    rounded = torch.from_numpy(G).bfloat16().double().numpy()
    assert np.linalg.eigvalsh(rounded)[0] < 0
    w = upgrad((rounded + rounded.T) / 2)
    assert np.isfinite(w).all()
    scale = np.linalg.norm(J, axis=1)
    assert (G @ w / scale).min() >= -0.05 * scale.max()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_normalized(kind: str, n: int) -> None:
    J = rows_of(kind, n)
    units = J / np.linalg.norm(J, axis=1, keepdims=True)
    expected = min_norm_weights(units) @ units
    w, solution = normalized_min_norm(J @ J.T)
    assert w.sum() == pytest.approx(1)
    z = w * np.linalg.norm(J, axis=1)
    z /= z.sum()
    np.testing.assert_allclose(z @ units, expected, atol=1e-6)
    assert solution.gap <= 1e-10


@pytest.mark.parametrize("cap", [1, 1.2, 1.5, 1.999, 2, 3, 100])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_normalized_within_a_ball(n: int, cap: float) -> None:
    J = rows_of("random", n, seed=1)
    units = J / np.linalg.norm(J, axis=1, keepdims=True)
    C = units @ units.T
    w, _ = normalized_min_norm(J @ J.T, cap)
    z = w * np.linalg.norm(J, axis=1)
    z /= z.sum()
    low, high = max((2 - cap) / n, 0.0), min(cap / n, 1.0)
    assert z.min() >= low - 1e-12
    assert z.max() <= high + 1e-12
    found = minimize(
        lambda v: v @ C @ v / 2,
        np.full(n, 1 / n),
        jac=lambda v: C @ v,
        bounds=[(low, high)] * n,
        constraints={"type": "eq", "fun": lambda v: v.sum() - 1, "jac": lambda v: np.ones(n)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert z @ C @ z <= found.x @ C @ found.x + 1e-9
    if cap == 1:
        np.testing.assert_allclose(z, 1 / n)


def test_krum_leaves_out_the_broken() -> None:
    rng = np.random.default_rng(0)
    for f, n in ((1, 5), (1, 8), (2, 7), (3, 64)):
        J = 1 + 0.1 * rng.normal(size=(n, 20))
        J[:f] *= -5
        w = krum(J @ J.T, f)
        distances = ((J[:, None] - J) ** 2).sum(2)
        scores = [np.sort(np.delete(row, i))[: n - f - 2].sum() for i, row in enumerate(distances)]
        assert w.argmax() == np.argmin(scores) >= f
        assert w.sum() == w.max() == 1
        several = krum(J @ J.T, f, n - f)
        assert (several[:f] == 0).all()
        np.testing.assert_allclose(several[f:], 1 / (n - f))


def test_krum_of_few_has_the_nearest_pair() -> None:
    J = np.array([[9.0], [1.0], [1.5]])
    assert krum(J @ J.T)[0] == 0
    for n in (1, 2):
        assert sorted(krum(J[:n] @ J[:n].T)) == [0, 1][-n:]
