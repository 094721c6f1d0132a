"""The two local passes over the rows: their Gramian and their weighted sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
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


def gramian(rows: Tensor | Sequence[Tensor], *, exact: bool = False) -> Tensor:
    """``rows @ rows.T`` in float64 ``[n, n]`` of rows ``[n, c]`` of any floating dtype.

    Products of fp32 and narrower rows are summed in fp32 over short blocks and in fp64 over the
    blocks: as fast as one fp32 matrix product, and good to 1e-7 of the norms. Short rows are done
    in fp64; so are all with `exact`, and on a CPU rows whose squares leave the range of fp32.
    Elsewhere such rows are scaled.

    Rows that do not lie in one matrix are brought together, unless there are `few` of them.
    """
    n, columns, dtype = len(rows), rows[0].shape[0], rows[0].dtype
    if exact or dtype == torch.float64:
        return _in_float64(rows)
    if has_kernels(rows[0]):
        from grain_ddp._math import kernels

        if n <= kernels.LARGEST:
            return kernels.gramian(_matrix(rows))
    size = BLOCK // 8 if n <= 4 and columns >= BLOCK else BLOCK  # what is faster
    if columns < size:
        return _in_float64(rows)
    if rows[0].device.type != "cpu":  # to look at the squares, the host would have to wait
        return _by_scaled_blocks(_matrix(rows), size)
    squares = _by_pairs(rows, size) if few(rows[0], n) else _by_blocks(_matrix(rows), size)
    inside = all(_SMALLEST <= square <= _LARGEST for square in squares.diagonal().tolist())
    return squares if inside else _in_float64(rows)


def _matrix(rows: Tensor | Sequence[Tensor]) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.stack(tuple(rows))


def few(row: Tensor, n: int) -> bool:
    """Whether the Gramian of n rows like this one is as fast if each lies somewhere else."""
    fp32 = row.dtype == torch.float32 and row.device.type == "cpu"
    return n <= 3 and fp32 and not has_kernels(row) and hasattr(np, "vecdot")  # NumPy 2


def _by_pairs(rows: Iterable[Tensor], size: int) -> Tensor:
    """The Gramian of rows of fp32 in blocks of that size, a pair of rows at a time."""
    values = [row.detach().numpy() for row in rows]
    whole = len(values[0]) // size * size
    blocks = [(row[:whole].reshape(-1, size), row[whole:]) for row in values]
    result = [[0.0] * len(values) for _ in values]
    with np.errstate(all="ignore"):  # the result tells
        for i, (one, end) in enumerate(blocks):
            for j, (other, other_end) in enumerate(blocks[: i + 1]):
                product = np.vecdot(one, other).sum(dtype=np.float64) + end.dot(other_end)
                result[i][j] = result[j][i] = float(product)
    return torch.tensor(result, dtype=torch.float64)


def _by_blocks(rows: Tensor, size: int) -> Tensor:
    """The Gramian of rows in blocks of that size, all rows at once; the rest in fp64."""
    wide = rows.float()
    count = wide.shape[1] // size
    blocks = wide.as_strided((count, len(wide), size), (size, wide.stride(0), 1))
    with _full_precision():
        squares = torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.float64)
    rest = rows[:, count * size :].double()
    return squares.addmm_(rest, rest.T)


def _by_scaled_blocks(rows: Tensor, size: int) -> Tensor:
    """The same, of a copy of the rows that has powers of two taken out, so that squares fit."""
    wide = rows.float()
    largest = torch.linalg.vector_norm(wide, torch.inf, dim=1)
    exponents = torch.frexp(largest).exponent.clamp(-126, 126)
    squares = _by_blocks(torch.ldexp(wide, -exponents[:, None]), size)
    return torch.ldexp(squares, exponents[:, None] + exponents)


def _some(columns: int, n: int) -> Iterator[slice]:
    """The columns in parts, of which an fp64 copy of n rows takes 4 MiB or little more."""
    width = max((1 << 19) // n, 512)
    return (slice(start, start + width) for start in range(0, max(columns, 1), width))


def _in_float64(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """The Gramian with all products and sums in fp64."""
    total: Tensor | None = None
    for part in _some(rows[0].shape[0], len(rows)):
        some = rows[:, part] if isinstance(rows, Tensor) else torch.stack([r[part] for r in rows])
        wide = some.double()
        total = wide @ wide.T if total is None else total.addmm_(wide, wide.T)
    assert total is not None  # there is one part at least
    return total


def weighted_sum(
    rows: Tensor, weights: Tensor, out: Tensor, own: int | None = None, *, exact: bool = False
) -> None:
    """``out[c] = weights @ rows`` for rows ``[n, c]`` and float64 weights ``[n]``.

    `own` is the number of the row that `out` holds: it is updated in place. Without it, `out` must
    not overlap the rows. Accumulated in fp32 or better, with `exact` in fp64, and rounded to the
    dtype of out. Kernels do not read rows of weight zero; elsewhere 0 · NaN is NaN.
    """
    if has_kernels(rows):
        from grain_ddp._math import kernels

        kernels.weighted_sum(rows, weights, out, exact)
        return
    if rows.dtype != torch.float64 and (exact or _leave_fp32(weights)):
        for part in _some(len(out), len(rows)):
            some = rows[:, part].double()
            if own is not None:
                some[own] = out[part]
            out[part].copy_(torch.mv(some.T, weights))
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


def weigh_(values: Tensor, weight: Tensor) -> None:
    """Multiply values [c] with a float64 scalar, in place. Times 0 they are 0, whatever they are.

    On a GPU the host does not wait.
    """
    if values.device.type != "cpu":
        values.mul_(weight).masked_fill_(weight == 0, 0)
    elif float(weight) == 0:
        values.zero_()
    elif values.dtype != torch.float64 and _leave_fp32(weight[None]):
        values.copy_(values.double().mul_(weight))
    else:
        values.mul_(weight)


def _leave_fp32(weights: Tensor) -> bool:
    """Whether a weight is too small for fp32, as that of a gradient 1e30 times the others' is."""
    tiny = torch.finfo(torch.float32).tiny
    return weights.device.type == "cpu" and any(0 < abs(w) < tiny for w in weights.tolist())


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32, also where the user lets matrix products run in TF32 or bf16."""
    if not hasattr(torch.backends, "fp32_precision"):  # before PyTorch 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    # Each backend's own setting is what counts, whichever interface the user set it by; to ask by
    # the other one is an error.
    changed: list[tuple[Any, str]] = []
    backends: Any = torch.backends
    for matmul in (backends.cuda.matmul, backends.mkldnn.matmul):
        if matmul.fp32_precision not in ("ieee", "none"):
            changed.append((matmul, matmul.fp32_precision))
            matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, precision in changed:
            matmul.fp32_precision = "none"
            if matmul.fp32_precision != precision:  # it does not come from a setting for all
                matmul.fp32_precision = precision
