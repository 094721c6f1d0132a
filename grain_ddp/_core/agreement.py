"""From Gramians that each rank summed over its own columns to weights that all ranks share."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from grain_ddp._core.columns import Columns
from grain_ddp._core.groups import Grouping
from grain_ddp._core.options import Kind, Options
from grain_ddp._core.state import GrainState
from grain_ddp._math.host import Later, to_device
from grain_ddp._math.record import Array, PendingRecord, StepRecord
from grain_ddp._math.sketch import rescale
from grain_ddp._math.suspect import Suspect
from grain_ddp._math.weighting import DeviceWeights, Weights, uniform, weigh_tensor
from grain_ddp._wire.wire import Wire

AnyWeights = Weights | DeviceWeights

MARKS = 8
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


def full(triangle: Tensor, r: int) -> Tensor:
    """The Gramian [r, r] of an upper triangle."""
    return triangle.take(_triangle(r, triangle.device)[1])


def weights_of(
    options: Options,
    step: int,
    gramian: Tensor,
    shares: Array | None = None,
    error: Tensor | None = None,
    left_out: Sequence[int] = (),
) -> AnyWeights:
    """The weights that the options give for a Gramian [r, r]; none to rows that are `left_out`.

    `shares` are those of the rows in the plain mean, if they are not alike; `error` is a sketch's.
    """
    warm = step >= options.warmup_steps  # with `guard="drop"` even a plain mean is weighed
    return weigh_tensor(
        gramian,
        options.weighting if warm else "mean",
        cap=options.cap,
        normalize=options.normalize and warm,
        nonfinite=options.nonfinite,
        left_out=left_out,
        seed=step,
        shares=shares,
        sketch_error=error,
    )


_NAMES = "the model", "the number of the step", "the buckets of the step", "the weights so far"


class Marks:
    """What all ranks must have done alike in a step, as a few numbers that travel with a Gramian.

    A rank that skipped a step, or whose weights are others, shows at the next Gramian, on every
    rank. (On a GPU that waits for nothing: it shows at the start of a later step, and without the
    weights.) They are made for a model, named in words, when its ranks have met over the wire.

    Attributes:
        left_out: the groups that get no weight in this step, from now on.
    """

    def __init__(self, wire: Wire, model: str) -> None:
        self._wire, self._model, self._number = wire, model, wire.number
        self._weights = 0
        self._told: list[tuple[int, Later]] = []
        self._start(0)

    def begin(self, step: int) -> None:
        """Start on a pass. ValueError on every rank that is told of a difference."""
        while self._told and self._told[0][1].ready:
            told, differs = self._told.pop(0)
            found = [name for name, bad in zip(_NAMES, differs.read().tolist(), strict=True) if bad]
            if found:
                self._told = []
                raise ValueError(
                    f"grain_ddp: {found[0]} differed between ranks in step {told} (this is rank "
                    f"{self._wire.whole.rank}), so that the gradients of different steps or models "
                    "were mixed. Let every rank take every step, with the same model, and resume "
                    "from a checkpoint."
                )
        self._wire.come_to(self._number, self._model)
        self._start(step)

    def _start(self, step: int) -> None:
        self._step, self._layout, self._buckets = step, 0, list[str]()
        self.left_out = list[int]()

    def push(self, count: int, dtype: torch.dtype) -> None:
        """Note so many elements of the step."""
        self._buckets.append(f"{count} x {dtype}")
        self._layout = zlib.crc32(self._buckets[-1].encode(), self._layout)

    def weigh(self, weights: AnyWeights) -> None:
        """Note weights that were found."""
        if isinstance(weights, Weights):
            self._weights = zlib.crc32(weights.weights.tobytes(), self._weights)

    def numbers(self, device: torch.device) -> Tensor:
        """The marks m and their squares, float64: if Σm = n·m and Σm² = n·m², all have the same."""
        values = (self._number, self._step, self._layout, self._weights)
        marks = [value % _PRIME for value in values]
        numbers = torch.tensor([*marks, *(m * m for m in marks)], dtype=torch.float64)
        return to_device(numbers, device)

    def compare(self, own: Tensor, sums: Tensor, *, later: bool) -> None:
        """Given the sums of all ranks' numbers: ValueError on every rank if they differ.

        `later`: not now, but in `begin`.
        """
        expected = own * self._wire.whole.size
        if later:
            self._told.append((self._step, Later((sums != expected).view(2, -1).any(0))))
        elif sums.tolist() != expected.tolist():
            self._differ()

    def _differ(self) -> NoReturn:
        self._wire.whole.agree(
            {
                "the model": f"model {self._number}, {self._model}",
                "the number of the step": self._step,
                "the buckets of the step": self._buckets,
                "the weights so far (a checksum)": self._weights,
            }
        )
        raise ValueError(
            "grain_ddp: the ranks are at different places of the program (this is rank "
            f"{self._wire.whole.rank}). Let every rank take every step, with the same model."
        )


class GramianSum:
    """The Gramian of some columns on its way: started here, `weights` when they are wanted.

    ``total`` [r, r] is the Gramian of this rank's `columns`, of one scope, which have arrived.
    Of sketches it has an `error`, a scalar; or, where each row is a rank's, it is put right by all
    ranks' exact squared norms, of which `square` is this one's.
    """

    def __init__(
        self,
        state: GrainState,
        wire: Wire,
        total: Tensor,
        columns: Sequence[Columns],
        marks: Marks,
        *,
        grouping: Grouping,
        square: Tensor | None = None,
        error: Tensor | None = None,
    ) -> None:
        self._state, self._wire, self._columns, self._marks = state, wire, columns, marks
        self._grouping, self._square, self._error = grouping, square, error
        self._left_out = marks.left_out
        self._inside = False  # whether rows cancel inside of a group
        self.exact = False  # whether the weights are those of an exact Gramian
        self._found: AnyWeights | None = None
        self._start(total)

    def _start(self, gramian: Tensor) -> None:
        """Start to sum all that travels, by name, in one message."""
        self._size, batches = len(gramian), self._state.batches
        parts = {"triangle": upper(gramian)}
        if self._square is not None:
            parts["squares"] = gramian.new_zeros(self._wire.size)
            parts["squares"][self._wire.rank] = self._square
        if batches.told:
            whole = self._wire.whole
            parts["batches"] = batches.numbers(whole.rank, whole.size, gramian)
        parts["marks"] = self._marks.numbers(gramian.device)
        self._parts = parts
        self.transfer, self._rows = self._wire.sum(torch.cat(list(parts.values())))

    def weights(self) -> AnyWeights:
        """The weights, the same on every rank; before any of the columns is reduced.

        Where the gradients cancel so far that rounding would show, which all ranks see alike, they
        are those of a Gramian made anew in float64. ValueError on every rank if the ranks differ.
        """
        if self._found is None:
            self._found = found = self._find()
            if isinstance(found, Weights) and any(self._cancels(found, c) for c in self._columns):
                self._start(torch.stack([c.gramian(exact=True) for c in self._columns]).sum(0))
                self._found, self.exact = self._find(), True
            self._columns = ()
        return self._found

    def _cancels(self, found: Weights, columns: Columns) -> bool:
        """Whether rounding shows: in the sum of the groups, or in the mean of one."""
        inside = self._inside and columns.dtype != torch.float64
        return inside or found.cancels(columns.dtype)

    def factors_for(self, gradient: Tensor) -> tuple[Tensor, list[int]]:
        """What rows like this gradient are multiplied with, and which are left out."""
        found = self.weights()
        factors = found.factors_for(gradient, exact=self.exact)
        return self._grouping.spread(factors), self._grouping.members(found.dropped)

    def _find(self) -> AnyWeights:
        self.transfer.wait()
        sums = self._rows.sum(0).split_with_sizes(list(map(len, self._parts.values())))
        found = dict(zip(self._parts, sums, strict=True))
        marks = found["marks"]
        self._marks.compare(self._parts["marks"], marks, later=marks.device.type != "cpu")
        gramian, error = full(found["triangle"], self._size), self._error
        if "squares" in found:
            gramian, error = rescale(gramian, found["squares"])
        batches = found.get("batches")
        left_out = self._left_out if batches is None else self._group(batches)
        state, grouping = self._state, self._grouping
        self._inside = grouping.cancels(gramian)
        gramian = grouping.gramian(gramian)
        weights = weights_of(state.options, state.step, gramian, grouping.shares, error, left_out)
        self._marks.weigh(weights)
        return weights

    def _group(self, numbers: Tensor) -> list[int]:
        """Make groups of what all ranks say of their batches. Those that are left out."""
        batches = self._state.batches
        batches.last = rows = batches.rows(numbers)
        if self._state.options.groups == "label":
            counts = np.ones(self._size) if rows.samples is None else rows.samples.copy()
            counts[list(self._left_out)] = 0  # single rows, until now
            members, out = batches.members(rows), set(self._left_out)
            self._grouping = Grouping(members, counts)
            return [
                g for g, group in enumerate(members) if out & set(group) and not counts[group].any()
            ]
        if rows.samples is not None:
            self._grouping = Grouping(self._grouping.groups, rows.samples)
        return self._left_out


def record_of(
    state: GrainState, buckets: Sequence[AnyWeights], suspects: tuple[Suspect, ...] = ()
) -> StepRecord:
    """The record of a step with these weights, one for each bucket."""
    step, single, said = state.step, state.options.scope == "global", dict[str, Any]()
    if single:
        buckets = buckets[:1]
    rows = state.batches.last
    if rows is not None:
        said = {"samples": rows.samples, "losses": rows.losses}
        if state.options.groups == "label":
            said["labels"] = tuple(state.batches.labels)
    if any(isinstance(weights, DeviceWeights) for weights in buckets):
        return PendingRecord(step, lambda: _record_of(step, single, buckets, suspects, said))
    return _record_of(step, single, buckets, suspects, said)


def record_due(
    state: GrainState,
    kind: Kind,
    found: Sequence[AnyWeights],
    suspects: tuple[Suspect, ...],
    n: int,
) -> StepRecord | None:
    """The record of a step of n groups, if one is due or a rank is suspect."""
    if kind.has_gramian and (state.options.records(state.step) or suspects):
        return record_of(state, found, suspects)
    if not suspects:
        return None
    if state.options.groups == "label":  # as many as in the records beside it
        n = len(state.batches.labels) or n
    return record_of(state, [uniform(n)], suspects)


def _record_of(
    step: int,
    single: bool,
    found: Sequence[AnyWeights],
    suspects: tuple[Suspect, ...],
    said: dict[str, Any],
) -> StepRecord:
    buckets = [w.read() if isinstance(w, DeviceWeights) else w for w in found]
    if single:
        return StepRecord(step, **vars(buckets[0]), suspects=suspects, **said)
    errors = [w.sketch_error for w in buckets if w.sketch_error is not None]
    return StepRecord(
        step,
        np.stack([w.gramian for w in buckets]),
        np.stack([w.weights for w in buckets]),
        np.array([w.gap for w in buckets]),
        tuple(w.status for w in buckets),
        tuple(w.active for w in buckets),
        tuple(w.dropped for w in buckets),
        max(errors, default=None),
        suspects,
        **said,
    )
