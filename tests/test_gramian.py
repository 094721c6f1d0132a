"""The local passes: precision, strides, dtypes, and the ends of fp32."""

import pytest
import torch

from grain_ddp._math.gramian import BLOCK, gramian, weighted_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [0, 1, 17, BLOCK, 3 * BLOCK + 5])
def test_gramian_is_that_of_the_rows(dtype: torch.dtype, columns: int) -> None:
    rows = torch.randn(3, columns).to(dtype)
    torch.testing.assert_close(
        gramian(rows), rows.double() @ rows.double().T, rtol=1e-6, atol=1e-6 * columns
    )


def test_rows_may_be_columns_of_a_wider_matrix() -> None:
    wide = torch.randn(4, 5 * BLOCK)
    part = wide[:, 100 : 100 + 2 * BLOCK + 3]
    exact = part.double() @ part.double().T
    torch.testing.assert_close(gramian(part), exact, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_correlated_rows_keep_their_differences(n: int) -> None:
    """What the weights depend on: fp32 throughout would leave an error of 6e-5 here."""
    common = torch.randn(1, 1_000_000)
    rows = common + 1e-2 * torch.randn(n, 1_000_000)
    exact = rows.double() @ rows.double().T
    assert ((gramian(rows) - exact).abs().max() / exact.max()).item() < 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [0, 17, 3 * BLOCK + 5])
def test_rows_need_not_lie_in_a_matrix(columns: int, n: int, dtype: torch.dtype) -> None:
    rows = torch.randn(n, columns).to(dtype)
    assert torch.equal(gramian([row.clone() for row in rows]), gramian(rows))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30, 1e-30])
def test_no_warning_of_what_leaves_fp32(bad: float, n: int) -> None:
    rows = torch.randn(n, 2 * BLOCK)
    rows[1] *= bad
    wide = rows.double()
    torch.testing.assert_close(gramian(rows), wide @ wide.T, rtol=1e-6, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18, 1e25])
def test_squares_outside_of_fp32(scale: float) -> None:
    rows = torch.randn(2, 100) * scale
    torch.testing.assert_close(gramian(rows), rows.double() @ rows.double().T, rtol=1e-6, atol=0)


def test_a_low_matmul_precision_is_not_taken_and_is_left_as_it_was() -> None:
    rows = torch.randn(4, 2 * BLOCK)
    exact = gramian(rows)
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(gramian(rows), exact, rtol=0, atol=0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weighted_sum_rounds_once(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    rows = torch.randn(5, 1000).to(dtype)
    weights = torch.rand(5, dtype=torch.float64)
    out = torch.empty(1000, dtype=out_dtype)
    weighted_sum(rows, weights, out=out)
    exact = (weights @ rows.double()).to(out_dtype)
    ulp = torch.finfo(out_dtype).eps
    torch.testing.assert_close(out, exact, rtol=ulp, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [0, 2, 4])
def test_weighted_sum_in_place_of_a_row(own: int, dtype: torch.dtype) -> None:
    rows = torch.randn(5, 1000).to(dtype)
    weights = torch.rand(5, dtype=torch.float64)
    out = rows[own].clone()
    exact = (weights @ rows.double()).to(dtype)
    if dtype.itemsize > 2:
        rows[own] = torch.nan  # it is not read
    weighted_sum(rows, weights, out, own)
    torch.testing.assert_close(out, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_row_of_weight_zero_is_overwritten_in_place() -> None:
    rows, weights = torch.randn(3, 1000), torch.tensor([0.5, 0.0, 0.5])
    out = torch.full((1000,), torch.nan)
    weighted_sum(rows, weights, out, own=1)
    torch.testing.assert_close(out, (rows[0] + rows[2]) / 2)
