"""A tensor in a few numbers, in one pass over it: for comparisons between ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def numbers(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute entries and the norms of tensors, float64 ``[2, tensors]``.

    None of them may be empty.
    """
    every = list(tensors)
    wide = torch.promote_types(every[0].dtype, torch.float32)
    norms = torch._foreach_norm(every, 2, dtype=wide)
    if every[0].device.type == "cpu":  # where a loop is a hundred times as fast
        low, high = map(torch.stack, zip(*map(torch.aminmax, every), strict=True))
        peaks = torch.maximum(-low, high)
    else:
        peaks = torch.stack(torch._foreach_norm(every, math.inf))
    return torch.stack([peaks.double(), torch.stack(norms).double()])


def bits(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the bits of each tensor, taken for integers: int64 ``[tensors]``.

    One flipped bit always changes it; NaN or not makes no difference.
    """
    device = tensors[0].device
    return torch.stack([_bits(tensor).to(device) for tensor in tensors])


def _bits(tensor: Tensor) -> Tensor:
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype == torch.bool:
        return values.sum()
    return values.view(_INTEGERS[values.itemsize]).sum(dtype=torch.int64)
