"""The transpose-reduce, for all ranks: every one gets the whole result.

An all-reduce is a reduce-scatter and an all-gather. Here every rank first receives its slice of all
the gradients, the transposed rows. Their Gramian, summed over the ranks, gives the weights at the
cost of n² numbers; then the weighted slices are gathered.

Groups of several ranks come before and after that: inside a group every rank comes to hold a slice
of the group's mean gradient, by the same stages with weights 1/k; the transpose-reduce then runs
among the ranks that hold the same slice of their group's, so that a link between groups of k ranks
carries 1/k of the gradient; at the end the slices are gathered inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grain_ddp._core.agreement import AnyWeights, GramianSum, Marks, record_of
from grain_ddp._core.columns import Columns
from grain_ddp._core.groups import partition
from grain_ddp._core.options import Kind
from grain_ddp._core.passes import Parts, Passes
from grain_ddp._core.scratch import Scratch
from grain_ddp._core.state import GrainState, Owner
from grain_ddp._math.record import StepRecord
from grain_ddp._math.weighting import uniform
from grain_ddp._wire.wire import Transfer, Wire, cut

MESSAGE_BYTES = 4 << 20
"""On a CPU a slice travels in messages of about this size: one is worked on while others move."""

SCRATCH_BYTES = 48 << 20
"""Bound of the memory for rows that arrive; twice the step's largest bucket, if that is less.

DDP's buckets have 25 MiB, and all that is held beside them shall be less than two."""


class _Bucket:
    """One buffer of a step, and how far it has come."""

    def __init__(self, buffer: Tensor, done: Callable[[], object] | None) -> None:
        self.buffer, self.done = buffer, done
        self.own = buffer  # what the groups exchange: in a group of several ranks a slice
        self.blocks: list[Tensor] = []  # of several passes
        self.inside: list[Columns] = []  # exchanged inside of the group
        self.columns: list[Columns] = []  # exchanged between the groups
        self.crossed = self.arrived = self.reduced = False
        self.gramian: Tensor | None = None
        self.sum: GramianSum | None = None  # of its Gramian; or the step's
        self.weights: AnyWeights | None = None
        self.transfer = Transfer()  # of the whole buffer, where the backend averages it

    @property
    def transfers(self) -> list[Transfer]:
        """Everything that may be under way."""
        own = [self.transfer] if self.sum is None else [self.transfer, self.sum.transfer]
        return own + [columns.transfer for columns in self.inside + self.columns]


