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
from grain_ddp._core.groups import Grouping
from grain_ddp._core.options import Options
from grain_ddp._core.scratch import Scratch
from grain_ddp._core.stages import Bucket, Stages
from grain_ddp._core.state import GrainState
from grain_ddp._core.transposed import SCRATCH_BYTES, Transposed, cut_columns, message_bytes
from grain_ddp._math.sketch import Sketch
from grain_ddp._wire.wire import Wire

WATCHING = 1 << 18
"""The size of the sketch where it only serves the record, unless the options say another."""


def sketch_size(options: Options, wire: Wire) -> int | None:
    """How many sums of a gradient are exchanged; None: all of its numbers are.

    Where nothing but the mean is wanted, and watching it, a sketch is the default: the backend's
    own all-reduce then makes the mean, as if nobody watched. Ranks that read each other's memory
    are faster without it.
    """
    if wire.size == 1:
        return None
    if options.sketch is not None:
        return options.sketch
    watches = options.watches and options.microbatches == 1 and options.wire_dtype is None
    near = wire.shares_memory(torch.device("cpu")) and wire.device.type == "cpu"
    return WATCHING if watches and not near else None


class Exchange:
    """A sketch of this rank's gradient on its way: sent here; `sum` is called once, then `end`.

    What travels is in bfloat16, unless the sketch has room for every number: rounding adds to the
    error less than a hundredth of it.
    """

    def __init__(self, sketch: Sketch, wire: Wire, scratch: Scratch) -> None:
        sums, n = sketch.sums, wire.size
        self._sketch, self._wire = sketch, wire
        self._total = torch.zeros(n, n, dtype=torch.float64, device=sums.device)
        self.columns = cut_columns(
            sums,
            wire,
            -(-message_bytes(sums, n) // sums.itemsize),
            narrow=None if sketch.exact else torch.bfloat16,
            total=self._total,
        )
        for columns in self.columns:
            columns.send(scratch, SCRATCH_BYTES)

    def sum(self, state: GrainState, grouping: Grouping, marks: Marks) -> GramianSum:
        """Receive all ranks' sketches, in columns, and start to sum the Gramian."""
        for columns in self.columns:
            columns.arrive()
        square = self._sketch.square
        return GramianSum(
            state, self._wire, self._total, (), marks, grouping=grouping, square=square
        )

    def end(self) -> None:
        """Give the memory back, when others have read it."""
        for columns in self.columns:
            columns.end()
        self.columns = []


class Sketched(Stages):
    """A sketch is exchanged for the weights; the gradients are weighed and summed as plain ones."""

    def __init__(
        self,
        state: GrainState,
        wire: Wire,
        groups: Sequence[Sequence[int]],
        marks: Marks,
        k: int,
    ) -> None:
        super().__init__(state, marks)
        self.wire, self.rows, self._k = wire, len(groups), k
        self._grouping = Grouping(groups)
        self._plain = Transposed(state, wire, [[rank] for rank in range(wire.size)], marks)
        self.passes = self._plain.passes
        self.drop()

    def drop(self) -> None:
        self._sketch: Sketch | None = None  # of the step, in global scope
        self._exchanges: dict[int, Exchange] = {}  # not ended, by their bucket
        self._entered: list[Bucket] = []  # that are weighed, and may wait for others' rows
        self._scratch = Scratch()
        self._plain.drop()

    def message(self, buffer: Tensor) -> int:
        return self._plain.message(buffer)

    def advance(self) -> None:
        self._plain.advance()

    def enter(self, bucket: Bucket) -> None:
        buffer, step = bucket.buffer, self.state.step
        if self.kind.has_gramian and self.options.scope == "bucket":
            sketch = Sketch(min(self._k, len(buffer)), buffer, step)
            sketch.add(buffer)
            self._send(sketch, bucket)
        elif self.kind.has_gramian:
            self._sketch = self._sketch or Sketch(self._k, buffer, step)
            self._sketch.add(buffer)
        if self.kind.averages:
            self._plain.enter(bucket)

    def _send(self, sketch: Sketch, bucket: Bucket) -> None:
        exchange = self._exchanges[id(bucket)] = Exchange(sketch, self.wire, self._scratch)
        bucket.sketched = exchange.columns

    def arrive(self, bucket: Bucket) -> None:
        if self.kind.averages:
            self._plain.arrive(bucket)
        if id(bucket) in self._exchanges and bucket.sum is None:
            self._receive([bucket])

    def _receive(self, buckets: Sequence[Bucket]) -> None:
        exchange = self._exchanges[id(buckets[-1])]
        summed = exchange.sum(self.state, self._grouping, self.marks)
        for bucket in buckets:
            bucket.sum = summed

    def sum(self, buckets: Sequence[Bucket]) -> None:
        assert self._sketch is not None
        self._send(self._sketch, buckets[-1])
        self._receive(buckets)

    def reduce(self, bucket: Bucket) -> None:
        if self.kind.averages:
            self._plain.reduce(bucket)
            return
        if bucket.weighed:
            return
        bucket.weighed = True
        assert bucket.sum is not None
        factors, _ = bucket.sum.factors_for(bucket.buffer)
        self._plain.enter(bucket, factors[self.wire.rank])
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
        for exchange in self._exchanges.values():
            exchange.end()
        self._sketch, self._exchanges, self._entered = None, {}, []
