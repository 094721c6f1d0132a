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

from grain_ddp._core.aggregation import (
    MESSAGE_BYTES,
    SCRATCH_BYTES,
    narrow_dtype,
    record_of,
    start_sum,
    weights_of_sum,
)
from grain_ddp._core.state import GrainState
from grain_ddp._math.gramian import gramian, weighted_sum
from grain_ddp._math.record import StepRecord
from grain_ddp._math.weighting import DeviceWeights, Weights, uniform
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp._wire.wire import Transfer

SLACK = 4096
"""So many elements, or a quarter, a rank may own above its fair share and weigh them all itself."""

SMALLEST_MESSAGE_BYTES = 64 << 10
"""What one rank sends to another at a time is not less than this, however many ranks there are."""

Views = list[Tensor]
"""Flat views that are read and written as if they were one tensor."""


def part(views: Sequence[Tensor], start: int, stop: int) -> Views:
    """The elements from start to stop of the views, as views."""
    found, offset = [], 0
    for view in views:
        low, high = max(start - offset, 0), min(stop - offset, len(view))
        if low < high:
            found.append(view[low:high])
        offset += len(view)
    return found


def length(views: Sequence[Tensor]) -> int:
    return sum(map(len, views))


def read(views: Sequence[Tensor], like: Tensor) -> Tensor:
    """The views as one contiguous tensor: a copy if they are several, or of another dtype."""
    if len(views) == 1:
        return views[0].to(like.dtype)
    return torch.cat([view.to(like.dtype) for view in views]) if views else like.new_empty(0)


def write(views: Sequence[Tensor], values: Tensor) -> None:
    """Copy the first values into the views."""
    offset = 0
    for view in views:
        view.copy_(values[offset : offset + len(view)])
        offset += len(view)


def share(owned: Sequence[Sequence[Tensor]]) -> tuple[list[Views], list[tuple[int, int, Tensor]]]:
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


class _Piece:
    """Some columns: on their way, and then as rows [n, c], in memory of their own or stashed."""

    def __init__(self, slots: list[Views], rows: Tensor) -> None:
        self.slots, self.rows = slots, rows
        self.transfer = Transfer()
        self.stash: Views = []


class _Bucket:
    """What shares one push: its pieces, their Gramian, and what goes to others when weighed."""

    def __init__(self, like: Tensor, size: int, moved: list[tuple[int, int, Tensor]]) -> None:
        self.like, self.moved = like, moved
        self.pieces: list[_Piece] = []
        self.gramian = torch.zeros(size, size, dtype=torch.float64, device=like.device)


