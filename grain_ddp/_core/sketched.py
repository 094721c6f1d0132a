"""The Gramian from a sketch of each gradient, and the backend's own reduction for the rest.

Every rank adds its gradient into k sums. Only these are exchanged, as columns; each rank then
weighs its gradient by its own weight, and what the backend sums is the aggregate. So the bytes on
every link are those of plain averaging and k numbers, however many ranks share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grain_ddp._core.agreement import GramianSum, Marks
from grain_ddp._core.columns import Columns
from grain_ddp._core.groups import Grouping, in_levels, levels
from grain_ddp._core.options import Options
from grain_ddp._core.scratch import Scratch
from grain_ddp._core.stages import Bucket, Stages
from grain_ddp._core.state import GrainState
from grain_ddp._core.transposed import (
    SCRATCH_BYTES,
    Transposed,
    cut_columns,
    mean_inside,
    message_bytes,
    own_slice,
)
from grain_ddp._math.sketch import Sketch
from grain_ddp._wire.wire import Transfer, Wire

WATCHING = 1 << 18
"""The size of the sketch where it only serves the record, unless the options say another."""

MANY = 16 * WATCHING
"""A gradient of fewer numbers is watched without a sketch, which would not be small beside it."""


def sketch_size(options: Options, wire: Wire, numbers: int) -> int | None:
    """How many sums of a gradient are exchanged; None: all of its numbers are.

    Where nothing but the mean is wanted, and watching it, a sketch is the default if the last step
    had many `numbers`: the backend's own all-reduce then makes the mean, as if nobody watched.
    Ranks that read each other's memory are faster without it.
    """
    if wire.size == 1:
        return None
    if options.sketch is not None:
        return options.sketch
    watches = options.watches and options.microbatches == 1 and options.wire_dtype is None
    near = wire.shares_memory(torch.device("cpu")) and wire.device.type == "cpu"
    return WATCHING if watches and not near and numbers >= MANY else None


class Sketches:
    """How sketches of all ranks' gradients become a Gramian of the groups.

    A sketch is linear: that of a group's mean gradient is the mean of its ranks' sketches. So
    groups of one size make it inside first, and only these are compared; the exact norms of the
    ranks' gradients, by which a Gramian of ranks is put right, do not help there. Of groups of
    several sizes the Gramian of all ranks is formed.
    """

    def __init__(
        self,
        state: GrainState,
        wire: Wire,
        groups: Sequence[Sequence[int]],
        marks: Marks,
        k: int,
    ) -> None:
        self.state, self.marks, self.k = state, marks, k
        self.inside: Wire | None = None
        self.across, self.grouping = wire, Grouping(groups)
        self.wire, self.rows = wire, len(groups)
        self._places = Grouping([[rank] for rank in range(wire.size)])
        if in_levels(groups, state):
            self.inside, self.across = levels(groups, wire)
            self.grouping = Grouping([[row] for row in range(len(groups))])
            self._places = Grouping(groups)
        self.drop()

    def drop(self) -> None:
        """Forget what is under way."""
        self.scratch, self.scratch_inside = Scratch(), Scratch()

    def empty(self, like: Tensor, most: int) -> Sketch:
        """Of a gradient of at most so many numbers."""
        return Sketch(min(self.k, most), like, self.state.step)

    def weight(self, summed: GramianSum, like: Tensor) -> Tensor:
        """This rank's own weight, a scalar, for a gradient like that."""
        factors, _ = summed.factors_for(like)
        return self._places.spread(factors)[self.wire.rank]


