"""The transpose-reduce: the Gramian of the rows themselves, and their weighted sum.

An all-reduce is a reduce-scatter and an all-gather. Here every rank first receives its slice of all
the gradients, the transposed rows. Their Gramian, summed over the ranks, gives the weights at the
cost of n² numbers; then the weighted slices are gathered.

Groups of several ranks come before and after that: inside a group every rank comes to hold a slice
of the group's mean gradient, by the same stages with weights 1/k; the transpose-reduce then runs
among the ranks that hold the same slice of their group's, so that a link between groups of k ranks
carries 1/k of the gradient; at the end the slices are gathered inside. Where groups differ in size
all ranks exchange their rows, and the groups are made of the Gramian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grain_ddp._core.agreement import GramianSum, Marks
from grain_ddp._core.columns import Columns
from grain_ddp._core.groups import Grouping, in_levels, levels
from grain_ddp._core.options import Kind
from grain_ddp._core.passes import Passes
from grain_ddp._core.scratch import Scratch
from grain_ddp._core.stages import Bucket, Stages
from grain_ddp._core.state import GrainState
from grain_ddp._core.views import cut
from grain_ddp._math.gramian import weigh_
from grain_ddp._wire.wire import Transfer, Wire

MESSAGE_BYTES = 4 << 20
"""On a CPU a slice travels in messages of about this size: one is worked on while others move."""

SCRATCH_BYTES = 48 << 20
"""Bound of the memory for rows that arrive; twice the step's largest bucket, if that is less.

DDP's buckets have 25 MiB, and all that is held beside them shall be less than two."""


def cut_columns(
    buffer: Tensor,
    wire: Wire,
    message: int,
    blocks: Sequence[Tensor] = (),
    passes: int = 1,
    **how: Any,
) -> list[Columns]:
    """A buffer, cut among the ranks of a wire, and into messages.

    `blocks` hold several `passes` in its place, as `Passes` lays them out.
    """
    n, width = wire.size, len(buffer) // wire.size
    matrix, every = buffer[: width * n].view(n, width), []
    for k, slices in enumerate(cut(len(buffer), n, message)):
        home, block = matrix[:, slices[0]], None
        slots = [[view] for view in (*home[:-1].unbind(), buffer[slices[-1]])]
        if blocks:
            block, rows = blocks[k], n * passes
            home = block[: rows * home.shape[1]].view(rows, home.shape[1])
        every.append(Columns(wire, slots, home=home, block=block, **how))
    return every


def own_slice(buffer: Tensor, wire: Wire) -> Tensor:
    """Where `cut_columns` has this rank's columns."""
    width, me = len(buffer) // wire.size, wire.rank
    return buffer[width * me : len(buffer) if me == wire.size - 1 else width * (me + 1)]


def equal(n: int, like: Tensor) -> Tensor:
    """The factors of a mean of n rows, where a tensor is."""
    return torch.full((n,), 1 / n, dtype=torch.float64, device=like.device)


def mean_inside(every: Sequence[Columns]) -> None:
    """Complete the exchange inside of a group: the own columns hold its mean."""
    for columns in every:
        columns.arrive()
        columns.reduce(equal(columns.wire.size, columns.own[0]))