class ShardedAggregation:
    """A model's gradient aggregation, for owners of parts: `push` the parts, then `finish`.

    Every rank pushes parts of the same lengths and dtypes in the same order. After that (after
    `finish`, where all pushes of a step share their weights) this rank's own part holds the
    aggregate, multiplied with `scale`; the other parts hold nothing of use: they are memory for
    what arrives. Beside them, about `scratch` bytes are taken, and `SCRATCH_BYTES` at most: a half
    for what is under way, a half for rows that wait for their weights.
    """

    def __init__(
        self,
        state: GrainState,
        wire: TorchWire,
        *,
        scale: float = 1.0,
        scratch: float = math.inf,
    ) -> None:
        for name, only in (("groups", "rank"), ("microbatches", 1)):
            if getattr(state, name) != only:
                raise ValueError(
                    f"grain_ddp: {name} must be {only!r} where gradients are sharded, but it is "
                    f"{getattr(state, name)!r} (this is rank {wire.rank}). DDP and "
                    "reduce_gradients have groups of other sizes."
                )
        wire.meet(state.agreed())
        self.state, self.wire, self.scale = state, wire, scale
        self._scratch = int(min(scratch, SCRATCH_BYTES))
        self.drop()

    def drop(self) -> None:
        """Forget what is under way."""
        self._weights: list[Weights | DeviceWeights] = []
        self._buckets: list[_Bucket] = []
        self._kept = 0  # bytes of rows that have memory of their own

    @property
    def pending(self) -> bool:
        """Whether anything was pushed in this step."""
        return bool(self._weights or self._buckets)

    def push(self, owned: Sequence[Sequence[Tensor]]) -> None:
        """Aggregate ``owned[j]``, flat views of this rank's gradient that belong to rank j.

        All are of one dtype.
        """
        try:
            self._receive(owned)
            if self.state.scope == "bucket" or self.state.averaging:
                self._weigh()
        except BaseException:
            self.drop()
            raise

    def finish(self) -> StepRecord | None:
        """Complete the step. Returns its record, if one is due."""
        try:
            if self._buckets:
                self._weigh()
            weights, self._weights = self._weights, []
            record = record_of(self.state, weights) if weights and self.state.recording else None
        except BaseException:
            self.drop()
            raise
        self.state.advance(record)
        return record

    def _receive(self, owned: Sequence[Sequence[Tensor]]) -> None:
        """Exchange the parts piece by piece, two at a time, and add up the Gramian of the rows."""
        like = next(view for views in owned for view in views)
        weighed, moved = share(owned)
        bucket = _Bucket(like, self.wire.size, moved)
        self._buckets.append(bucket)
        lengths = [length(views) for views in weighed]
        message = max(self._scratch // (4 * self.wire.size), SMALLEST_MESSAGE_BYTES)
        if like.device.type == "cpu":
            message = min(message, MESSAGE_BYTES)
        count = -(-max(lengths) * like.itemsize // message)
        previous = None
        for k in range(count):
            piece = self._send(
                [
                    part(views, total * k // count, total * (k + 1) // count)
                    for views, total in zip(weighed, lengths, strict=True)
                ],
                like,
            )
            bucket.pieces.append(piece)
            if previous is not None:
                self._arrive(previous, bucket)
            previous = piece
        if previous is not None:
            self._arrive(previous, bucket)
        for piece in bucket.pieces:
            piece.transfer.wait()

    def _send(self, slots: list[Views], like: Tensor) -> _Piece:
        narrow = narrow_dtype(self.state, like) if self.wire.size > 1 else None
        width = length(slots[self.wire.rank])
        rows = like.new_empty(self.wire.size, width, dtype=narrow or like.dtype)
        send = [read(views, rows) for views in slots]
        rows[self.wire.rank].copy_(send[self.wire.rank])
        piece = _Piece(slots, rows)
        piece.transfer = self.wire.exchange(send, rows.unbind())
        return piece

    def _arrive(self, piece: _Piece, bucket: _Bucket) -> None:
        piece.transfer.arrive()
        rows = piece.rows
        if not self.state.averaging:
            bucket.gramian += gramian(rows)
        self._kept += rows.nbytes
        if self._kept > self._scratch // 2:
            # The gradient in these columns has been sent: its memory takes the rows.
            piece.transfer.wait()
            self._kept -= rows.nbytes
            homes = [view for views in piece.slots for view in views]
            free = part(homes, 0, rows.numel())
            write(free, rows.view(-1))
            piece.stash = [*free, rows.view(-1)[length(free) :].clone()]
            piece.rows = rows.new_empty(0, rows.shape[1])

    def _weigh(self) -> None:
        """The weights of the pushed buckets, and their parts of the aggregate."""
        n, buckets = self.wire.size, self._buckets
        if self.state.averaging:
            weights: Weights | DeviceWeights = uniform(n)
        else:
            total = torch.stack([bucket.gramian for bucket in buckets]).sum(0)
            weights = weights_of_sum(self.state, start_sum(self.wire, total), n)
        for bucket in buckets:
            factors = weights.factors_for(bucket.like) * self.scale
            for piece in bucket.pieces:
                self._reduce(piece, weights, factors, bucket.like)
            self._forward(bucket)
        self._weights.append(weights)
        self._buckets, self._kept = [], 0

    def _reduce(
        self, piece: _Piece, weights: Weights | DeviceWeights, factors: Tensor, like: Tensor
    ) -> None:
        rows = piece.rows
        if piece.stash:
            rows = read(piece.stash, rows).view(self.wire.size, rows.shape[1])
        if weights.dropped:
            rows[list(weights.dropped)] = 0  # 0 · NaN is NaN
        unknown = isinstance(weights, DeviceWeights) and self.state.nonfinite == "drop"
        if weights.dropped or unknown:
            for view in (view for views in piece.slots for view in views):
                view.zero_()  # nor may an optimizer find one beside its own part
        result = like.new_empty(rows.shape[1])
        weighted_sum(rows, factors, out=result)
        write(piece.slots[self.wire.rank], result)

    def _forward(self, bucket: _Bucket) -> None:
        """Send what this rank weighed for others to its owners."""
        if not bucket.moved:
            return
        me, like = self.wire.rank, bucket.like
        like = like.new_empty(0, dtype=narrow_dtype(self.state, like) or like.dtype)
        give: list[Views] = [[] for _ in range(self.wire.size)]
        take: list[Views] = [[] for _ in range(self.wire.size)]
        for weigher, owner, view in bucket.moved:
            if weigher == me:
                give[owner].append(view)
            elif owner == me:
                take[weigher].append(view)
        receive = [like.new_empty(length(views)) for views in take]
        self.wire.exchange([read(views, like) for views in give], receive).wait()
        for views, values in zip(take, receive, strict=True):
            write(views, values)
