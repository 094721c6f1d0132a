"""Tensors in a few numbers."""

from __future__ import annotations

import math

import pytest
import torch

from grain_ddp._core.digest import bits, numbers

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_the_largest_entry_and_the_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in ((7, 5), (1,), (33,))]
    tensors[2][4] = -9
    found = numbers(tensors)
    for k, tensor in enumerate(tensors):
        assert found[0, k] == tensor.double().abs().max()
        assert found[1, k] == pytest.approx(float(tensor.double().norm()), rel=1e-6)


def test_what_is_not_finite_shows() -> None:
    found = numbers([torch.tensor([1.0, math.nan]), torch.tensor([-math.inf, 2.0])])
    assert found[0].isnan().tolist() == [True, False]
    assert found[0, 1] == math.inf


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.complex64])
def test_one_bit_changes_the_sum_of_bits(dtype: torch.dtype) -> None:
    tensor = torch.randn(50).to(dtype)
    before = bits([tensor, torch.ones(3, dtype=torch.bool)])
    raw = tensor.view(torch.uint8)
    for bit in (0, 3, 7):
        raw[17] ^= 1 << bit
        after = bits([tensor, torch.ones(3, dtype=torch.bool)])
        assert after[0] != before[0]
        assert after[1] == before[1] == 3
        raw[17] ^= 1 << bit
