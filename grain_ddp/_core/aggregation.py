"""The transpose-reduce: the one place where the mathematics meets the wire.

An all-reduce is a reduce-scatter and an all-gather. Here every rank first receives its slice of all
the gradients, the transposed rows. Their Gramian, summed over the ranks, gives the weights at the
cost of n² numbers; then the weighted slices are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from grain_ddp._core.groups import Inside, Slice, partition
from grain_ddp._core.passes import Parts, Passes
from grain_ddp._core.scratch import Scratch
from grain_ddp._core.state import GrainState
from grain_ddp._math.gramian import few, gramian, weighted_sum
from grain_ddp._math.record import PendingRecord, StepRecord
from grain_ddp._math.weighting import DeviceWeights, Weights, uniform, weigh_tensor
from grain_ddp._wire.wire import Transfer, Wire, cut

MESSAGE_BYTES = 4 << 20
"""On a CPU a slice travels in messages of about this size: one is worked on while others move."""

SCRATCH_BYTES = 48 << 20
"""Bound of the memory for rows that arrive; twice the step's largest bucket, if that is less.

DDP's buckets have 25 MiB, and all that is held beside them shall be less than two."""


def narrow_dtype(state: GrainState, buffer: Tensor) -> torch.dtype | None:
    """The dtype of what travels, where it is narrower than the buffer's own."""
    dtype = state.wire_dtype
    return dtype if dtype is not None and dtype.itemsize < buffer.itemsize else None


@cache
def _triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the upper triangle lies in a flat matrix [n, n], and what of it each entry is."""
    rows, columns = torch.triu_indices(n, n, device=device)
    where = torch.zeros(n, n, dtype=torch.int64, device=device)
    where[rows, columns] = where[columns, rows] = torch.arange(len(rows), device=device)
    if device.type == "cuda":  # for the streams of other models
        torch.cuda.current_stream(device).synchronize()
    return rows * n + columns, where


def upper(gramian: Tensor) -> Tensor:
    """The upper triangle of a Gramian [n, n], flat: what travels."""
    return gramian.take(_triangle(len(gramian), gramian.device)[0])


def weights_of(state: GrainState, triangle: Tensor, n: int) -> Weights | DeviceWeights:
    """The weights that the state's options give for the upper triangle of a Gramian [n, n]."""
    gramian = triangle.take(_triangle(n, triangle.device)[1])
    return weigh_tensor(
        gramian, state.weighting, cap=state.cap, nonfinite=state.nonfinite, seed=state.step
    )


def start_sum(wire: Wire, share: Tensor) -> tuple[Transfer, Tensor]:
    """Start to sum a Gramian [n, n] over the ranks: its upper triangle travels."""
    return wire.sum(upper(share))


def weights_of_sum(
    state: GrainState, pending: tuple[Transfer, Tensor], n: int
) -> Weights | DeviceWeights:
    """The weights, the same on every rank, for a Gramian [n, n] whose sum was started."""
    transfer, triangles = pending
    transfer.wait()
    return weights_of(state, triangles.sum(0), n)


def record_of(state: GrainState, buckets: Sequence[Weights | DeviceWeights]) -> StepRecord:
    """The record of a step with these weights, one for each bucket."""
    step, single = state.step, state.scope == "global"
    if single:
        buckets = buckets[:1]
    if any(isinstance(weights, DeviceWeights) for weights in buckets):
        return PendingRecord(step, lambda: _record_of(step, single, buckets))
    return _record_of(step, single, buckets)


def _record_of(step: int, single: bool, found: Sequence[Weights | DeviceWeights]) -> StepRecord:
    buckets = [w.read() if isinstance(w, DeviceWeights) else w for w in found]
    if single:
        return StepRecord(step, **vars(buckets[0]))
    return StepRecord(
        step,
        np.stack([w.gramian for w in buckets]),
        np.stack([w.weights for w in buckets]),
        np.array([w.gap for w in buckets]),
        tuple(w.status for w in buckets),
        tuple(w.active for w in buckets),
        tuple(w.dropped for w in buckets),
    )