class Transposed(Stages):
    """Rows are exchanged, weighed and gathered; or the backend averages, where that is all."""

    def __init__(
        self, state: GrainState, wire: Wire, groups: Sequence[Sequence[int]], marks: Marks
    ) -> None:
        super().__init__(state, marks)
        m = self.options.microbatches
        self.rows = len(groups) * m
        self._grouping = Grouping([[row] for row in range(self.rows)])
        self._inside: Wire | None = None
        if in_levels(groups, state):
            self._inside, wire = levels(groups, wire)
            self.inside = self._inside is not None
            self.lag = int(self.inside)
        elif m == 1:
            self._grouping = Grouping(groups)
        self.wire = wire
        self._exchanged = wire.size * m  # rows, of which the groups may be made
        self.passes = Passes(wire.size, m)
        self._largest = 0  # bytes of a bucket, in this step or the last one
        self.drop()

    def drop(self) -> None:
        self._gathering: list[Transfer] = []  # what may have several stages
        self._scratch, self._scratch_inside = Scratch(), Scratch()
        self._largest = 0  # bytes of a bucket, in this step or the last one
        self.passes.drop()

    def message(self, buffer: Tensor) -> int:
        size = message_bytes(buffer, self.wire.whole.size)
        return -(-size // (buffer.itemsize * self.options.microbatches))

    def advance(self) -> None:
        self._gathering = [transfer for transfer in self._gathering if transfer.advance()]

    def enter(self, bucket: Bucket, weight: Tensor | None = None) -> None:
        """Start what comes first: the mean of all ranks, or of the group, or the transpose.

        With a `weight`, a scalar, this rank's gradient is weighed by it, and the mean is a sum.
        """
        buffer, whole = bucket.buffer, self.wire.whole
        narrow = self.options.narrow(buffer.dtype)
        plain = self.kind is Kind.PLAIN_MEAN or weight is not None
        if plain and narrow is None and not whole.shares_memory(buffer.device):
            if bucket.blocks:
                self.passes.mean(bucket.blocks, buffer, self.message(buffer))
            if weight is None:
                buffer.div_(whole.size)
            else:
                weigh_(buffer, weight)
            bucket.transfer = whole.all_reduce(buffer, "the gradients")
            bucket.crossed = bucket.arrived = bucket.reduced = True
            return
        if weight is not None:
            weigh_(buffer, weight * whole.size)
        if self._inside is None:
            self.cross(bucket)
            return
        message = self.message(buffer)
        bucket.inside = cut_columns(buffer, self._inside, message, narrow=narrow)
        for columns in bucket.inside:
            columns.send(self._scratch_inside, _scratch_inside_bytes())
        bucket.own = own_slice(buffer, self._inside)

    def cross(self, bucket: Bucket) -> None:
        if bucket.crossed:
            return
        bucket.crossed = True
        if self._inside is not None:
            mean_inside(bucket.inside)
        own = bucket.own
        if self.kind.has_gramian:
            size = (self._exchanged, self._exchanged)
            bucket.gramian = torch.zeros(size, dtype=torch.float64, device=own.device)
        bucket.columns = cut_columns(
            own,
            self.wire,
            self.message(own),
            blocks=bucket.blocks,
            passes=self.options.microbatches,
            narrow=self.options.narrow(own.dtype),
            total=bucket.gramian,
        )
        self._largest = max(self._largest, own.nbytes)
        for columns in bucket.columns:
            columns.send(self._scratch, self._limit(columns))

    def arrive(self, bucket: Bucket) -> None:
        if bucket.arrived:
            return
        bucket.arrived = True
        for columns in bucket.columns:
            columns.arrive()
        if bucket.gramian is not None and self.options.scope == "bucket":
            self.sum([bucket])

    def sum(self, buckets: Sequence[Bucket]) -> None:
        total = torch.stack([b.gramian for b in buckets if b.gramian is not None]).sum(0)
        columns = [columns for bucket in buckets for columns in bucket.columns]
        summed = GramianSum(
            self.state, self.wire, total, columns, self.marks, grouping=self._grouping
        )
        for bucket in buckets:
            bucket.sum = summed

    def reduce(self, bucket: Bucket) -> None:
        """Replace this rank's columns by their weighted sum, and start to gather all columns."""
        if bucket.reduced:
            return
        bucket.reduced = True
        if self.kind.averages:
            factors, dropped, exact = equal(self._exchanged, bucket.buffer), list[int](), False
        else:
            assert bucket.sum is not None
            factors, dropped = bucket.sum.factors_for(bucket.buffer)
            exact = bucket.sum.exact
        if self._exchanged == 1:
            if dropped:
                bucket.buffer.zero_()
            return
        for columns in bucket.columns:
            columns.reduce(factors, dropped, exact=exact)
            self._gathering.append(columns.gather(self._scratch, self._limit(columns)))

    def complete(self, buckets: Sequence[Bucket]) -> None:
        while self._gathering:
            self.advance()
        for bucket in buckets:
            for columns in bucket.columns:
                columns.transfer.arrive()
        for bucket in buckets:
            bucket.transfer.wait()
            for columns in bucket.columns:
                columns.complete()
            for columns in bucket.inside:
                self._gathering.append(
                    columns.gather(self._scratch_inside, _scratch_inside_bytes())
                )
        while self._gathering:
            self.advance()
        for bucket in buckets:
            for columns in bucket.inside:
                columns.complete()
        self._largest = max(bucket.own.nbytes for bucket in buckets)

    def _limit(self, columns: Columns) -> int:
        """Bytes of scratch for rows that arrive from other groups."""
        # Inside of groups there is a need for more.
        limit = SCRATCH_BYTES if self._inside is None else SCRATCH_BYTES - _scratch_inside_bytes()
        if columns.narrow:  # of one piece, widened by the passes over it
            limit -= self._exchanged * sum(map(len, columns.own)) * columns.own[0].itemsize
        return min(limit, 2 * self._largest)


def message_bytes(buffer: Tensor, n: int) -> int:
    """How much of one row travels together, of n."""
    return MESSAGE_BYTES if buffer.device.type == "cpu" else SCRATCH_BYTES // n


def _scratch_inside_bytes() -> int:
    return SCRATCH_BYTES * 3 // 5
