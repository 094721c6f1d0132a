"""The two local passes over the rows: their Gramian and their weighted sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from numpy.typing import NDArray
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


def gramian(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """``rows @ rows.T`` in float64 ``[n, n]`` of rows ``[n, c]`` of any floating dtype.

    Products of fp32 and narrower rows are summed in fp32 over short blocks and in fp64 over the
    blocks: as fast as one fp32 matrix product, and good to 1e-7. What is left of a block is
    done in fp64; so are rows whose squares leave the range of fp32, on a CPU or by a kernel.

    Rows that do not lie in one matrix are brought together, unless there are `few` of them.
    """
    n, columns = len(rows), rows[0].shape[0]
    if columns >= BLOCK and few(rows[0], n):
        squares = _products([row.numpy() for row in rows])
        return (
            squares if _in_range(squares) else gramian(torch.stack([row.double() for row in rows]))
        )
    if not isinstance(rows, Tensor):
        rows = torch.stack(tuple(rows))
    if has_kernels(rows) and rows.dtype != torch.float64:
        from grain_ddp import kernels

        if n <= kernels.LARGEST:
            return kernels.gramian(rows)
    size = BLOCK // 8 if n <= 4 and columns >= BLOCK else BLOCK  # what is faster
    whole = 0 if rows.dtype == torch.float64 else columns // size
    if not whole:
        wide = rows.double()
        return wide @ wide.T
    wide = rows.float()
    blocks = wide.as_strided((whole, n, size), (size, wide.stride(0), 1))
    with _full_precision():
        squares = torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.float64)
    if rows.device.type == "cpu" and not _in_range(squares):
        return gramian(rows.double())
    if whole * size < columns:
        squares += gramian(rows[:, whole * size :])
    return squares


def few(row: Tensor, n: int) -> bool:
    """Whether the Gramian of n rows like this one is as fast if each lies somewhere else."""
    return n <= 3 and row.dtype == torch.float32 and row.device.type == "cpu"


def _products(rows: Sequence[NDArray[np.float32]]) -> Tensor:
    """The Gramian row by row, in blocks that stay in a core's cache. BLAS sums 64 at a time."""
    sums = [[0.0] * len(rows) for _ in rows]
    with np.errstate(all="ignore"):  # NaN and inf are told by the result
        for start in range(0, len(rows[0]), 8 * BLOCK):
            parts = [row[start : start + 8 * BLOCK] for row in rows]
            for i, one in enumerate(parts):
                for j in range(i + 1):
                    sums[i][j] += float(one.dot(parts[j]))
    lower = torch.tensor(sums, dtype=torch.float64)
    return lower + lower.tril(-1).T


def _in_range(gramian: Tensor) -> bool:
    """Whether the squares have stayed in the range of fp32."""
    return all(_SMALLEST <= square <= _LARGEST for square in gramian.diagonal().tolist())


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
        for start, stop in ((0, own), (own + 1, len(weights))):
            if start < stop:
                out.addmv_(wide[start:stop].T, weights[start:stop], beta=scale)
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