class _Bucket:
    """One buffer of a step: its pieces, and what is known of its gradients."""

    def __init__(self, buffer: Tensor, size: int, done: Callable[[], object] | None) -> None:
        self.buffer, self.done = buffer, done
        self.own = buffer  # what the groups exchange: in a group of several ranks a slice
        self.inside: Slice | None = None
        self.blocks: list[Tensor] = []  # of several passes
        self.pieces: list[_Piece] = []
        self.gramian = torch.zeros(size, size, dtype=torch.float64, device=buffer.device)
        self.sum = Transfer(), self.gramian
        self.weights: Weights | DeviceWeights
        self.transfer = Transfer()  # of the whole buffer, where it is simply averaged


class _Piece:
    """Some columns of a bucket's slices, sent and received as one.

    ``slots[j]`` is where rank j's columns are in the bucket's buffer. ``send[j]`` is what rank j
    gets: the same, or the columns of several passes one after the other. `home` is all of `send` as
    a matrix, with a row for each group, but for the few columns that are left over where n does not
    divide the bucket. `rows` is what arrived: row i is group i's gradient in this rank's columns.
    They are in scratch at first, and at home, whose own contents have been sent by then, when the
    scratch is wanted for other rows; what is left over is the `tail` then.
    """

    def __init__(
        self, bucket: _Bucket, slots: Sequence[Tensor], send: Sequence[Tensor], home: Tensor
    ) -> None:
        self.bucket, self.slots, self.send, self.home = bucket, slots, send, home
        self.transfer = Transfer()
        self.arrived = self.reduced = False
        self.scratch: Tensor | None = None
        self.rows: Tensor
        self.tail: Tensor | None = None
        self.narrow: list[Tensor] = []  # like send, in the wire's dtype: to be sent, or gathered

    @property
    def in_place(self) -> bool:
        """Whether the weighted sum replaces this rank's own row at home."""
        return not self.narrow and not self.bucket.blocks