class Exchange:
    """A sketch of this rank's gradient on its way: sent here; `sum` is called once, then `end`.

    What travels is in bfloat16, unless the sketch has room for every number: rounding adds to the
    error less than a hundredth of it.
    """

    def __init__(self, sketches: Sketches, sketch: Sketch) -> None:
        self._sketches, self._sketch, self._sums = sketches, sketch, sketch.sums
        self.inside: list[Columns] = []
        self.columns: list[Columns] = []
        if sketches.inside is None:
            self._cross()
        else:
            self.inside = self._cut(sketches.inside)
            for columns in self.inside:
                columns.send(sketches.scratch_inside, SCRATCH_BYTES)

    def _cut(self, wire: Wire, total: Tensor | None = None) -> list[Columns]:
        message = -(-message_bytes(self._sums, wire.size) // self._sums.itemsize)
        narrow = None if self._sketch.exact else torch.bfloat16
        return cut_columns(self._sums, wire, message, narrow=narrow, total=total)

    def _cross(self) -> None:
        n = self._sketches.across.size
        self._total = torch.zeros(n, n, dtype=torch.float64, device=self._sums.device)
        self.columns = self._cut(self._sketches.across, self._total)
        for columns in self.columns:
            columns.send(self._sketches.scratch, SCRATCH_BYTES)

    def sum(self) -> GramianSum:
        """Receive all sketches, in columns, and start to sum the Gramian."""
        sketches = self._sketches
        if sketches.inside is not None:
            mean_inside(self.inside)
            self._sums = own_slice(self._sums, sketches.inside)
            self._cross()
        for columns in self.columns:
            columns.arrive()
        by_rank = sketches.inside is None
        return GramianSum(
            sketches.state,
            sketches.across,
            self._total,
            (),
            sketches.marks,
            grouping=sketches.grouping,
            square=self._sketch.square if by_rank else None,
            error=None if by_rank else self._sketch.expected_error,
        )

    @property
    def transfers(self) -> list[Transfer]:
        """What may be under way."""
        return [columns.transfer for columns in self.inside + self.columns]

    def end(self) -> None:
        """Give the memory back, when others have read it."""
        for columns in self.inside + self.columns:
            columns.end()
        self.inside, self.columns = [], []


class Sketched(Stages):
    """A sketch is exchanged for the weights; the gradients are weighed and summed as plain ones."""

    def __init__(self, sketches: Sketches) -> None:
        super().__init__(sketches.state, sketches.marks)
        self._sketches, wire = sketches, sketches.wire
        self.wire, self.rows, self.inside = wire, sketches.rows, sketches.inside is not None
        ranks = [[rank] for rank in range(wire.size)]
        self._plain = Transposed(sketches.state, wire, ranks, sketches.marks)
        self.passes = self._plain.passes
        self.drop()

    def drop(self) -> None:
        self._sketch: Sketch | None = None  # of the step, in global scope
        self._entered: list[Bucket] = []  # that are weighed, and may wait for others' rows
        self._sketches.drop()
        self._plain.drop()

    def message(self, buffer: Tensor) -> int:
        return self._plain.message(buffer)

    def advance(self) -> None:
        self._plain.advance()

    def enter(self, bucket: Bucket) -> None:
        buffer, sketches = bucket.buffer, self._sketches
        if self.kind.has_gramian and self.options.scope == "bucket":
            sketch = sketches.empty(buffer, len(buffer))
            sketch.add(buffer)
            bucket.exchange = Exchange(sketches, sketch)
        elif self.kind.has_gramian:
            self._sketch = self._sketch or sketches.empty(buffer, sketches.k)
            self._sketch.add(buffer)
        if self.kind.averages:
            self._plain.enter(bucket)

    def arrive(self, bucket: Bucket) -> None:
        if self.kind.averages:
            self._plain.arrive(bucket)
        if bucket.exchange is not None and bucket.sum is None:
            bucket.sum = bucket.exchange.sum()

    def sum(self, buckets: Sequence[Bucket]) -> None:
        assert self._sketch is not None
        exchange = buckets[-1].exchange = Exchange(self._sketches, self._sketch)
        summed = exchange.sum()
        for bucket in buckets:
            bucket.sum = summed

    def reduce(self, bucket: Bucket) -> None:
        if self.kind.averages:
            self._plain.reduce(bucket)
            return
        if bucket.weighed:
            return
        bucket.weighed = True
        assert bucket.sum is not None
        self._plain.enter(bucket, self._sketches.weight(bucket.sum, bucket.buffer))
        self._entered.append(bucket)
        if len(self._entered) > 1:  # before the next weights: a rank may wait for this to be read
            self._finish(self._entered.pop(0))

    def _finish(self, bucket: Bucket) -> None:
        self._plain.arrive(bucket)
        self._plain.reduce(bucket)

    def cross(self, bucket: Bucket) -> None:
        """All ranks are on one side."""

    def complete(self, buckets: Sequence[Bucket]) -> None:
        for bucket in self._entered:
            self._finish(bucket)
        self._plain.complete(buckets)
        for bucket in buckets:
            if bucket.exchange is not None:
                bucket.exchange.end()
        self._sketch, self._entered = None, []
