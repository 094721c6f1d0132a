"""The solver, judged by the optimality conditions and by two independent QP solvers."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from fractions import Fraction

import daqp
import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_ddp._math.solver import Solution, min_norm
from grain_ddp._math.status import Status

Array = np.ndarray
EPS = np.finfo(float).eps


@pytest.fixture(autouse=True)
def _strict():
    """One thread, and no warning may escape."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_num_threads(threads)


def gradients(kind: str, n: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    match kind:
        case "full rank":
            return rng.standard_normal((n, 2 * n))
        case "rank n/2":
            return rng.standard_normal((n, max(n // 2, 1)))
        case "rank 2":
            return rng.standard_normal((n, 2)) + 0.5
        case "correlated":
            return rng.standard_normal(2 * n) + 0.3 * rng.standard_normal((n, 2 * n))
        case "tight":
            return rng.standard_normal(2 * n) + 1e-3 * rng.standard_normal((n, 2 * n))
        case "0 in hull":
            A = rng.standard_normal((n, n))
            A[0] = -A[1:].sum(0)
            return A
        case "spread norms":
            return rng.standard_normal((n, 2 * n)) * rng.lognormal(0, 3, (n, 1))
        case "scales 1e-30 to 1e15":
            return rng.standard_normal((n, 2 * n)) * np.logspace(-15, 7.5, n)[:, None]
    raise AssertionError(kind)


KINDS = [
    "full rank",
    "rank n/2",
    "rank 2",
    "correlated",
    "tight",
    "0 in hull",
    "spread norms",
    "scales 1e-30 to 1e15",
]
CAPS = [None, 1, 1.01, 1.5, 2, 4.5]


def gramian(kind: str, n: int, seed: int = 0) -> Array:
    A = gradients(kind, n, seed)
    return A @ A.T


def bound(n: int, cap: float | None) -> float:
    return min(cap / n, 1.0) if cap is not None else 1.0


def own_gap(G: Array, w: Array, cap: float | None) -> float:
    """wᵀGw − min ⟨Gw, v⟩ over the (capped) simplex; 0 exactly at the optimum."""
    slope, room, least = G @ w, 1.0, 0.0
    for value in np.sort(slope):
        share = min(bound(len(w), cap), room)
        least, room = least + share * value, room - share
    return float(w @ slope - least)


def check(G: Array, cap: float | None = None, tolerance: float = 1e-12) -> Solution[Array]:
    """On the simplex, below the cap, optimal, complementary; and the record tells the truth."""
    n = len(G)
    solution = min_norm(G, cap=cap)
    w, mean = solution.weights, float((np.diagonal(G) / n).sum())
    assert w.shape == (n,)
    assert w.dtype == np.float64
    assert w.min() >= 0
    assert w.max() <= bound(n, cap) * (1 + 4 * EPS)
    assert abs(w.sum() - 1) <= 4 * EPS
    assert own_gap(G, w, cap) <= tolerance * mean
    slope = G @ w
    assert solution.norm_squared == pytest.approx(w @ slope, rel=1e-12, abs=1e-15 * mean)
    assert solution.gap == pytest.approx(
        max(w @ slope - slope.min(), 0), rel=1e-12, abs=1e-15 * mean
    )
    # Complementary slackness: what has weight and room is level, what has none lies above.
    weighty = (w > 1e-6 / n) & (w < bound(n, cap) * (1 - 1e-6))
    if weighty.any():
        level, near = slope[weighty].min(), 1e-5 * n * mean * max(tolerance / 1e-12, 1)
        assert np.abs(slope[weighty] - level).max() <= near
        assert (slope[w == 0] >= level - near).all()
    assert solution.iterations >= 1
    assert solution.status is not Status.STALLED
    return solution


def by_daqp(G: Array, cap: float | None) -> Array:
    n = len(G)
    blower = np.r_[np.zeros(n), 1.0]
    bupper = np.r_[np.full(n, bound(n, cap)), 1.0]
    sense = np.r_[np.zeros(n, np.int32), np.array([5], np.int32)].astype(np.int32)
    x, _, flag, _ = daqp.solve(
        np.ascontiguousarray(G), np.zeros(n), np.ones((1, n)), bupper, blower, sense
    )
    assert flag > 0
    return np.asarray(x)


def by_quadprog(G: Array, cap: float | None) -> Array:
    n = len(G)
    constraints = np.c_[np.ones(n), np.eye(n), -np.eye(n)]
    limits = np.r_[1.0, np.zeros(n), np.full(n, -bound(n, cap))]
    return quadprog.solve_qp(G + 1e-11 * np.trace(G) / n * np.eye(n), np.zeros(n), constraints,
                             limits, 1)[0]  # fmt: skip


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_optimal(kind: str, n: int, cap: float | None) -> None:
    for seed in range(4):
        check(gramian(kind, n, seed), cap)


@pytest.mark.parametrize(
    ("kind", "n", "cap"),
    [("rank n/2", 64, None), ("rank n/2", 64, 2), ("rank 2", 64, 2), ("tight", 64, 1.2),
     ("tight", 64, 2), ("scales 1e-30 to 1e15", 16, 2)],
)  # fmt: skip
def test_optimal_where_pivoting_cycles(kind: str, n: int, cap: float | None) -> None:
    found = [check(gramian(kind, n, seed), cap) for seed in range(12)]
    assert max(f.iterations for f in found) > 20  # the interior point method had to help


@pytest.mark.parametrize("cap", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_optimal_when_large(kind: str, cap: float | None) -> None:
    check(gramian(kind, 256), cap)


@pytest.mark.parametrize("cap", [None, 1.5, 3])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "scales 1e-30 to 1e15"])
def test_norm_equals_that_of_other_solvers(kind: str, cap: float | None) -> None:
    for n, seed in ((2, 0), (5, 1), (8, 2), (24, 3)):
        G = gramian(kind, n, seed)
        found, mean = check(G, cap).norm_squared, np.trace(G) / n
        for other in (by_daqp, by_quadprog):
            w = np.maximum(other(G, cap), 0)
            w /= w.sum()
            assert found == pytest.approx(w @ G @ w, rel=1e-6, abs=1e-9 * mean)
            assert found <= w @ G @ w + 1e-9 * mean


@pytest.mark.parametrize("kind", ["full rank", "correlated"])
@pytest.mark.parametrize("cap", [None, 2])
def test_weights_equal_those_of_another_solver(kind: str, cap: float | None) -> None:
    for seed in range(5):
        G = gramian(kind, 8, seed)
        np.testing.assert_allclose(min_norm(G, cap=cap).weights, by_daqp(G, cap), atol=1e-6)


@pytest.mark.parametrize("cap", CAPS[1:])
def test_cap_zero_row(cap: float) -> None:
    check(np.diag([1.0, 0, 2, 0]), cap)


def test_named_matrices() -> None:
    def weights(G: list[list[float]]) -> list[float]:
        return check(np.array(G, dtype=float)).weights.tolist()

    assert weights([[4]]) == [1]
    assert weights([[1, 0], [0, 3]]) == pytest.approx([0.75, 0.25], abs=1e-15)
    assert weights([[1, 2], [2, 9]]) == [1, 0]  # the shorter one is the nearest point
    assert weights([[1, -1], [-1, 1]]) == [0.5, 0.5]
    assert weights([[1, -2], [-2, 4]]) == pytest.approx([2 / 3, 1 / 3], abs=1e-15)
    assert weights([[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1]]) == pytest.approx([0.25, 0.25, 0.5])
    assert weights([[0, 0, 0], [0, 1, 0], [0, 0, 0]]) == pytest.approx([0.5, 0, 0.5], abs=1e-15)
    two_pairs = np.kron(np.eye(2), [[1.0, -1], [-1, 1]])
    assert check(two_pairs).weights == pytest.approx(np.full(4, 0.25), abs=1e-15)


def test_identical_gradients_get_exactly_uniform_weights() -> None:
    for n in (1, 2, 7, 30):
        for cap in (None, 1, 1.5):
            found = min_norm(np.full((n, n), 0.1), cap=cap)
            assert (found.weights == found.weights[0]).all()
            assert found.weights[0] == pytest.approx(1 / n, rel=4 * EPS)


def test_equal_rows_share_their_weight_evenly() -> None:
    A = gradients("full rank", 6, 0)[[0, 1, 2, 0, 3, 4, 0, 4]]
    for cap in (None, 1.5):
        w = check(A @ A.T, cap).weights
        assert w[0] == w[3] == w[6]
        assert w[5] == w[7]


def test_cap_of_one_is_uniform_and_a_large_one_is_none() -> None:
    for kind in KINDS:
        G = gramian(kind, 9)
        np.testing.assert_allclose(min_norm(G, cap=1).weights, 1 / 9, rtol=4 * EPS)
        for cap in (9, 100, np.inf):
            assert (min_norm(G, cap=cap).weights == min_norm(G).weights).all()


def test_cap_is_a_dial() -> None:
    G = gramian("spread norms", 16)
    found = [check(G, cap) for cap in (1, 1.2, 1.5, 2, 4, 16)]
    norms, gaps = [f.norm_squared for f in found], [f.gap for f in found]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 2 * norms[-1]
    assert gaps[0] > 1e-3 > 1e-12 > gaps[-1] / G.max()
    assert found[0].status is Status.CAPPED
    assert found[-1].status is Status.OPTIMAL


def test_diagonal_from_1e_30_to_1e15_to_high_precision() -> None:
    """On a diagonal Gramian w_i ∝ 1/G_ii; elsewhere, rational elimination on the support."""
    d = np.logspace(-30, 15, 10)
    np.testing.assert_allclose(check(np.diag(d)).weights, (1 / d) / (1 / d).sum(), rtol=1e-13)
    for seed in range(3):
        G = gramian("scales 1e-30 to 1e15", 6, seed)
        w = check(G).weights
        exact = np.array(exactly(G, [i for i in range(6) if w[i] > 0]), float)
        assert exact.min() >= 0
        np.testing.assert_allclose(w, exact, atol=1e-13)


def exactly(G: Array, support: list[int]) -> list[Fraction]:
    """Rational solution of G_SS x = 1, scaled to sum 1; zero elsewhere."""
    rows = [[Fraction(float(G[i, j])) for j in support] + [Fraction(1)] for i in support]
    for k in range(len(rows)):
        rows[k] = [value / rows[k][k] for value in rows[k]]
        for i in range(len(rows)):
            if i != k:
                rows[i] = [a - rows[i][k] * b for a, b in zip(rows[i], rows[k], strict=True)]
    total = sum(row[-1] for row in rows)
    solution = [Fraction(0)] * len(G)
    for i, row in zip(support, rows, strict=True):
        solution[i] = row[-1] / total
    return solution


@pytest.mark.parametrize("kind", ["full rank", "rank n/2", "correlated"])
@pytest.mark.parametrize("cap", [None, 2])
def test_overall_scale_does_not_matter(kind: str, cap: float | None) -> None:
    G = gramian(kind, 8) / 64
    reference = min_norm(G, cap=cap).weights
    for exponent in (-950, -300, 40, 1000):
        np.testing.assert_allclose(
            min_norm(np.ldexp(G, exponent), cap=cap).weights, reference, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("cap", [None, 1, 1.5])
@pytest.mark.parametrize(
    "G",
    [
        np.zeros((3, 3)),
        np.diag([1.7e308] * 4),
        np.full((3, 3), 1.7e308),
        np.diag(np.logspace(-300, 300, 7)),
        np.diag([5e-324] * 3),
        gramian("full rank", 5) * 1e-320,
        np.array([[0, 1e-170], [1e-170, 1]]),  # G_00 has underflowed
    ],
)
def test_extremes_are_no_error(G: Array, cap: float | None) -> None:
    w = min_norm(G, cap=cap).weights
    assert w.min() >= 0
    assert abs(w.sum() - 1) <= 4 * EPS
    assert w.max() <= bound(len(G), cap) + EPS
    assert own_gap(G, w, cap) <= 1e-12 * (np.diagonal(G) / len(G)).sum() + 1e-322


@pytest.mark.parametrize("cap", [None, 2])
@pytest.mark.parametrize("kind", ["full rank", "rank n/2", "correlated", "0 in hull", "tight"])
def test_gramian_rounded_to_bf16(kind: str, cap: float | None) -> None:
    for n in (2, 3, 8, 32):
        for seed in range(4):
            G = torch.tensor(gramian(kind, n, seed)).bfloat16()
            w = min_norm(G, cap=cap).weights.numpy()
            rounded = G.double().numpy()
            assert own_gap(rounded, w, cap) <= 2e-3 * rounded.trace() / n
            assert w.min() >= 0
            assert abs(w.sum() - 1) <= 4 * EPS


def test_gramian_rounded_to_bf16_is_mostly_solved_to_the_end() -> None:
    for seed in range(20):
        G = torch.tensor(gramian("rank n/2", 8, seed)).bfloat16()
        assert min_norm(G).gap <= 1e-12 * G.double().trace().item()


def test_a_cap_that_does_not_bind_is_not_reported() -> None:
    for cap, status in ((1.9, Status.OPTIMAL), (1.2, Status.CAPPED)):
        assert min_norm(np.diag([1.0, 1.5, 1.5]), cap=cap).status is status


def test_zero_is_recognised() -> None:
    assert min_norm(np.zeros((3, 3))).status is Status.ZERO
    assert min_norm(gramian("0 in hull", 9)).status is Status.ZERO
    assert min_norm(np.array([[1e-12, 0], [0, 1.0]])).status is Status.OPTIMAL
    assert str(Status.ZERO).startswith("zero gradient: ")
    assert "cap" in Status.ZERO


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    whole=st.booleans(),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    cap=st.none() | st.floats(1, 5),
)
def test_generated(
    n: int, rank: int, seed: int, whole: bool, offset: float, cap: float | None
) -> None:
    A = np.random.default_rng(seed).normal(offset, 1, (n, rank))
    A = np.round(A) if whole else A  # small whole numbers: ties, zero rows, equal rows
    solution = check(A @ A.T, cap)
    w = np.maximum(by_daqp(A @ A.T + 1e-9 * np.eye(n), cap), 0)
    w /= w.sum()
    assert solution.norm_squared <= w @ A @ (A.T @ w) + 1e-8 * (1 + offset**2 * rank)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    G=st.integers(1, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=n, max_size=n
        )
    ),
    cap=st.none() | st.floats(1, 3),
)
def test_generated_rows(G: list[list[float]], cap: float | None) -> None:
    A = np.array(G)
    check(A @ A.T, cap)


# The lower triangle of an 8 × 8 Gramian, row by row.
ZERO_PIVOT = [
    0.20497089624404907, 0.04446708410978317, 0.13396324217319489, -0.08046279847621918,
    -0.05346663296222687, 0.2591034471988678, 0.07105308771133423, 0.03554924577474594,
    -0.08938062936067581, 0.187135249376297, -0.07880023121833801, -0.11430405080318451,
    0.19826604425907135, -0.08771806210279465, 0.2624286115169525, 0.03142207860946655,
    0.05841824412345886, -0.06651163846254349, 0.022504251450300217, -0.12734906375408173,
    0.10787323117256165, 0.08099298179149628, 0.04548915475606918, 0.10805924981832504,
    0.07207513600587845, 0.1097218319773674, -0.09255585074424744, 0.3320150375366211,
    -0.07880023866891861, -0.1143040582537651, 0.19826604425907135, -0.08771806955337524,
    0.2624286115169525, -0.12734906375408173, 0.1097218319773674, 0.2624286115169525,
]  # fmt: skip


def near_singular(rng: np.random.Generator) -> Array:
    """Some rows equal others to 1e-7, 1e-12 or 1e-16, in any rank; rounded to fp32 or not."""
    n = int(rng.integers(2, 13))
    A = rng.standard_normal((n, int(rng.integers(1, n + 1)))) + rng.choice([0, 0, 1, 10])
    for _ in range(rng.integers(1, n)):
        one, other = rng.integers(n, size=2)
        A[one] = A[other] * (1 + rng.choice([1e-7, 1e-12, 1e-16]) * rng.standard_normal(A.shape[1]))
    if rng.random() < 0.3:
        A = A.astype(np.float32).astype(np.float64)
    G = A @ A.T
    error = rng.choice([0, 0, EPS, 1e-12, 1e-8])
    G = G * (1 + error * rng.standard_normal((n, n)))  # that of the sums
    G = (G + G.T) / 2
    if rng.random() < 0.5:  # equal rows' errors may be equal too
        G[one, one] = G[one, other] = G[other, one] = G[other, other]
    return G


def test_near_singular() -> None:
    """Many, as what fails is rare. NEAR_SINGULAR and SEED set the number, and draw others."""
    rng, worst = np.random.default_rng(int(os.environ.get("SEED", "0"))), 0.0
    statuses = Counter[Status]()
    for case in range(int(os.environ.get("NEAR_SINGULAR", "10000"))):
        G = near_singular(rng)
        cap = rng.choice([None, None, 1.2, 2.0])
        found = min_norm(G, cap=cap)
        w, n = found.weights, len(G)
        gap = own_gap(G, w, cap) / (G.trace() / n)
        assert w.min() >= 0, case
        assert w.max() <= bound(n, cap) * (1 + 16 * EPS), case
        assert abs(w.sum() - 1) <= 4 * EPS, case
        if gap > 1e-12 or found.status is Status.STALLED:  # only as far as G is indefinite
            assert gap <= -10 * np.linalg.eigvalsh(G)[0] / (G.trace() / n), case
        else:
            worst = max(worst, gap)
        statuses[found.status] += 1
    print(f"\n{statuses.total()} cases, largest gap where G is definite {worst:.1e} of mean diag G")
    print(*(f"{status.name} {count}" for status, count in statuses.items()), sep=", ")


@pytest.mark.parametrize(
    ("kind", "n", "seed"), [("rank n/2", 16, 54), ("rank 2", 16, 127), ("rank 2", 16, 349)]
)
def test_the_best_of_what_was_found_where_bf16_made_it_indefinite(
    kind: str, n: int, seed: int
) -> None:
    """The interior point method, which finds the sides, does not end up as close: 2e-4 and more."""
    G = torch.tensor(gramian(kind, n, seed)).bfloat16().double().numpy()
    found = min_norm(G)
    assert own_gap(G, found.weights, None) <= 1e-4 * G.trace() / n


def test_a_zero_pivot_that_cholesky_did_not_meet() -> None:
    """Rows 4 and 7 are equal to the rounding of fp32, in which this was summed."""
    G = np.zeros((8, 8))
    G[np.tril_indices(8)] = ZERO_PIVOT
    G += np.tril(G, -1).T
    for cap in (None, 1.5, 2):
        check(G, cap)
        check(G[:, ::-1][::-1], cap)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("kind", ["full rank", "correlated", "spread norms"])
def test_permutation_equivariant(kind: str, cap: float | None) -> None:
    G = gramian(kind, 12)
    order = np.random.default_rng(1).permutation(12)
    np.testing.assert_allclose(
        min_norm(G[np.ix_(order, order)], cap=cap).weights,
        min_norm(G, cap=cap).weights[order],
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_same_bits_out(kind: str) -> None:
    G = gramian(kind, 40)
    first = min_norm(G, cap=3).weights.tobytes()
    for _ in range(3):
        keep = [np.empty(7 + 13 * i) for i in range(5)]  # so that memory lies elsewhere
        assert min_norm(G.copy(), cap=3).weights.tobytes() == first
        del keep


def test_input_is_left_alone() -> None:
    G = gramian("full rank", 8)
    before = G.copy()
    G.setflags(write=False)
    min_norm(G)
    assert (before == G).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_in_torch_out(dtype: torch.dtype) -> None:
    G = torch.eye(4, dtype=dtype, requires_grad=True) + 1
    found = min_norm(G)
    assert isinstance(found.weights, torch.Tensor)
    assert found.weights.dtype == torch.float64
    assert found.weights.device == G.device
    assert not found.weights.requires_grad
    assert found.weights.tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
def test_numpy_in_numpy_out(dtype: type) -> None:
    found = min_norm((np.eye(3) * 4).astype(dtype))
    assert isinstance(found.weights, np.ndarray)
    assert found.weights.dtype == np.float64
    assert min_norm([[4, 0, 0], [0, 4, 0], [0, 0, 4]]).weights.tolist() == found.weights.tolist()
    assert isinstance(found.norm_squared, float)
    assert isinstance(found.gap, float)


@pytest.mark.parametrize(
    ("G", "message"),
    [
        ([], r"shape \[n, n\] with n >= 1, but it has shape \[0\]"),
        (np.zeros((0, 0)), r"it has shape \[0, 0\]"),
        ([[1.0, 2, 3]], r"it has shape \[1, 3\]"),
        ([1.0, 2], r"it has shape \[2\]"),
        ([[1, np.nan], [np.nan, 1]], r"finite, but G\[0, 1\] = nan"),
        ([[1, 0], [0, np.inf]], r"finite, but G\[1, 1\] = inf"),
        ([[1, 0.5], [0.1, 1]], r"symmetric, but G\[0, 1\] = 0.5 and G\[1, 0\] = 0.1"),
        ([[1.0, 0], [0, -1]], r"semi-definite, but G\[1, 1\] = -1"),
        ([[1.0, 2], [2, 1]], r"but G\[0, 1\] = 2 exceeds sqrt"),
        ([[0.0, 1], [1, 1]], r"but G\[0, 1\] = 1 exceeds sqrt"),
        ([[1e300, 1e300], [1e300, 1e-300]], r"but G\[0, 1\] = 1e\+300 exceeds sqrt"),
        ([[1, -0.9, -0.9], [-0.9, 1, -0.9], [-0.9, -0.9, 1]], r"the eigenvalue -0.8"),
        (1 - 1.5 * np.eye(4), r"semi-definite, but G\[0, 0\] = -0.5"),
        ([[1, 1j], [1j, 1]], "real numbers"),
        ([["a"]], "real numbers"),
    ],
)
def test_what_is_no_gramian_is_an_error(G: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        min_norm(G)  # type: ignore[call-overload]


@pytest.mark.parametrize("n", [3, 8, 50])
def test_an_indefinite_matrix_is_an_error_wherever_it_is_indefinite(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(5):
        Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        values = rng.uniform(0.5, 1, n)
        G = (Q * values) @ Q.T
        check(G)
        values[0] = -0.5
        with pytest.raises(ValueError, match="semi-definite"):
            min_norm((Q * values) @ Q.T)


@pytest.mark.parametrize("cap", [0.99, 0, -1, float("nan")])
def test_cap_below_one_is_an_error(cap: float) -> None:
    with pytest.raises(ValueError, match="cap must be >= 1"):
        min_norm(np.eye(2), cap=cap)