class Aggregation:
    """A model's gradient aggregation over a wire: `push` each bucket of a step, then `finish`.

    Every rank pushes buffers of the same lengths and dtypes in the same order. The results are in
    the buffers when `finish` returns (on a GPU: in the order of the current stream).

    Work advances only inside these calls, by counting buckets and never by looking at what has
    arrived, so that all ranks issue the same messages in the same order.
    """

    def __init__(self, state: GrainState, wire: Wire) -> None:
        wire.meet(state.agreed())
        groups = partition(state.groups, wire)
        mine = next(group for group in groups if wire.rank in group)
        position = mine.index(wire.rank)
        self._inside = Inside(wire.among(mine, 1)) if len(mine) > 1 else None
        if [group[0] for group in groups] != list(range(wire.size)):
            wire = wire.among([group[position] for group in groups], 2)
        self.state, self.wire = state, wire
        self.size = wire.size * state.microbatches  # groups: the rows of the Gramian
        self._passes = Passes(wire.size, state.microbatches)
        self._stream: torch.cuda.Stream | None = None
        self.drop()

    def drop(self) -> None:
        """Forget what is under way."""
        self._buckets: list[_Bucket] = []
        self._holders: dict[_Piece, None] = {}  # of scratch, the oldest first
        self._gathering: list[Transfer] = []  # what may have several stages
        self._scratch = Scratch()
        self._largest = 0  # bytes of a bucket, in this step or the last one
        self._passes.drop()
        if self._inside is not None:
            self._inside.drop()

    def abandon(self) -> None:
        """Let what is under way arrive, then forget it: after a step that broke off elsewhere."""
        try:
            for bucket in self._buckets:
                pending = [bucket.transfer, bucket.sum[0], *(p.transfer for p in bucket.pieces)]
                if bucket.inside is not None:
                    pending += [transfer for *_, transfer in bucket.inside.arriving]
                    pending += bucket.inside.sending
                for transfer in pending:
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
        try:
            with self._side_stream(buffer.device):
                bucket = _Bucket(buffer, self.size, done)
                self._buckets.append(bucket)
                if self.state.microbatches > 1:
                    parts = parts or [(len(self._buckets), len(buffer))]
                    bucket.blocks = self._passes.add(buffer, parts, self._message(buffer))
                    if not self._last_pass:
                        buffer.zero_()
                        return
                self._advance_gathers()
                self._advance(self._buckets[:-1])
                self._enter(bucket)
                if len(self._buckets) > 1 + self._depth:
                    self._arrive(self._buckets[-2 - self._depth])
        except BaseException:
            self.drop()
            raise

    def finish(self) -> StepRecord | None:
        """Complete the step: the results are in the buffers. The record, if one is due."""
        try:
            device = self._buckets[0].buffer.device
            with self._side_stream(device):
                if self._last_pass:
                    self._finish()
                record = None
                if self._last_pass and self.state.recording:
                    record = record_of(self.state, [bucket.weights for bucket in self._buckets])
            if self._stream is not None:
                torch.cuda.current_stream(device).wait_stream(self._stream)
            buckets, self._buckets = self._buckets, []
            self._largest = max(bucket.own.nbytes for bucket in buckets)
        except BaseException:
            self.drop()
            raise
        for bucket in buckets:
            bucket.pieces.clear()  # they refer to it: else only garbage collection would free both
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
        return self._passes.done == self.state.microbatches - 1

    def _finish(self) -> None:
        buckets, inside = self._buckets, self._inside
        if inside is not None:
            self._advance(buckets)
            for bucket in buckets[-2:-1]:
                self._arrive(bucket)
        # First, so that the last Gramian does not queue behind the gather before it.
        self._arrive(buckets[-1])
        if self.state.scope == "global" and not self.state.averaging:
            total = torch.stack([bucket.gramian for bucket in buckets]).sum(0)
            buckets[0].sum = start_sum(self.wire, total)
        if self._one_by_one:
            for bucket in buckets[-2:]:
                self._reduce(bucket)
        else:
            weights = weights_of_sum(self.state, buckets[0].sum, self.size)
            for bucket in buckets:
                bucket.weights = weights
                self._reduce(bucket)
        if self._uniform and not self.state.averaging:
            for bucket in buckets if self.state.scope == "bucket" else buckets[:1]:
                bucket.weights = weights_of_sum(self.state, bucket.sum, self.size)
        while self._gathering:
            self._advance_gathers()
        for bucket in buckets:
            for piece in bucket.pieces:
                piece.transfer.arrive()
        for bucket in buckets:
            bucket.transfer.wait()
            for piece in bucket.pieces:
                self._complete(piece)
            if inside is not None and bucket.inside is not None:
                inside.gather(bucket.inside)
                self._gathering.append(bucket.inside.transfer)
        while self._gathering:
            self._advance_gathers()
        for bucket in buckets:
            if inside is not None and bucket.inside is not None:
                inside.complete(bucket.inside)

    @property
    def _one_by_one(self) -> bool:
        """Whether a bucket's weights do not depend on other buckets."""
        return self.state.scope == "bucket" or self._uniform

    @property
    def _uniform(self) -> bool:
        """Whether the weights are known before the Gramian, which is only recorded, if at all."""
        state = self.state
        return state.averaging or (state.weighting == "mean" and state.nonfinite == "propagate")

    @property
    def _depth(self) -> int:
        """Stages that a bucket passes before the transpose."""
        return 0 if self._inside is None else 1

    # The stages of a bucket, in order.

    def _advance(self, older: list[_Bucket]) -> None:
        """Take the buckets before the newest one stage on."""
        # Two buckets back: its Gramian has long arrived, and its scratch is needed now.
        if self._one_by_one and len(older) > 1 + self._depth:
            self._reduce(older[-2 - self._depth])
        if self._inside is not None and older and older[-1].inside is not None:
            self._inside.reduce(older[-1].inside)
            self._send(older[-1])

    def _enter(self, bucket: _Bucket) -> None:
        """Start what comes first: the mean of all ranks, or of the group, or the transpose."""
        buffer, narrow = bucket.buffer, narrow_dtype(self.state, bucket.buffer)
        whole = self.wire.whole
        reduce = self.state.averaging and narrow is None
        if reduce and not whole.shares_memory(buffer.device):
            if bucket.blocks:
                self._passes.mean(bucket.blocks, buffer, self._message(buffer))
            bucket.transfer = whole.all_reduce(buffer.div_(whole.size))
        elif self._inside is not None:
            limit = SCRATCH_BYTES - self._limit
            bucket.inside = self._inside.start(buffer, narrow, self._message(buffer), limit)
            bucket.own = bucket.inside.own
        else:
            self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        """Start the transpose: rank j's columns of this rank's gradient to rank j."""
        bucket.pieces = self._cut(bucket)
        n = self.wire.size
        for piece in bucket.pieces:
            if n == 1:
                piece.rows = piece.home
                continue
            piece.rows = self._lend(piece)
            for part, columns in zip(piece.narrow, piece.send, strict=False):
                part.copy_(columns)
            receive = piece.rows.view(n, piece.rows.numel() // n).unbind()
            piece.transfer = self.wire.exchange(piece.narrow or piece.send, receive)

    def _arrive(self, bucket: _Bucket) -> None:
        """Complete the transpose; start to sum the Gramian, if it is the bucket's own."""
        for piece in bucket.pieces:
            self._arrive_piece(piece)
        if self.state.scope == "bucket" and not self.state.averaging:
            bucket.sum = start_sum(self.wire, bucket.gramian)

    def _arrive_piece(self, piece: _Piece) -> None:
        if piece.arrived:
            return
        me, rows = self.wire.rank, piece.rows
        own = (piece.narrow or piece.send)[me]
        apart = piece.in_place and few(own, self.size)
        if self.wire.size > 1 and not apart:
            m = self.state.microbatches
            rows[me * m : me * m + m] = own.view(m, rows.shape[1])
        piece.transfer.arrive()
        piece.arrived = True
        if self.state.averaging:
            return
        if apart:
            piece.bucket.gramian += gramian([*rows[:me].unbind(), own, *rows[me + 1 :].unbind()])
        else:
            piece.bucket.gramian += gramian(rows)

    def _reduce(self, bucket: _Bucket) -> None:
        """Replace this rank's columns by their weighted sum, and start to gather all columns."""
        if self._uniform:
            bucket.weights = uniform(self.size)
        elif self.state.scope == "bucket":
            bucket.weights = weights_of_sum(self.state, bucket.sum, self.size)
        if self.size == 1:
            return
        weights, me = bucket.weights.factors_for(bucket.buffer), self.wire.rank
        for piece in bucket.pieces:
            if self._narrow(bucket) is not None and not piece.narrow:
                self._lend(piece)
            piece.transfer.wait()
            parts = piece.slots
            if piece.narrow:
                parts = [part[: len(slot)] for part, slot in zip(piece.narrow, parts, strict=True)]
            own, start = parts[me], 0
            for rows in [piece.rows] if piece.tail is None else [piece.rows, piece.tail]:
                for j in bucket.weights.dropped:
                    rows[j].zero_()  # 0 · NaN is NaN
                out = own[start : start + rows.shape[1]]
                weighted_sum(rows, weights, out, own=me if piece.in_place else None)
                start += rows.shape[1]
            piece.reduced = True
            if not piece.narrow:
                self._take_back(piece)
            piece.transfer = self.wire.gather(own, parts)
            self._gathering.append(piece.transfer)

    def _advance_gathers(self) -> None:
        """Take each of them one stage on."""
        self._gathering = [transfer for transfer in self._gathering if transfer.advance()]

    def _complete(self, piece: _Piece) -> None:
        """Complete the gather."""
        piece.transfer.wait()
        for part, slot in zip(piece.narrow, piece.slots, strict=False):
            slot.copy_(part[: len(slot)])
        self._take_back(piece)

    # What the stages use.

    @property
    def _limit(self) -> int:
        """Of the bytes of scratch between the groups. Inside of them there is a need for more."""
        return SCRATCH_BYTES if self._inside is None else SCRATCH_BYTES * 2 // 5

    def _message(self, buffer: Tensor) -> int:
        """The most elements of one row that travel together."""
        cpu = buffer.device.type == "cpu"
        size = MESSAGE_BYTES if cpu else SCRATCH_BYTES // self.wire.whole.size
        return -(-size // (buffer.itemsize * self.state.microbatches))

    def _narrow(self, bucket: _Bucket) -> torch.dtype | None:
        """The dtype of what travels between the groups, where it is not the bucket's."""
        return narrow_dtype(self.state, bucket.buffer) if self.wire.size > 1 else None

    def _cut(self, bucket: _Bucket) -> list[_Piece]:
        own, n, m = bucket.own, self.wire.size, self.state.microbatches
        columns = len(own) // n
        matrix = own[: columns * n].view(n, columns)
        pieces = []
        for k, slices in enumerate(cut(len(own), n, self._message(own))):
            home = matrix[:, slices[0]]
            slots: Sequence[Tensor] = [*home[:-1].unbind(), own[slices[-1]]]
            send = slots
            if bucket.blocks:
                send = bucket.blocks[k].split_with_sizes([m * len(slot) for slot in slots])
                home = bucket.blocks[k][: m * home.numel()].view(self.size, home.shape[1])
            pieces.append(_Piece(bucket, slots, send, home))
        return pieces

    def _lend(self, piece: _Piece) -> Tensor:
        """Scratch for the rows of a piece; and for `narrow`, where the wire's dtype is."""
        buffer = piece.bucket.buffer
        narrow = self._narrow(piece.bucket)
        dtype = narrow or buffer.dtype
        lengths = [columns.shape[0] for columns in piece.send] if narrow else []
        size = self.wire.size * piece.send[self.wire.rank].shape[0]  # of all rows
        count = (size + sum(lengths)) * dtype.itemsize
        self._largest = max(self._largest, piece.bucket.own.nbytes)
        widened = size * buffer.itemsize if narrow else 0  # by the passes, one piece's
        limit = max(min(self._limit - widened, 2 * self._largest), count)
        while self._scratch.lent + count > limit:
            self._release(next(iter(self._holders)))
        piece.scratch = self._scratch.lend(count, buffer.device, limit)
        self._holders[piece] = None
        flat = piece.scratch.view(dtype)[: count // dtype.itemsize]
        if narrow:
            piece.narrow = list(flat[size:].split_with_sizes(lengths))
        return flat[:size].view(self.size, size // self.size)

    def _release(self, piece: _Piece) -> None:
        """Do what lets a piece give back its scratch."""
        if piece.reduced:
            self._complete(piece)
            return
        self._arrive_piece(piece)
        piece.transfer.wait()
        rows, columns, me = piece.rows, piece.home.shape[1], self.wire.rank
        parts = (slice(me), slice(me + 1, None)) if piece.in_place else (slice(None),)
        for part in parts:  # without the own row, if that is at home
            piece.home[part] = rows[part, :columns]
        piece.rows = piece.home
        if columns < rows.shape[1]:
            piece.tail = rows[:, columns:].clone()
        self._take_back(piece)

    def _take_back(self, piece: _Piece) -> None:
        if piece.scratch is not None:
            del self._holders[piece]
            self._scratch.take_back(piece.scratch)
            piece.scratch, piece.narrow = None, []

    @contextmanager
    def _side_stream(self, device: torch.device) -> Iterator[None]:
        """On a GPU, a stream beside the backward pass's, which must not wait for messages."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield
