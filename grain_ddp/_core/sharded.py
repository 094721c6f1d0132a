"""The transpose-reduce without its gather: each rank keeps the part of the aggregate that it owns.

For sharded optimizers. The owner of a part receives that part of every rank's gradient and weighs
it; on the wire that is a reduce-scatter. Of a buffer that belongs to a few ranks only, every rank
weighs a fair share and sends it on to its owner: else all would send to one, which had to hold n
times the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grain_ddp._core.agreement import AnyWeights, GramianSum, Marks, record_due
from grain_ddp._core.columns import Columns
from grain_ddp._core.groups import Grouping, partition
from grain_ddp._core.guard import Guard
from grain_ddp._core.narrow import decode, encoded, message_for
from grain_ddp._core.options import Kind
from grain_ddp._core.scratch import Scratch
from grain_ddp._core.sketched import Exchange, Sketches, sketch_size
from grain_ddp._core.state import GrainState, Owner
from grain_ddp._core.transposed import MESSAGE_BYTES, SCRATCH_BYTES, equal
from grain_ddp._core.views import Views, length, matrix, part, read, write
from grain_ddp._math.gramian import weigh_
from grain_ddp._math.record import StepRecord
from grain_ddp._math.sketch import Sketch
from grain_ddp._math.weighting import check_groups
from grain_ddp._wire.torch_wire import TorchWire

SLACK = 4096
"""So many elements, or a quarter, a rank may own above its fair share and weigh them all itself."""

SMALLEST_MESSAGE_BYTES = 64 << 10
"""What one rank sends to another at a time is not less than this, however many ranks there are."""

OWNERS = "the hand-over of what was weighed to its owners"


def share(
    owned: Sequence[Sequence[Tensor]],
) -> tuple[list[list[Tensor]], list[tuple[int, int, Tensor]]]:
    """Who weighs what: for each rank views, and (weigher, owner, view) where these are not one.

    ``owned[j]`` belongs to rank j. Depends on lengths only, and so is the same on every rank.
    """
    lengths = [length(views) for views in owned]
    fair = -(-sum(lengths) // len(owned))
    if max(lengths) <= fair + max(fair // 4, SLACK):
        return [list(views) for views in owned], []
    weighed = [part(views, 0, fair) for views in owned]
    room = [fair - length(views) for views in weighed]
    moved, weigher = [], 0
    for owner, views in enumerate(owned):
        for view in part(views, fair, lengths[owner]):
            rest = view
            while len(rest):
                while not room[weigher]:
                    weigher += 1
                some, rest = rest[: room[weigher]], rest[room[weigher] :]
                room[weigher] -= len(some)
                weighed[weigher].append(some)
                moved.append((weigher, owner, some))
    return weighed, moved


class _Bucket:
    """What shares one push: its columns, their Gramian, and what goes to others when weighed."""

    def __init__(self, owned: Sequence[Views]) -> None:
        self.owned, self.like = owned, next(view for views in owned for view in views)
        self.gramian: Tensor | None = None
        self.columns: list[Columns] = []
        self.moved: list[tuple[int, int, Tensor]] = []  # weigher, owner, view


class ShardedAggregation:
    """A model's gradient aggregation, for owners of parts: `push` the parts, then `finish`.

    Every rank pushes parts of the same lengths and dtypes in the same order. After that (after
    `finish`, where all pushes of a step share their weights) this rank's own part holds the
    aggregate, multiplied with `scale`; the other parts hold nothing of use: they are memory for
    what arrives. Beside them, about `scratch` bytes are taken, and `SCRATCH_BYTES` at most.
    """

    gone = False

    def __init__(
        self,
        state: GrainState,
        wire: TorchWire,
        owner: Owner | None = None,
        *,
        scale: float = 1.0,
        scratch: float = math.inf,
    ) -> None:
        options = state.options
        if options.microbatches != 1:
            raise ValueError(
                "grain_ddp: microbatches must be 1 where gradients are sharded, but it is "
                f"{options.microbatches} (this is rank {wire.rank}). DDP and reduce_gradients have "
                "several."
            )
        state.bind(owner or self, wire)
        self.state, self.options, self.wire, self.scale = state, options, wire, scale
        groups = partition(options.groups, wire)
        check_groups(options.weighting, len(groups))
        self._grouping, self._marks = Grouping(groups), Marks(wire, str(owner or self))
        self._sketches: Sketches | None = None
        self._numbers = 0  # in the last step
        self._limit = int(min(scratch, SCRATCH_BYTES))
        self._groups, self.guard = groups, Guard(options, wire, owner)
        self.drop()

    def __str__(self) -> str:
        return "an aggregation of its own"

    def drop(self) -> None:
        """Forget what is under way."""
        self._kind: Kind | None = None  # of the step, from its first push on
        self._pushed = 0  # numbers, in this step
        self._found: list[AnyWeights] = []
        self._buckets: list[_Bucket] = []  # not weighed yet
        self._sketch: Sketch | None = None  # of what is not weighed yet
        self._scratch = Scratch()
        if self._sketches is not None:
            self._sketches.drop()
        self.guard.drop()

    @property
    def pending(self) -> bool:
        """Whether anything was pushed in this step."""
        return self._kind is not None

    def push(self, owned: Sequence[Views]) -> None:
        """Aggregate ``owned[j]``, flat views of this rank's gradient that belong to rank j.

        All are of one dtype. What they consist of, by name, goes to ``guard.note`` before.
        """
        try:
            if self._kind is None:
                self._choose()
                self._kind = self.state.kind
                self._marks.begin(self.state.step)
            numbers = None
            if self.options.guard == "drop" and self.options.scope == "bucket":
                numbers = self.guard.begin(self.state.step, self.state.batches.empty)
            bucket = _Bucket(owned)
            self._buckets.append(bucket)
            for views in owned:
                self._marks.push(length(views), bucket.like.dtype)
                self._pushed += length(views)
            if self._sketches is None:
                self._receive(bucket, self._kind.has_gramian)
            elif self._kind.has_gramian:
                self._add(bucket, self._sketches)
            self._marks.left_out = self.guard.judge(numbers, self._groups)
            if self.options.scope == "bucket" or not self._kind.has_gramian:
                self._weigh()
        except BaseException:
            self.drop()
            self.state.batches.over = True
            raise

    def _choose(self) -> None:
        """At a step's start: whether it has a sketch. Collective at its first use."""
        k = sketch_size(self.options, self.wire, self._numbers)
        if k is None:
            self._sketches = None
        elif self._sketches is None:
            self._sketches = Sketches(self.state, self.wire, self._groups, self._marks, k)
        inside = self._sketches is not None and self._sketches.inside is not None
        self.state.batches.agree(self.wire, inside)

    def finish(self) -> StepRecord | None:
        """Complete the step. Returns its record, if one is due."""
        try:
            self.guard.compare_replicas(self.state.step)
            numbers = self.guard.begin(self.state.step, self.state.batches.empty)
            self._marks.left_out = self.guard.judge(numbers, self._groups)
            if self._buckets:
                self._weigh()
            found, kind = self._found, self._kind or Kind.PLAIN_MEAN
            self._kind, self._found = None, []
            self._numbers, self._pushed = self._pushed, 0
            self.guard.complete()
            self.guard.drop()
            suspects = self.guard.take()
            record = record_due(self.state, kind, found, suspects, len(self._groups))
        except BaseException:
            self.drop()
            self.state.batches.over = True
            raise
        self.state.advance(record)
        return record

    def _add(self, bucket: _Bucket, sketches: Sketches) -> None:
        """Add the gradient to the sketch."""
        if self._sketch is None:
            alone = self.options.scope == "bucket"
            most = sum(map(length, bucket.owned)) if alone else sketches.k
            self._sketch = sketches.empty(bucket.like, most)
        for views in bucket.owned:
            for view in views:
                self._sketch.add(view)

    def _receive(self, bucket: _Bucket, counted: bool) -> None:
        """Exchange the parts, two sets of columns at a time; add up their Gramian, if it counts."""
        n, like = self.wire.size, bucket.like
        if counted:
            bucket.gramian = like.new_zeros(n, n, dtype=torch.float64)
        weighed, bucket.moved = share(bucket.owned)
        lengths = [length(views) for views in weighed]
        message = max(self._limit // (4 * n), SMALLEST_MESSAGE_BYTES)
        if like.device.type == "cpu":
            message = min(message, MESSAGE_BYTES)
        count = -(-max(lengths) * like.itemsize // message)
        for k in range(count):
            slots = [
                part(views, total * k // count, total * (k + 1) // count)
                for views, total in zip(weighed, lengths, strict=True)
            ]
            bucket.columns.append(
                Columns(
                    self.wire,
                    slots,
                    narrow=self.options.narrow(like.dtype),
                    total=bucket.gramian,
                    home=matrix(slots),
                )
            )
            bucket.columns[-1].send(self._scratch, self._limit)
            if k:
                bucket.columns[-2].arrive()
        bucket.columns[-1].arrive()
        for columns in bucket.columns:
            columns.transfer.wait()

    def _weigh(self) -> None:
        """The weights of what waits for them, and this rank's part of the aggregate."""
        assert self._kind is not None
        sketches = self._sketches
        summed = self._sum() if self._kind.has_gramian else None
        if summed is not None:
            self._found.append(summed.weights())
        if self._kind.averages:
            summed = None
        for bucket in self._buckets:
            if sketches is not None:
                weight = equal(self.wire.size, bucket.like)[0]
                if summed is not None:
                    weight = sketches.weight(summed, bucket.like)
                self._reduce_scatter(bucket, weight * self.scale)
            elif summed is None:
                self._reduce(bucket, equal(self.wire.size, bucket.like) * self.scale)
            else:
                factors, dropped = summed.factors_for(bucket.like)
                self._reduce(bucket, factors * self.scale, dropped, summed.exact)
        self._buckets, self._sketch = [], None

    def _sum(self) -> GramianSum:
        """The sum of the Gramian of what waits, over the ranks."""
        if self._sketches is not None and self._sketch is not None:
            exchange = Exchange(self._sketches, self._sketch)
            summed = exchange.sum()
            summed.weights()
            exchange.end()
            return summed
        total = torch.stack([b.gramian for b in self._buckets if b.gramian is not None]).sum(0)
        every = [columns for bucket in self._buckets for columns in bucket.columns]
        return GramianSum(self.state, self.wire, total, every, self._marks, grouping=self._grouping)

    def _reduce(
        self,
        bucket: _Bucket,
        factors: Tensor,
        dropped: Sequence[int] = (),
        exact: bool = False,
    ) -> None:
        """The weighted sum of what was received."""
        for columns in bucket.columns:
            columns.reduce(factors, dropped, exact=exact)
            columns.give_back()
            self._clear(columns, dropped)
        self._forward(bucket)

    def _reduce_scatter(self, bucket: _Bucket, weight: Tensor) -> None:
        """The sum of all ranks' weighed gradients, by the backend."""
        n, like = self.wire.size, bucket.like
        near = self.wire.shares_memory(like.device)  # which is faster
        for views in bucket.owned:
            for view in views:
                weigh_(view, weight * n if near else weight)
        if near:
            self._receive(bucket, False)
            self._reduce(bucket, equal(self.wire.size, bucket.like))
            return
        parts = [read(views, like) for views in bucket.owned]
        write(bucket.owned[self.wire.rank], self.wire.reduce_scatter(parts, "the gradients"))

    def _clear(self, columns: Columns, dropped: Sequence[int]) -> None:
        """Leave no NaN beside this rank's own part, where an optimizer would find it."""
        # On a GPU it is not known which are dropped.
        if dropped or (self.options.nonfinite == "drop" and self.wire.device.type != "cpu"):
            for rank, views in enumerate(columns.slots):
                for view in views if rank != self.wire.rank else ():
                    view.zero_()

    def _forward(self, bucket: _Bucket) -> None:
        """Send what this rank weighed for others to its owners."""
        if not bucket.moved:
            return
        me, n, like = self.wire.rank, self.wire.size, bucket.like
        give: list[list[Tensor]] = [[] for _ in range(n)]
        take: list[list[Tensor]] = [[] for _ in range(n)]
        for weigher, owner, view in bucket.moved:
            if weigher == me:
                give[owner].append(view)
            elif owner == me:
                take[weigher].append(view)
        narrow = self.options.narrow(like.dtype)
        send = [read(views, like) for views in give]
        receive = [like.new_empty(length(views)) for views in take]
        if narrow:
            messages = [message_for(values, narrow) for values in receive]
            self.wire.exchange([encoded(v, narrow) for v in send], messages, OWNERS).wait()
            for message, values in zip(messages, receive, strict=True):
                decode(message, values)
        else:
            self.wire.exchange(send, receive, OWNERS).wait()
        for views, values in zip(take, receive, strict=True):
            write(views, values)
