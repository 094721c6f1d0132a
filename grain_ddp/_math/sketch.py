"""A Gramian from k random sums of each gradient, where all of them would cost too much to compare.

A count sketch (Charikar, Chen and Farach-Colton, 2002; as a projection: Weinberger et al., 2009):
each number of a gradient, with a random sign, is added to one of k sums. Two gradients' sums have
the inner product of the gradients, but for a random error of standard deviation at most
‖gᵢ‖‖gⱼ‖ √(2/k), whatever their length.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from grain_ddp._math.gramian import _LARGEST, _SMALLEST, has_kernels

SPREAD = 1 << 16
"""At so many places in the table of signs a chunk may begin. (The kernel has the same number.)"""


def _mix(x: int) -> int:
    """32 bits that look random (the finalizer of MurmurHash3). The kernel does the same."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _base(seed: int) -> int:
    return (0x9E3779B9 * seed) & 0xFFFFFFFF


def _places(chunk: int, k: int, base: int) -> tuple[int, int]:
    """Where the first number of a chunk is added, and where its signs begin.

    The first chunk is not shifted, so that up to k numbers fill the sketch from its start.
    """
    first = _mix((base + 2 * chunk) & 0xFFFFFFFF)
    return (first % k if chunk else 0), _mix(first ^ 0x5BD1E995) % SPREAD


@cache
def signs(k: int, device: torch.device) -> Tensor:
    """Random signs [k + SPREAD], float32; the same on every rank."""
    random = torch.Generator().manual_seed(k)
    bits = torch.randint(0, 2, (k + SPREAD,), generator=random, dtype=torch.int8)
    return (2 * bits - 1).to(device, torch.float32)


class Sketch:
    """At most k sums of a gradient's numbers, which are added in parts, and its squared norm.

    The gradient is cut into chunks of k numbers. Each is added with another cyclic shift, so that
    the rows of a matrix, whose large columns are the same, do not fall on each other, and with
    other signs. Both depend on `seed` alone (the step's number), so they are alike on all ranks.

    Attributes:
        values: the sums, [k], float32 (of a float64 gradient, float64).
        count: how many numbers were added. Up to k of them have a sum each: nothing is lost.
    """

    def __init__(self, k: int, like: Tensor, seed: int) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.values = torch.zeros(k, dtype=dtype, device=like.device)
        self.count, self._base, programs = 0, _base(seed), 1
        self._by_kernel = has_kernels(like) and dtype == torch.float32
        if self._by_kernel:
            from grain_ddp._math import kernels

            programs = kernels.sketch_programs(k)
        self._squares = torch.zeros(programs, dtype=torch.float64, device=like.device)

    @property
    def sums(self) -> Tensor:
        """What of `values` is in use."""
        return self.values[: self.count]

    @property
    def exact(self) -> bool:
        """Whether every number has a sum of its own."""
        return self.count <= len(self.values)

    @property
    def square(self) -> Tensor:
        """The squared norm of what was added, a float64 scalar; it is not a sketch's."""
        return self._squares.sum()

    @property
    def expected_error(self) -> Tensor:
        """By the bound above, a float64 scalar; `rescale` tells what it was."""
        bound = 0.0 if self.exact else (2 / len(self.values)) ** 0.5
        return torch.full((), bound, dtype=torch.float64, device=self.values.device)

    def add(self, values: Tensor) -> None:
        """Add the next numbers [c] of the gradient."""
        k, at = len(self.values), 0
        table = signs(k, values.device)
        if self._by_kernel and len(values):
            from grain_ddp._math import kernels

            kernels.sketch(values, self.values, self._squares, table, self.count, self._base)
            self.count += len(values)
            return
        while at < len(values):
            chunk, inside = divmod(self.count, k)
            shift, start = _places(chunk, k, self._base)
            place = (inside + shift) % k
            take = min(len(values) - at, k - inside, k - place)
            piece = values[at : at + take].to(self.values.dtype)
            some = table[start + inside : start + inside + take].to(piece.dtype)
            self.values[place : place + take].addcmul_(piece, some)
            self._squares[0] += _square(piece)
            at, self.count = at + take, self.count + take


def _square(values: Tensor) -> Any:
    """The squared norm. On a CPU float64 is taken where float32 would not do."""
    if values.device.type != "cpu":
        return torch.linalg.vector_norm(values, dtype=torch.float64).square()
    square = float(torch.dot(values, values))
    if values.dtype == torch.float64 or _SMALLEST <= square <= _LARGEST:
        return square
    wide = values.double()
    return float(torch.dot(wide, wide))


def rescale(gramian: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """A sketched Gramian [n, n], scaled on both sides to exact squared norms [n]; and its error.

    The error is a scalar: the root mean square of the relative errors that the squared norms had
    before. The inner products, in units of ‖gᵢ‖‖gⱼ‖, are about as inexact.
    """
    found = gramian.diagonal()
    known = found.isfinite() & squares.isfinite()
    counted = known & (squares > 0)
    one = torch.ones_like(found)
    ratio = torch.where(found > 0, squares / torch.where(found > 0, found, one), 0 * one)
    scale = torch.where(known, ratio.sqrt(), one)
    scaled = gramian * scale * scale[:, None]
    scaled.diagonal().copy_(torch.where(known, squares, found + squares))
    errors = torch.where(counted, found / torch.where(counted, squares, one) - 1, 0 * one)
    return scaled, (errors.square().sum() / counted.sum().clamp(min=1)).sqrt()
