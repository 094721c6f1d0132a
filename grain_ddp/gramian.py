"""The two local passes over the rows: their Gramian and their weighted sum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

BLOCK = 4096
"""The most columns whose products are summed in fp32 before fp64 takes over."""

DEVICES = {"cuda"}
"""Types of devices that run the Triton kernels, where Triton 3.7 or newer is installed."""

# Squares outside of this range have left fp32, or are about to.
_SMALLEST, _LARGEST = 1e-30, 1e37


def has_kernels(tensor: Tensor) -> bool:
    """Whether there are kernels for the tensor's device."""
    return tensor.device.type in DEVICES and _has_triton()


@cache
def _has_triton() -> bool:
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 7)  # the oldest that the kernels were tested with


def gramian(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` in float64 ``[n, n]`` of rows ``[n, c]`` of any floating dtype.

    Products of fp32 and narrower rows are summed in fp32 over short blocks and in fp64 over the
    blocks: as fast as one fp32 matrix product, and good to 1e-7. What is left of a block is
    done in fp64; so are rows whose squares leave the range of fp32, on a CPU or by a kernel.
    """
    if has_kernels(rows) and rows.dtype != torch.float64:
        from grain_ddp import kernels

        if len(rows) <= kernels.LARGEST:
            return kernels.gramian(rows)
    size = BLOCK // 8 if len(rows) <= 4 and rows.shape[1] >= BLOCK else BLOCK  # what is faster
    whole = 0 if rows.dtype == torch.float64 else rows.shape[1] // size
    rest = rows[:, whole * size :].double()
    result = rest @ rest.T
    if not whole:
        return result
    wide = rows.float()
    blocks = wide.as_strided((whole, len(wide), size), (size, wide.stride(0), 1))
    with _full_precision():
        squares = torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.float64)
    if squares.device.type == "cpu":
        low, high = squares.diagonal().aminmax()
        if not (low.item() >= _SMALLEST and high.item() <= _LARGEST):
            wider = rows.double()
            return wider @ wider.T
    return result.add_(squares)


def weighted_sum(rows: Tensor, weights: Tensor, out: Tensor, own: int | None = None) -> None:
    """``out[c] = weights @ rows`` for rows ``[n, c]``.

    `own` is the number of the row that `out` holds: it is updated in place. Without it, `out` must
    not overlap the rows. Accumulated in fp32 or better and rounded to the dtype of out. Kernels do
    not read rows of weight zero; elsewhere 0 · NaN is NaN.
    """
    if has_kernels(rows):
        from grain_ddp import kernels

        kernels.weighted_sum(rows, weights, out)
        return
    wide = rows if rows.dtype == torch.float64 else rows.float()
    weights = weights.to(wide.dtype)
    waits = own is not None and out.device.type != "cpu"  # the host would, for the own factor
    if out.dtype != wide.dtype or waits:
        out.copy_(torch.mv(wide.T, weights))
    elif own is None:
        torch.mv(wide.T, weights, out=out)
    else:
        scale = float(weights[own])
        for others in (slice(own), slice(own + 1, None)):
            if len(wide[others]):
                out.addmv_(wide[others].T, weights[others], beta=scale)
                scale = 1.0


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32, also where the user lets matrix products run in TF32 or bf16."""
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
