"""The two passes over the rows on a GPU, as Triton kernels: each reads the rows once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 64
"""Rows; beyond it the accumulators do not fit into the registers of one program."""

_SUMS = 1024  # of a sketch, for one program
_SHORT = 4096  # columns whose products are summed in fp32 before fp64 takes over, or a quarter
# Squares outside of this range have left fp32, or are about to.
_SMALLEST, _LARGEST = tl.constexpr(1e-30), tl.constexpr(1e37)
_TINY = tl.constexpr(2.0**-126)
_SPREAD = tl.constexpr(1 << 16)  # grain_ddp._math.sketch.SPREAD


def gramian(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` in float64 ``[n, n]`` of rows ``[n, c]`` of fp32 or narrower, n <= 64.

    Rows are contiguous, their distance is free. Products are summed in fp32 over blocks of at most
    4096 columns, and in fp64 over the blocks; blocks whose squares leave the range of fp32 are
    done again, scaled. No atomics: the same bits in give the same bits out.
    """
    n, columns = rows.shape
    size = triton.next_power_of_2(max(n, 2))
    dot = size > (8 if rows.dtype == torch.float32 else 4)
    size = max(size, 16) if dot else size
    # Each program leaves n² numbers behind: few programs where that is many.
    programs = _processors(rows.device) * max(1, min(8, 128 // size))
    width = max(triton.cdiv(triton.cdiv(columns, programs), _SHORT), 1) * _SHORT
    programs = triton.cdiv(columns, width)
    shares = torch.empty(programs, n, n, dtype=torch.float64, device=rows.device)
    if programs:
        with torch.cuda.device_of(rows):
            launch: Any = _gramian[(programs,)]
            launch(
                rows,
                rows.stride(0),
                n,
                columns,
                width,
                shares,
                N=size,
                BLOCK=_block(size, dot),
                SHORT=_SHORT // 4 if dot else _SHORT,  # one long sum there, many short ones here
                DOT=dot,
                PRECISION=_precision(rows, size),
                WIDEN=rows.device.type == "cpu",  # Triton's interpreter cannot multiply bf16
                num_warps=8 if size > 16 else 4,
            )
    return shares.sum(0)


def weighted_sum(rows: Tensor, weights: Tensor, out: Tensor, exact: bool = False) -> None:
    """``out[c] = weights @ rows`` for rows ``[n, c]``, summed in fp32 or better and rounded once.

    With `exact` summed in fp64. Rows of weight zero are not read: they may hold NaN. `out` may be
    one of the rows.
    """
    n, columns = rows.shape
    if columns:
        with torch.cuda.device_of(rows):
            launch: Any = _weighted_sum[(triton.cdiv(columns, 1024),)]
            wide = exact or rows.dtype == torch.float64
            launch(rows, rows.stride(0), weights, out, columns, n, BLOCK=1024, WIDE=wide)


def sketch(
    values: Tensor, sums: Tensor, squares: Tensor, table: Tensor, first: int, base: int
) -> None:
    """Add values [c], numbers `first` and on of a gradient, to the sums [k] of a sketch, float32.

    ``squares`` [`sketch_programs`], float64, has their squares added. ``table`` and `base` are what
    `grain_ddp._math.sketch` makes of k and the seed. No atomics: each program has sums of its own.
    """
    k = len(sums)
    with torch.cuda.device_of(values):
        launch: Any = _sketch[(len(squares),)]
        count, begin = len(values), first // k
        end = (first + count - 1) // k + 1  # here, where no sum can leave int32
        launch(values, count, sums, squares, table, k, first, begin, end, base, BLOCK=_SUMS)


def sketch_programs(k: int) -> int:
    return int(triton.cdiv(k, _SUMS))


def _block(size: int, dot: bool) -> int:
    """Columns of a tile: so many that the registers hold it, and the accumulators."""
    return max(2048 // size, 32) if dot else 4096 // size**2


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _precision(rows: Tensor, size: int) -> str:
    """How fp32 products are formed: beyond 16 rows plain FMAs cannot keep up with the memory.

    "tf32x3" splits each factor in two of the tensor cores' and leaves out 2⁻²² of a product.
    """
    if size <= 16 or rows.device.type != "cuda" or torch.version.cuda is None:
        return "ieee"
    return "tf32x3" if torch.cuda.get_device_capability(rows.device) >= (8, 0) else "ieee"


@triton.jit
def _gramian(
    rows,
    stride,
    n,
    columns,
    width,
    shares,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SHORT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, N)
    i, j = k[:, None], k[None, :]
    total = tl.zeros([N, N], tl.float64)
    last = tl.minimum((program + 1) * width, columns)
    for start in range(program * width, last, SHORT):
        stop = tl.minimum(start + SHORT, last)
        products = _products(rows, stride, n, start, stop, k, N, BLOCK, DOT, PRECISION, WIDEN)
        inside = (products >= _SMALLEST) & (products <= _LARGEST)
        if tl.sum(((i == j) & (i < n) & ~inside).to(tl.int32)) == 0:
            total += products
        else:
            total += _scaled_products(
                rows, stride, n, start, stop, k, N, BLOCK, DOT, PRECISION, WIDEN
            )
    tl.store(shares + program * n * n + i * n + j, total, mask=(i < n) & (j < n))


@triton.jit
def _products(rows, stride, n, start, stop, k, N, BLOCK, DOT, PRECISION, WIDEN):
    """Those of the columns from start to stop, in fp32 [N, N]."""
    if DOT:
        total = tl.zeros([N, N], tl.float32)
        for at in range(start, stop, BLOCK):
            tile = _tile(rows, stride, n, at, stop, k, BLOCK, WIDEN)
            total = tl.dot(tile, tl.trans(tile), total, input_precision=PRECISION)
        return total
    else:
        wide = tl.zeros([N, N, BLOCK], tl.float32)
        for at in range(start, stop, BLOCK):
            tile = _tile(rows, stride, n, at, stop, k, BLOCK, WIDEN).to(tl.float32)
            wide += tile[:, None, :] * tile[None, :, :]
        return tl.sum(wide, 2)


@triton.jit
def _scaled_products(rows, stride, n, start, stop, k, N, BLOCK, DOT, PRECISION, WIDEN):
    """The same in fp64, of rows at any scale: each tile's rows are scaled by powers of two."""
    total = tl.zeros([N, N], tl.float64)
    for at in range(start, stop, BLOCK):
        found = _tile(rows, stride, n, at, stop, k, BLOCK, WIDEN)
        tile = found.to(tl.float32)
        bits = tl.max(tl.abs(tile), 1).to(tl.int32, bitcast=True) & 0x7F800000
        # From 2⁻¹²⁶ (also of zero) to 2¹²⁶, whose inverses are normal; 1 where it is not finite.
        bits = tl.where(bits == 0x7F800000, 0x3F800000, bits)
        bits = tl.minimum(tl.maximum(bits, 0x00800000), 0x7E800000)
        scale = bits.to(tl.float32, bitcast=True)
        tile *= (0x7F000000 - bits).to(tl.float32, bitcast=True)[:, None]
        if DOT:
            tile = tile.to(found.dtype)
            products = tl.dot(tile, tl.trans(tile), input_precision=PRECISION)
        else:
            products = tl.sum(tile[:, None, :] * tile[None, :, :], 2)
        wide = scale.to(tl.float64)
        total += products.to(tl.float64) * (wide[:, None] * wide[None, :])
    return total


@triton.jit
def _tile(rows, stride, n, at, stop, k, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    column = at + tl.arange(0, BLOCK)
    places = rows + k.to(tl.int64)[:, None] * stride + column[None, :]
    tile = tl.load(places, mask=(k < n)[:, None] & (column < stop)[None, :], other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _weighted_sum(rows, stride, weights, out, columns, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    dtype = tl.float64 if WIDE else tl.float32
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype)
    for first in range(0, n, 8):
        for i in tl.static_range(8):
            row = first + i
            weight = tl.load(weights + row, mask=row < n, other=0.0)
            end = tl.where(weight != 0, columns, 0)
            place = rows + tl.cast(row, tl.int64) * stride + column
            values = tl.load(place, mask=column < end, other=0.0)
            if values.dtype != tl.float64:  # the interpreter knows no way from bf16 to fp64
                values = values.to(tl.float32)
            if not WIDE and tl.abs(weight) < _TINY:  # leaves fp32, where the product may not
                total += (weight * values.to(tl.float64)).to(tl.float32)
            else:
                total += weight.to(dtype) * values.to(dtype)
    if out.dtype.element_ty != tl.float64:  # nor one back
        total = total.to(tl.float32)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["first", "begin", "end", "base"])  # others in each bucket and step
def _sketch(values, count, sums, squares, table, k, first, begin, end, base, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    j = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([1], tl.float64)
    for chunk in range(begin, end):
        mixed = _mix((base + 2 * tl.cast(chunk, tl.int64)) & 0xFFFFFFFF)
        shift = tl.where(chunk == 0, 0, mixed % k)
        start = _mix(mixed ^ 0x5BD1E995) % _SPREAD
        inside = j - shift
        inside = tl.where(inside < 0, inside + k, inside)
        at = tl.cast(chunk, tl.int64) * k + inside - first
        mask = (j < k) & (at >= 0) & (at < count)
        found = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        sign = tl.load(table + start + inside, mask=mask, other=0.0)
        total += found * sign
        largest = tl.max(tl.abs(found), 0)
        # Scaled, so that no square leaves fp32; what is not finite stays so.
        scale = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
        part = tl.sum((found / scale) * (found / scale), 0).to(tl.float64)
        square += part * scale.to(tl.float64) * scale.to(tl.float64)
    place = sums + j
    tl.store(place, tl.load(place, mask=j < k, other=0.0) + total, mask=j < k)
    own = squares + program + tl.arange(0, 1)
    tl.store(own, tl.load(own) + square)


@triton.jit
def _mix(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
