"""From a Gramian to weights: the named rules, absent and non-finite groups, callables."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import min_norm_weights

from grain_ddp._math.gramian import gramian, weighted_sum
from grain_ddp._math.rules import krum, normalized_min_norm, upgrad
from grain_ddp._math.status import Status
from grain_ddp._math.weighting import SHORT, Weights, weigh

NAN, INF = float("nan"), float("inf")


def gramian_of(*rows: list[float]) -> np.ndarray:
    matrix = np.array(rows, dtype=float)
    with np.errstate(invalid="ignore"):
        return matrix @ matrix.T


def test_min_norm_of_two_orthogonal_gradients() -> None:
    found = weigh(gramian_of([2, 0], [0, 1]), "min_norm")
    np.testing.assert_allclose(found.weights, [0.2, 0.8], rtol=1e-12)
    assert found.gap < 1e-12
    assert found.active == (0, 1)


def test_inverse_norm_and_mean() -> None:
    gramian = gramian_of([2, 0], [0, 1])
    np.testing.assert_allclose(weigh(gramian, "inverse_norm").weights, [0.2, 0.8])
    np.testing.assert_allclose(weigh(gramian, "mean").weights, [0.5, 0.5])
    tiny = np.diag([1e-310, 1e-300])
    np.testing.assert_allclose(weigh(tiny, "inverse_norm").weights, [1, 1e-10])


def test_a_status_is_its_text() -> None:
    status = weigh(np.eye(2), "mean").status
    assert status is Status.MEAN
    assert status == str(status) == f"{status}" == "mean"
    assert {status} == {"mean"}
    assert json.loads(json.dumps([status])) == ["mean"]
    assert pickle.loads(pickle.dumps(status)) is status
    assert weigh(np.eye(2), lambda G: torch.ones(2)).status is Status.CUSTOM


def test_cap() -> None:
    gramian = gramian_of([10, 0, 0], [0, 10, 0], [0, 0, 1])
    assert weigh(gramian, "min_norm").weights[2] > 0.9
    np.testing.assert_allclose(weigh(gramian, "min_norm", cap=1.5).weights, [0.25, 0.25, 0.5])
    np.testing.assert_allclose(weigh(gramian, "min_norm", cap=1).weights, np.full(3, 1 / 3))


def test_a_zero_gradient_is_absent() -> None:
    gramian = gramian_of([2, 0], [0, 0], [0, 1])
    for rule in ("min_norm", "inverse_norm", lambda G: torch.full((len(G),), 1 / len(G))):
        found = weigh(gramian, rule)
        assert found.weights[1] == 0
        assert found.active == (0, 2)
        assert found.weights.sum() == pytest.approx(1)
    # Plain averaging divides by n, whatever the gradients are.
    np.testing.assert_allclose(weigh(gramian, "mean").weights, np.full(3, 1 / 3))


def test_only_zero_gradients() -> None:
    found = weigh(np.zeros((3, 3)), "min_norm")
    np.testing.assert_array_equal(found.weights, 0)
    assert found.active == ()
    assert found.status is Status.ABSENT


@pytest.mark.parametrize("bad", [NAN, INF])
def test_propagate(bad: float) -> None:
    gramian = gramian_of([1, 0], [bad, 0], [0, 1])
    found = weigh(gramian, "min_norm")
    np.testing.assert_array_equal(found.weights, np.full(3, 1 / 3))
    assert found.status is Status.NOT_FINITE
    np.testing.assert_array_equal(found.factors(torch.float32), found.weights)


def test_an_aggregate_that_is_zero_to_rounding_comes_out_as_zero() -> None:
    opposite = weigh(gramian_of([1, 0], [-1, 1e-7]), "min_norm")
    np.testing.assert_array_equal(opposite.factors(torch.float32), 0)
    assert opposite.factors(torch.float64).sum() == pytest.approx(1)
    assert weigh(gramian_of([1, 0], [-1, 1e-3]), "min_norm").factors(torch.float32).any()
    mean = weigh(gramian_of([1, 0], [-1, 1e-7]), "mean")
    np.testing.assert_array_equal(mean.factors(torch.float32), [0.5, 0.5])


@pytest.mark.parametrize("factor", [5e-7, 2e6, 1e-30, 1e30])
@pytest.mark.parametrize("common", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rule", ["min_norm", "inverse_norm"])
def test_a_gradient_of_another_size_makes_no_aggregate_zero(
    factor: float, common: float, rule: str
) -> None:
    rows = common * np.array([[1.0, 0, 0.5], [0, 1, 0.5], [-0.2, 0, 1]])
    rows[2] *= factor
    found = weigh(rows @ rows.T, rule)
    for dtype in (torch.float32, torch.float64):
        np.testing.assert_array_equal(found.factors(dtype), found.weights)
    aggregate, norms = found.weights @ rows, np.linalg.norm(rows, axis=1)
    assert np.linalg.norm(aggregate) == pytest.approx(norms.min(), rel=0.6)
    if rule == "min_norm":
        length = np.linalg.norm(aggregate)
        assert (rows @ aggregate >= length * (length - 1e-14 * norms)).all()


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.integers(1, 6), st.integers(0, 10**6), st.data())
def test_no_scale_of_a_row_matters_but_for_rounding(n: int, seed: int, data: st.DataObject) -> None:
    """Each row may have its own, and all one in common: no conflict, and no zero, comes of it."""
    rows = np.random.default_rng(seed).normal(size=(n, 2 * n))
    exponents = st.floats(-30, 30)
    scales = 10 ** np.array(data.draw(st.lists(exponents, min_size=n, max_size=n)))
    common = 10 ** data.draw(exponents)
    rows *= scales[:, None]
    found, moved = (weigh(A @ A.T, "min_norm") for A in (rows, common * rows))
    for w, A in ((found, rows), (moved, common * rows)):
        assert w.factors(torch.float32) is w.weights
        assert w.active == tuple(range(n))
        aggregate, norms = w.weights @ A, np.linalg.norm(A, axis=1)
        length = np.linalg.norm(aggregate)
        assert (A @ aggregate >= length**2 - 1e-13 * norms * (w.weights @ norms)).all()
    one, other = common * (found.weights @ rows), moved.weights @ (common * rows)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.linalg.norm(one))


def planted(n: int, columns: int, ratio: float, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose min-norm point is `ratio` times as long as they are, about."""
    rows = torch.randn(n, columns, dtype=torch.float64)
    weights = torch.rand(n, dtype=torch.float64) + 0.2
    rows -= weights @ rows / weights.sum()
    point = torch.randn(columns, dtype=torch.float64)
    basis = torch.linalg.qr(rows.T)[0]
    point -= basis @ (basis.T @ point)
    return (rows + ratio * rows.norm(dim=1).mean() * point / point.norm()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ratio", [0.3, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_what_cancels_is_made_anew_in_float64(n: int, ratio: float, dtype: torch.dtype) -> None:
    rows = planted(n, 5000, ratio, dtype)
    wide = rows.double()
    weights = torch.from_numpy(min_norm_weights(wide))
    aggregate = weights @ wide

    def found(exact: bool) -> tuple[Weights, torch.Tensor]:
        weights = weigh(gramian(rows, exact=exact).numpy(), "min_norm")
        factors = weights.factors_for(rows, exact=exact)
        out = torch.empty(5000, dtype=dtype)
        weighted_sum(rows, factors, out, exact=exact)
        return weights, out.double()

    weights, result = found(exact=False)
    assert weights.cancels(dtype) == (aggregate.norm() < SHORT / 2 * wide.norm(dim=1).mean())
    if weights.cancels(dtype):
        _, result = found(exact=True)
    # What is left is the rounding of the result: half a unit in its last place.
    unit = torch.finfo(dtype).eps / 2
    length = aggregate.norm()
    assert (result - aggregate).norm() <= max(unit, 1e-6) * length
    slack = max(unit, 1e-6) * length * wide.norm(dim=1)
    assert (wide @ result >= length**2 - slack).all()
    assert not weights.cancels(torch.float64)
    assert not weigh(gramian(rows).numpy(), "mean").cancels(dtype)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("rule", ["min_norm", "mean", "inverse_norm"])
def test_drop(bad: float, rule: str) -> None:
    gramian = gramian_of([1, 0], [bad, 0], [0, 1])
    found = weigh(gramian, rule, nonfinite="drop")
    np.testing.assert_allclose(found.weights, [0.5, 0, 0.5])
    assert found.dropped == (1,)
    assert found.active == (0, 2)
    assert np.isfinite(found.gap)


def test_drop_of_every_group_propagates() -> None:
    found = weigh(np.full((2, 2), NAN), "min_norm", nonfinite="drop")
    np.testing.assert_array_equal(found.weights, [0.5, 0.5])
    assert found.dropped == ()


def test_a_callable_draws_alike_and_leaves_the_generator_alone() -> None:
    def draw(gramian: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(gramian))

    torch.manual_seed(1)
    first = weigh(np.eye(3), draw, seed=5).weights
    after = torch.rand(())
    torch.manual_seed(2)
    second = weigh(np.eye(3), draw, seed=5).weights
    np.testing.assert_array_equal(first, second)
    torch.manual_seed(1)
    assert after == torch.rand(())
    assert (weigh(np.eye(3), draw, seed=6).weights != first).all()


@pytest.mark.parametrize(
    "wrong", [torch.ones(2), torch.tensor([1.0, NAN, 0.0]), torch.ones(3, 3)], ids=str
)
def test_a_callable_that_returns_something_else(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="3 finite weights"):
        weigh(np.eye(3), lambda gramian: wrong)


def test_one_long_gradient_does_not_make_the_step_zero() -> None:
    """A threshold against a gradient of weight 0 once did."""
    rows = np.random.default_rng(0).standard_normal((4, 50))
    for scale in (1e-30, 5e-7, 2e6, 1e15, 1e30):
        scaled = rows * np.array([[scale], [1], [1], [1]])
        found = weigh(scaled @ scaled.T, "min_norm")
        for dtype in (torch.float32, torch.float64):
            np.testing.assert_array_equal(found.factors(dtype), found.weights)
        aggregate = found.weights @ scaled
        products = scaled @ aggregate / np.linalg.norm(scaled, axis=1) / np.linalg.norm(aggregate)
        assert products.min() > -1e-12


def test_rules_by_name() -> None:
    rows = np.random.default_rng(1).standard_normal((6, 9)) * np.arange(1, 7)[:, None]
    gramian = rows @ rows.T
    np.testing.assert_array_equal(weigh(gramian, "upgrad").weights, upgrad(gramian))
    np.testing.assert_array_equal(weigh(gramian, "krum").weights, krum(gramian))
    several = weigh(gramian, "multi_krum")
    np.testing.assert_array_equal(several.weights, krum(gramian, selected=5))
    assert several.status == "multi_krum"
    for cap in (None, 1.5, 3):
        expected, _ = normalized_min_norm(gramian, cap)
        found = weigh(gramian, "min_norm", normalize=True, cap=cap).weights
        np.testing.assert_array_equal(found, expected)
    with_absent = np.pad(gramian, (0, 1))
    for name in ("upgrad", "krum", "multi_krum"):
        assert weigh(with_absent, name).weights[-1] == 0
    for n in (1, 2, 3, 4):  # groups may be absent in some steps
        for name in ("krum", "multi_krum"):
            assert weigh(gramian[:n, :n], name).weights.sum() == pytest.approx(1)