class Aggregation:
    """A model's gradient aggregation over a wire: `push` each bucket of a step, then `finish`.

    Every rank pushes buffers of the same lengths and dtypes in the same order. The results are in
    the buffers when `finish` returns (on a GPU: in the order of the current stream).

    Work advances only inside these calls, by counting buckets and never by looking at what has
    arrived, so that all ranks issue the same messages in the same order.
    """

    gone = False

    def __init__(self, state: GrainState, wire: Wire, owner: Owner | None = None) -> None:
        state.bind(owner or self, wire)
        options = state.options
        groups = partition(options.groups, wire)
        mine = next(group for group in groups if wire.rank in group)
        position = mine.index(wire.rank)
        self._inside = wire.among(mine, 1) if len(mine) > 1 else None
        if [group[0] for group in groups] != list(range(wire.size)):
            wire = wire.among([group[position] for group in groups], 2)
        self.state, self.options, self.wire = state, options, wire
        self.size = wire.size * options.microbatches  # groups: the rows of the Gramian
        self._passes = Passes(wire.size, options.microbatches)
        self._marks = Marks(self.wire, str(owner or self))
        self._stream: torch.cuda.Stream | None = None
        self.drop()

    def __str__(self) -> str:
        return "an aggregation of its own"

    def drop(self) -> None:
        """Forget what is under way."""
        self._buckets: list[_Bucket] = []
        self._kind = Kind.PLAIN_MEAN  # of the step, from its first bucket on
        self._gathering: list[Transfer] = []  # what may have several stages
        self._scratch, self._scratch_inside = Scratch(), Scratch()
        self._largest = 0  # bytes of a bucket, in this step or the last one
        self._passes.drop()

    def abandon(self) -> None:
        """Let what is under way arrive, then forget it: after a step that broke off elsewhere."""
        try:
            for transfer in [t for bucket in self._buckets for t in bucket.transfers]:
                transfer.wait()
        finally:
            self.drop()

    @property
    def pending(self) -> bool:
        """Whether a pass has begun and not finished."""
        return bool(self._buckets)

    def push(
        self, buffer: Tensor, done: Callable[[], object] | None = None, parts: Parts | None = None
    ) -> None:
        """Start on a bucket: flat, contiguous, this rank's gradient now and the result later.

        `done` is called by `finish`, when the result is in the buffer. `parts` is what lies in
        the bucket, if other passes of the step may have other buckets.
        """
        with self._work(buffer.device):
            if not self._buckets:
                self._marks.begin(self.state.step)
                if not self._passes.done:
                    self._kind = self.options.kind(self.state.step)
            bucket = _Bucket(buffer, done)
            self._buckets.append(bucket)
            self._marks.push(len(buffer), buffer.dtype)
            if self.options.microbatches > 1:
                parts = parts or [(len(self._buckets), len(buffer))]
                bucket.blocks = self._passes.add(buffer, parts, self._message(buffer))
                if not self._last_pass:
                    buffer.zero_()
                    return
            self._advance()

    def finish(self) -> StepRecord | None:
        """Complete the step: the results are in the buffers. The record, if one is due."""
        buckets, record = self._buckets, None
        device = buckets[0].buffer.device
        with self._work(device):
            if self._last_pass:
                self._arrive_all()
                self._reduce_all()
                self._complete_all()
                if self.options.records(self.state.step) and self._kind.has_gramian:
                    found = [bucket.weights for bucket in buckets if bucket.weights is not None]
                    record = record_of(self.state, found)
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        self._buckets = []
        self._largest = max(bucket.own.nbytes for bucket in buckets)
        for bucket in buckets:
            if bucket.done is not None:
                bucket.done()
        if self._last_pass:
            self._passes.drop()
            self.state.advance(record)
        else:
            self._passes.done += 1
        return record

    @property
    def _last_pass(self) -> bool:
        return self._passes.done == self.options.microbatches - 1

    # A step: stage by stage, each bucket one stage behind the next.

    def _advance(self) -> None:
        """One more bucket is there: start on it, and take those before it one stage on."""
        self._advance_gathers()
        lag = 0 if self._inside is None else 1  # the stage inside of the group
        if self._kind is not Kind.WEIGHTS_PER_STEP:
            # Two buckets back: its Gramian has long arrived, and its scratch is needed now.
            self._reduce(self._back(2 + lag))
        if lag:
            self._cross(self._back(1))
        self._enter(self._buckets[-1])
        self._arrive(self._back(1 + lag))

    def _back(self, count: int) -> _Bucket | None:
        return self._buckets[-1 - count] if count < len(self._buckets) else None

    def _arrive_all(self) -> None:
        buckets = self._buckets
        for bucket in buckets:
            self._cross(bucket)
        for bucket in buckets:
            self._arrive(bucket)
        # Before any gather, so that the Gramian does not queue behind it.
        if self._kind.has_gramian and self.options.scope == "global":
            self._sum(buckets)

    def _reduce_all(self) -> None:
        for bucket in self._buckets:
            self._reduce(bucket)
        if self._kind is Kind.RECORDED_MEAN:  # the sums are only for the record
            for bucket in self._buckets:
                assert bucket.sum is not None
                bucket.weights = bucket.sum.weights()

    def _complete_all(self) -> None:
        buckets = self._buckets
        while self._gathering:
            self._advance_gathers()
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
            self._advance_gathers()
        for bucket in buckets:
            for columns in bucket.inside:
                columns.complete()

    def _advance_gathers(self) -> None:
        """Take each of them one stage on."""
        self._gathering = [transfer for transfer in self._gathering if transfer.advance()]

    # The stages of a bucket, in order.

    def _enter(self, bucket: _Bucket) -> None:
        """Start what comes first: the mean of all ranks, or of the group, or the transpose."""
        buffer, whole = bucket.buffer, self.wire.whole
        narrow = self.options.narrow(buffer.dtype)
        plain = self._kind is Kind.PLAIN_MEAN and narrow is None
        if plain and not whole.shares_memory(buffer.device):
            if bucket.blocks:
                self._passes.mean(bucket.blocks, buffer, self._message(buffer))
            bucket.transfer = whole.all_reduce(buffer.div_(whole.size), "the mean of a bucket")
            bucket.crossed = bucket.arrived = bucket.reduced = True
        elif self._inside is None:
            self._cross(bucket)
        else:
            bucket.inside = self._cut(buffer, self._inside, narrow=narrow)
            for columns in bucket.inside:
                columns.send(self._scratch_inside, _scratch_inside_bytes())
            k, me = self._inside.size, self._inside.rank
            width = len(buffer) // k
            bucket.own = buffer[width * me : len(buffer) if me == k - 1 else width * (me + 1)]

    def _cross(self, bucket: _Bucket | None) -> None:
        """Start the transpose between the groups; before it, the mean inside of the own one."""
        if bucket is None or bucket.crossed:
            return
        bucket.crossed = True
        if self._inside is not None:
            k = self._inside.size
            equal = torch.full((k,), 1 / k, dtype=torch.float64, device=bucket.buffer.device)
            for columns in bucket.inside:
                columns.arrive()
                columns.reduce(equal)
        own = bucket.own
        if self._kind.has_gramian:
            zeros = (self.size, self.size)
            bucket.gramian = torch.zeros(zeros, dtype=torch.float64, device=own.device)
        bucket.columns = self._cut(
            own,
            self.wire,
            blocks=bucket.blocks,
            narrow=self.options.narrow(own.dtype),
            total=bucket.gramian,
        )
        self._largest = max(self._largest, own.nbytes)
        for columns in bucket.columns:
            columns.send(self._scratch, self._limit(columns))

    def _arrive(self, bucket: _Bucket | None) -> None:
        """Complete the transpose; start to sum the Gramian, if it is the bucket's own."""
        if bucket is None or bucket.arrived:
            return
        bucket.arrived = True
        for columns in bucket.columns:
            columns.arrive()
        if bucket.gramian is not None and self.options.scope == "bucket":
            self._sum([bucket])

    def _reduce(self, bucket: _Bucket | None) -> None:
        """Replace this rank's columns by their weighted sum, and start to gather all columns."""
        if bucket is None or bucket.reduced:
            return
        bucket.reduced = True
        exact = False
        if self._kind.averages:
            bucket.weights = uniform(self.size)
        else:
            assert bucket.sum is not None
            bucket.weights, exact = bucket.sum.weights(), bucket.sum.exact
        if self.size == 1:
            return
        factors = bucket.weights.factors_for(bucket.buffer, exact=exact)
        for columns in bucket.columns:
            columns.reduce(factors, bucket.weights.dropped, exact=exact)
            self._gathering.append(columns.gather(self._scratch, self._limit(columns)))

    def _sum(self, buckets: Sequence[_Bucket]) -> None:
        """Start to sum the Gramian of buckets that share their weights."""
        total = torch.stack([b.gramian for b in buckets if b.gramian is not None]).sum(0)
        columns = [columns for bucket in buckets for columns in bucket.columns]
        summed = GramianSum(self.state, self.wire, total, columns, self._marks)
        for bucket in buckets:
            bucket.sum = summed

    # What the stages use.

    def _cut(
        self, buffer: Tensor, wire: Wire, blocks: list[Tensor] | None = None, **how: Any
    ) -> list[Columns]:
        """A buffer, cut among the ranks of a wire, and into messages."""
        n, width = wire.size, len(buffer) // wire.size
        matrix, every = buffer[: width * n].view(n, width), []
        for k, slices in enumerate(cut(len(buffer), n, self._message(buffer))):
            home = matrix[:, slices[0]]
            slots = [[view] for view in (*home[:-1].unbind(), buffer[slices[-1]])]
            block = blocks[k] if blocks else None
            if block is not None:
                rows = self.options.microbatches * n
                home = block[: rows * home.shape[1]].view(rows, home.shape[1])
            every.append(Columns(wire, slots, home=home, block=block, **how))
        return every

    def _message(self, buffer: Tensor) -> int:
        """The most elements of one row that travel together."""
        cpu = buffer.device.type == "cpu"
        size = MESSAGE_BYTES if cpu else SCRATCH_BYTES // self.wire.whole.size
        return -(-size // (buffer.itemsize * self.options.microbatches))

    def _limit(self, columns: Columns) -> int:
        """Bytes of scratch for rows that arrive from other groups."""
        # Inside of groups there is a need for more.
        limit = SCRATCH_BYTES if self._inside is None else SCRATCH_BYTES - _scratch_inside_bytes()
        if columns.narrow:  # of one piece, widened by the passes over it
            limit -= self.size * sum(map(len, columns.own)) * columns.own[0].itemsize
        return min(limit, 2 * self._largest)

    @contextmanager
    def _work(self, device: torch.device) -> Iterator[None]:
        """On a GPU, on a stream beside the backward pass's, which must not wait for messages.

        On any error, what is under way is forgotten.
        """
        try:
            if device.type != "cuda":
                yield
                return
            current = torch.cuda.current_stream(device)
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
        except BaseException:
            self.drop()
            raise


def _scratch_inside_bytes() -> int:
    return SCRATCH_BYTES * 3 // 5
