"""The local passes: precision, strides, dtypes, and the ends of fp32."""

from collections.abc import Callable

import pytest
import torch

from grain_ddp._math.gramian import BLOCK, _by_scaled_blocks, gramian, weighted_sum

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


SCALES = [1e-42, 1e-38, 1e-30, 1e-22, 1e-19, 1e-15, 1.0, 1e15, 1e19, 1e30, 1e37]


def of_all_scales(n: int, columns: int) -> torch.Tensor:
    """Rows of n of these scales, denormals among them, and one in which they mix."""
    scales = torch.tensor(SCALES, dtype=torch.float64)
    rows = torch.randn(n, columns, dtype=torch.float64) * scales.repeat(n)[:n, None]
    rows[-1] *= scales[torch.randint(len(scales), (columns,))]
    return rows.clamp(-3e38, 3e38).float()


def relative_to_norms(found: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest error of an inner product, in units of the product of the two norms."""
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    return ((found - exact).abs() / norms / norms[:, None]).max().item()


@pytest.mark.parametrize("columns", [100, 2 * BLOCK + 100])
@pytest.mark.parametrize("n", [2, 3, 11, 12])
def test_rows_of_all_scales_in_one_matrix(n: int, columns: int) -> None:
    rows = of_all_scales(n, columns)
    for found in (gramian(rows), gramian(list(rows)), gramian(rows.flip(0)).flip(0, 1)):
        assert relative_to_norms(found, rows) < 1e-6


def test_rows_are_scaled_where_the_host_cannot_look_at_them() -> None:
    rows = of_all_scales(12, 2 * BLOCK + 100)
    assert relative_to_norms(_by_scaled_blocks(rows, BLOCK), rows) < 1e-6
    rows[1], rows[2, 5] = 0, torch.nan
    found = _by_scaled_blocks(rows, BLOCK)
    assert (found[1, 3:] == 0).all()
    assert found[2, 2].isnan()
    assert found[3:, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("columns", [0, 17, 200_000])
def test_exact(columns: int, n: int, dtype: torch.dtype) -> None:
    rows = (torch.randn(1, columns) + 1e-2 * torch.randn(n, columns)).to(dtype)
    wide = rows.double()
    for found in (gramian(rows, exact=True), gramian(list(rows), exact=True)):
        torch.testing.assert_close(found, wide @ wide.T, rtol=1e-13, atol=0)


def set_old(value: str) -> None:
    torch.set_float32_matmul_precision(value)


def set_all(value: str) -> None:
    torch.backends.fp32_precision = value


def set_cuda(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def set_mkldnn(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value


@pytest.mark.parametrize(
    ("set_precision", "low", "back"),
    [
        (set_old, "medium", "highest"),
        (set_old, "high", "highest"),
        (set_all, "tf32", "none"),
        (set_cuda, "tf32", "none"),
        (set_mkldnn, "bf16", "none"),
    ],
)
@pytest.mark.parametrize("n", [4, 5])
def test_a_low_matmul_precision_is_not_taken_and_is_left_as_it_was(
    set_precision: Callable[[str], None], low: str, back: str, n: int
) -> None:
    backends = torch.backends
    if hasattr(backends, "fp32_precision"):
        backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"
    elif set_precision is not set_old:
        pytest.skip("the interface of PyTorch 2.9")

    def state() -> list[str]:
        if set_precision is set_old:
            return [torch.get_float32_matmul_precision()]
        own = [backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision]
        return [backends.fp32_precision, *own]

    rows = torch.randn(n, 2 * BLOCK)
    exact, before = gramian(rows), state()
    set_precision(low)
    try:
        chosen = state()
        assert chosen != before
        torch.testing.assert_close(gramian(rows), exact, rtol=0, atol=0)
        assert state() == chosen
    finally:
        set_precision(back)
    assert state() == before  # so nothing was left behind that outlives the user's setting


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [None, 0, 2])
def test_exact_weighted_sum(own: int | None, dtype: torch.dtype) -> None:
    """Where terms cancel: right to the last place, of which fp32 sums would lose some."""
    rows = torch.randn(3, 300_000).to(dtype)
    rows[2] = -rows[0] + 1e-3 * rows[1]
    weights = torch.tensor([0.5, 1e-4, 0.5], dtype=torch.float64)
    expected = (weights @ rows.double()).to(dtype)
    out = torch.empty(300_000, dtype=dtype) if own is None else rows[own].clone()
    if own is not None and dtype != torch.float64:
        rows[own] = torch.nan  # it is not read
    weighted_sum(rows, weights, out, own, exact=True)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=1e-15)


def test_a_weight_that_leaves_fp32_takes_part() -> None:
    rows = torch.tensor([[1e30, 3e30], [1e-30, 1e-30]])
    weights = torch.tensor([-1e-60, 1.0], dtype=torch.float64)
    out = torch.empty(2)
    weighted_sum(rows, weights, out)
    torch.testing.assert_close(out, torch.tensor([0, -2e-30]), rtol=1e-6, atol=1e-37)
