"""Messages of a narrower dtype hold values of any size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import relative_error

from grain_ddp._core.narrow import EXTRA, decode, encoded, scale


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@given(power=st.integers(-140, 120), seed=st.integers(0, 99))
def test_what_arrives_is_what_was_sent(
    narrow: torch.dtype, wide: torch.dtype, power: int, seed: int
) -> None:
    if wide == torch.float64:
        power *= 7
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = (values * 2.0**power).to(wide)
    message, out = encoded(values, narrow), torch.empty_like(values)
    decode(message, out)
    least = torch.finfo(wide).smallest_normal
    if values.abs().max() > 1e4 * least:
        unit = 2.0**-power
        assert relative_error(out.double() * unit, values.double() * unit) < torch.finfo(narrow).eps
    torch.testing.assert_close(message[:-EXTRA].double() * scale(message), out.double())


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_arrives_as_it_is(spoilt: float) -> None:
    values = torch.tensor([1.0, spoilt, -2.0])
    out = torch.empty(3)
    decode(encoded(values, torch.float16), out)
    torch.testing.assert_close(out, values, equal_nan=True)


def test_nothing_and_zero() -> None:
    assert not len(encoded(torch.empty(0), torch.float16))
    out = torch.ones(2)
    decode(encoded(torch.zeros(2), torch.float16), out)
    assert not out.any()
