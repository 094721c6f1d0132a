"""From Gramians that each rank summed over its own columns to weights that all ranks share."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from grain_ddp._core.columns import Columns
from grain_ddp._core.options import Options
from grain_ddp._core.state import GrainState
from grain_ddp._math.record import PendingRecord, StepRecord
from grain_ddp._math.suspect import Suspect
from grain_ddp._math.weighting import DeviceWeights, Weights, weigh_tensor
from grain_ddp._wire.wire import Wire

AnyWeights = Weights | DeviceWeights

MARKS = 6
"""How many numbers travel with a Gramian's own."""

_PRIME = 0xFFF1  # marks are below it: their squares, summed over 16,384 ranks, are exact in float64


@cache
def _triangle(r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the upper triangle lies in a flat matrix [r, r], and what of it each entry is."""
    rows, columns = torch.triu_indices(r, r, device=device)
    where = torch.zeros(r, r, dtype=torch.int64, device=device)
    where[rows, columns] = where[columns, rows] = torch.arange(len(rows), device=device)
    if device.type == "cuda":  # for the streams of other models
        torch.cuda.current_stream(device).synchronize()
    return rows * r + columns, where


def upper(gramian: Tensor) -> Tensor:
    """The upper triangle of a Gramian [r, r], flat: what travels."""
    return gramian.take(_triangle(len(gramian), gramian.device)[0])


def weights_of(
    options: Options, step: int, triangle: Tensor, r: int, left_out: Sequence[int] = ()
) -> AnyWeights:
    """The weights that the options give for the upper triangle of a Gramian [r, r].

    `left_out`: rows that get none.
    """
    gramian = triangle.take(_triangle(r, triangle.device)[1])
    warm = step >= options.warmup_steps
    return weigh_tensor(
        gramian,
        options.weighting if warm else "mean",
        cap=options.cap,
        normalize=options.normalize and warm,
        nonfinite=options.nonfinite,
        left_out=left_out,
        seed=step,
    )


class Marks:
    """What all ranks must have done alike in a step, as a few numbers that travel with a Gramian.

    A rank that skipped a step, or whose weights are others, shows at the next Gramian, on every
    rank. (On a GPU nothing is compared: looking at a number would wait for it.)
    """

    def __init__(self) -> None:
        self._weights = 0
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start on a step."""
        self._step, self._layout, self._buckets = step, 0, list[str]()

    def push(self, count: int, dtype: torch.dtype) -> None:
        """Note so many elements of the step."""
        self._buckets.append(f"{count} x {dtype}")
        self._layout = zlib.crc32(self._buckets[-1].encode(), self._layout)

    def weigh(self, weights: AnyWeights) -> None:
        """Note weights that were found."""
        if isinstance(weights, Weights):
            self._weights = zlib.crc32(weights.weights.tobytes(), self._weights)

    def numbers(self) -> Tensor:
        """The marks m and their squares, float64: if Σm = n·m and Σm² = n·m², all have the same."""
        marks = [mark % _PRIME for mark in (self._step, self._layout, self._weights)]
        return torch.tensor([*marks, *(m * m for m in marks)], dtype=torch.float64)

    def differ(self, wire: Wire) -> NoReturn:
        """ValueError on every rank, once the numbers have told that something differs."""
        wire.whole.agree(
            {
                "the number of the step": self._step,
                "the buckets of the step": self._buckets,
                "the weights so far (a checksum)": self._weights,
            }
        )
        raise ValueError(
            "grain_ddp: the ranks are at different places of the program (this is rank "
            f"{wire.whole.rank}). Let every rank take every step, with the same model."
        )


class GramianSum:
    """The Gramian of some columns on its way: started here, `weights` when they are wanted.

    ``total`` [r, r] is the Gramian of this rank's `columns`, of one scope, which have arrived.
    Rows that are `left_out` get no weight.
    """

    def __init__(
        self,
        state: GrainState,
        wire: Wire,
        total: Tensor,
        columns: Sequence[Columns],
        marks: Marks,
        left_out: Sequence[int] = (),
    ) -> None:
        self._left_out = left_out
        self._state, self._wire, self._columns, self._marks = state, wire, columns, marks
        self.exact = False  # whether the weights are those of an exact Gramian
        self._found: AnyWeights | None = None
        self._start(total)

    def _start(self, gramian: Tensor) -> None:
        self._size, self._on_cpu = len(gramian), gramian.device.type == "cpu"
        triangle = upper(gramian)
        if self._on_cpu:
            self._numbers = self._marks.numbers()
            triangle = torch.cat([triangle, self._numbers])
        self.transfer, self._triangles = self._wire.sum(triangle)

    def weights(self) -> AnyWeights:
        """The weights, the same on every rank; before any of the columns is reduced.

        Where the gradients cancel so far that rounding would show, which all ranks see alike, they
        are those of a Gramian made anew in float64. ValueError on every rank if the ranks differ.
        """
        if self._found is None:
            self._found = found = self._find()
            if isinstance(found, Weights) and any(found.cancels(c.dtype) for c in self._columns):
                self._start(torch.stack([c.gramian(exact=True) for c in self._columns]).sum(0))
                self._found, self.exact = self._find(), True
            self._columns = ()
        return self._found

    def _find(self) -> AnyWeights:
        self.transfer.wait()
        total = self._triangles.sum(0)
        if self._on_cpu:
            total, sums = total[: -len(self._numbers)], total[-len(self._numbers) :]
            if sums.tolist() != (self._numbers * self._wire.whole.size).tolist():
                self._marks.differ(self._wire)
        state = self._state
        weights = weights_of(state.options, state.step, total, self._size, self._left_out)
        self._marks.weigh(weights)
        return weights


def record_of(
    state: GrainState, buckets: Sequence[AnyWeights], suspects: tuple[Suspect, ...] = ()
) -> StepRecord:
    """The record of a step with these weights, one for each bucket."""
    step, single = state.step, state.options.scope == "global"
    if single:
        buckets = buckets[:1]
    if any(isinstance(weights, DeviceWeights) for weights in buckets):
        return PendingRecord(step, lambda: _record_of(step, single, buckets, suspects))
    return _record_of(step, single, buckets, suspects)


def _record_of(
    step: int, single: bool, found: Sequence[AnyWeights], suspects: tuple[Suspect, ...]
) -> StepRecord:
    buckets = [w.read() if isinstance(w, DeviceWeights) else w for w in found]
    if single:
        return StepRecord(step, **vars(buckets[0]), suspects=suspects)
    return StepRecord(
        step,
        np.stack([w.gramian for w in buckets]),
        np.stack([w.weights for w in buckets]),
        np.array([w.gap for w in buckets]),
        tuple(w.status for w in buckets),
        tuple(w.active for w in buckets),
        tuple(w.dropped for w in buckets),
        suspects,
    )
