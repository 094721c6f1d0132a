"""The transpose-reduce: the one place where the mathematics meets the wire.

An all-reduce is a reduce-scatter and an all-gather. Here every rank first receives its slice of all
the gradients, the transposed rows. Their Gramian, summed over the ranks, gives the weights at the
cost of n² numbers; then the weighted slices are gathered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from grain_ddp.gramian import gramian, weighted_sum
from grain_ddp.record import Array, StepRecord
from grain_ddp.state import GrainState
from grain_ddp.weighting import Weights, uniform, weigh
from grain_ddp.wire import TorchWire, Transfer

MESSAGE_BYTES = 4 << 20
"""On a CPU a slice travels in messages of about this size: one is worked on while others move."""

SCRATCH_BYTES = 64 << 20
"""Bound of the memory for rows that arrive; twice the step's largest bucket, if that is less."""


def cut(length: int, n: int, message: int) -> list[list[slice]]:
    """Where the slices of n ranks lie in a bucket of that length, in pieces.

    ``cut(...)[k][j]`` is piece k of rank j's slice, at most `message` elements long. The slices are
    equally long; what is left over, fewer than n elements, is a last piece of the last rank alone.
    """
    columns = length // n
    count = -(-columns // message)
    bounds = [columns * k // count for k in range(count)] + [columns]
    pieces = [
        [slice(j * columns + a, j * columns + b) for j in range(n)] for a, b in pairwise(bounds)
    ]
    if columns * n < length:
        pieces.append([slice(0, 0)] * (n - 1) + [slice(columns * n, length)])
    return pieces


def narrow_dtype(state: GrainState, buffer: Tensor) -> torch.dtype | None:
    """The dtype of what travels, where it is narrower than the buffer's own."""
    dtype = state.wire_dtype
    return dtype if dtype is not None and dtype.itemsize < buffer.itemsize else None


def weights_of(state: GrainState, triangle: Array, n: int) -> Weights:
    """The weights that the state's options give for the upper triangle of a Gramian [n, n]."""
    gramian = np.empty((n, n))
    rows, columns = np.triu_indices(n)
    gramian[rows, columns] = gramian[columns, rows] = triangle
    return weigh(
        gramian, state.weighting, cap=state.cap, nonfinite=state.nonfinite, seed=state.step
    )


def start_sum(wire: TorchWire, share: Tensor) -> tuple[Transfer, Tensor]:
    """Start to sum a Gramian [n, n] over the ranks: its upper triangle travels."""
    rows, columns = torch.triu_indices(*share.shape)
    return wire.sum(share[rows, columns])


def weights_of_sum(state: GrainState, pending: tuple[Transfer, Tensor], n: int) -> Weights:
    """The weights, the same on every rank, for a Gramian [n, n] whose sum was started."""
    transfer, triangles = pending
    transfer.wait()
    return weights_of(state, triangles.sum(0).cpu().numpy(), n)


def record_of(state: GrainState, buckets: list[Weights]) -> StepRecord:
    """The record of a step with these weights, one for each bucket."""
    if state.scope == "global":
        return StepRecord(state.step, **vars(buckets[0]))
    return StepRecord(
        state.step,
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
        self.pieces: list[_Piece] = []
        self.gramian = torch.zeros(size, size, dtype=torch.float64, device=buffer.device)
        self.sum = Transfer(), self.gramian
        self.weights: Weights
        self.transfer = Transfer()  # of the whole buffer, where it is simply averaged


class _Piece:
    """Some columns of a bucket's slices, sent and received as one.

    ``slots[j]`` is where rank j's columns are in the bucket's buffer. `home` is all of them as a
    matrix ``[n, c]``, or None for the columns left over when n does not divide the bucket. `rows`
    is what arrived, ``[n, c]``: row j is rank j's gradient in this rank's columns. They are in
    scratch at first, and at home, whose own contents have been sent by then, when the scratch is
    wanted for other rows.
    """

    def __init__(self, bucket: _Bucket, slots: Sequence[Tensor], home: Tensor | None) -> None:
        self.bucket, self.slots, self.home = bucket, slots, home
        self.transfer = Transfer()
        self.arrived = self.reduced = False
        self.scratch: Tensor | None = None
        self.rows: Tensor
        self.narrow: list[Tensor] = []  # like slots, in the wire's dtype: to be sent, or gathered


class _Scratch:
    """Flat byte buffers, lent and taken back; those not lent are kept for the next step."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
        self.lent = self._kept = 0  # bytes

    def lend(self, count: int, device: torch.device, limit: int) -> Tensor:
        free = self._free[device, count]
        self.lent += count
        if free:
            self._kept -= count
            return free.pop()
        if self.lent + self._kept > limit:
            self._free.clear()
            self._kept = 0
        return torch.empty(count, dtype=torch.uint8, device=device)

    def take_back(self, buffer: Tensor) -> None:
        self.lent -= len(buffer)
        self._kept += len(buffer)
        self._free[buffer.device, len(buffer)].append(buffer)


class Aggregation:
    """A model's gradient aggregation over a wire: `push` each bucket of a step, then `finish`.

    Every rank pushes buffers of the same lengths and dtypes in the same order. The results are in
    the buffers when `finish` returns (on a GPU: in the order of the current stream).

    Work advances only inside these calls, by counting buckets and never by looking at what has
    arrived, so that all ranks issue the same messages in the same order.
    """

    def __init__(self, state: GrainState, wire: TorchWire) -> None:
        wire.agree(state.agreed())
        self.state, self.wire = state, wire
        self._stream: torch.cuda.Stream | None = None
        self.drop()

    def drop(self) -> None:
        """Forget what is under way."""
        self._buckets: list[_Bucket] = []
        self._holders: dict[_Piece, None] = {}  # of scratch, the oldest first
        self._scratch = _Scratch()

    def abandon(self) -> None:
        """Let what is under way arrive, then forget it: after a step that broke off elsewhere."""
        try:
            for bucket in self._buckets:
                for transfer in (bucket.transfer, bucket.sum[0]):
                    transfer.wait()
                for piece in bucket.pieces:
                    piece.transfer.wait()
        finally:
            self.drop()

    @property
    def pending(self) -> bool:
        """Whether a step has begun and not finished."""
        return bool(self._buckets)

    def push(self, buffer: Tensor, done: Callable[[], object] | None = None) -> None:
        """Start on a bucket: flat, contiguous, this rank's gradient now and the result later.

        `done` is called by `finish`, when the result is in the buffer.
        """
        try:
            with self._side_stream(buffer.device):
                bucket = _Bucket(buffer, self.wire.size, done)
                self._buckets.append(bucket)
                if self.state.averaging and narrow_dtype(self.state, buffer) is None:
                    bucket.transfer = self.wire.all_reduce(buffer.div_(self.wire.size))
                    return
                # Two buckets back: its Gramian has long arrived, and its scratch is needed now.
                if self._one_by_one and len(self._buckets) > 2:
                    self._reduce(self._buckets[-3])
                self._send(bucket)
                if len(self._buckets) > 1:
                    self._arrive(self._buckets[-2])
        except BaseException:
            self.drop()
            raise

    def finish(self) -> StepRecord | None:
        """Complete the step: the results are in the buffers. The record, if one is due."""
        try:
            device = self._buckets[0].buffer.device
            with self._side_stream(device):
                self._finish()
                record = None
                if self.state.recording:
                    record = record_of(self.state, [bucket.weights for bucket in self._buckets])
            if self._stream is not None:
                torch.cuda.current_stream(device).wait_stream(self._stream)
            buckets, self._buckets = self._buckets, []
        except BaseException:
            self.drop()
            raise
        for bucket in buckets:
            bucket.pieces.clear()  # they refer to it: else only garbage collection would free both
            if bucket.done is not None:
                bucket.done()
        self.state.advance(record)
        return record

    def _finish(self) -> None:
        buckets = self._buckets
        if self._one_by_one:
            for bucket in buckets[-2:-1]:
                self._reduce(bucket)
            self._arrive(buckets[-1])
            self._reduce(buckets[-1])
        else:
            self._arrive(buckets[-1])
            total = torch.stack([bucket.gramian for bucket in buckets]).sum(0)
            weights = weights_of_sum(self.state, start_sum(self.wire, total), self.wire.size)
            for bucket in buckets:
                bucket.weights = weights
                self._reduce(bucket)
        for bucket in buckets:
            bucket.transfer.wait()
            for piece in bucket.pieces:
                self._complete(piece)

    @property
    def _one_by_one(self) -> bool:
        """Whether a bucket's weights do not depend on other buckets."""
        return self.state.scope == "bucket" or self.state.averaging

    # The stages of a bucket, in order.

    def _send(self, bucket: _Bucket) -> None:
        """Start the transpose: rank j's columns of this rank's gradient to rank j."""
        bucket.pieces = self._cut(bucket)
        for piece in bucket.pieces:
            if self.wire.size == 1:
                assert piece.home is not None
                piece.rows = piece.home
                continue
            piece.rows = self._lend(piece)
            for part, slot in zip(piece.narrow, piece.slots, strict=False):
                part.copy_(slot)
            send = piece.narrow or piece.slots
            piece.rows[self.wire.rank].copy_(send[self.wire.rank])
            piece.transfer = self.wire.exchange(send, piece.rows.unbind())

    def _arrive(self, bucket: _Bucket) -> None:
        """Complete the transpose; start to sum the Gramian, if it is the bucket's own."""
        for piece in bucket.pieces:
            self._arrive_piece(piece)
        if self.state.scope == "bucket" and not self.state.averaging:
            bucket.sum = start_sum(self.wire, bucket.gramian)

    def _arrive_piece(self, piece: _Piece) -> None:
        if piece.arrived:
            return
        piece.transfer.wait()
        piece.arrived = True
        if not self.state.averaging:
            piece.bucket.gramian += gramian(piece.rows)

    def _reduce(self, bucket: _Bucket) -> None:
        """Replace this rank's columns by their weighted sum, and start to gather all columns."""
        if self.state.averaging:
            bucket.weights = uniform(self.wire.size)
        elif self.state.scope == "bucket":
            bucket.weights = weights_of_sum(self.state, bucket.sum, self.wire.size)
        if self.wire.size == 1:
            return
        factors = bucket.weights.factors(bucket.buffer.dtype)
        weights = torch.from_numpy(factors).to(bucket.buffer.device)
        for piece in bucket.pieces:
            for j in bucket.weights.dropped:
                piece.rows[j].zero_()  # 0 · NaN is NaN
            if narrow_dtype(self.state, bucket.buffer) is not None and not piece.narrow:
                self._lend(piece)
            parts = piece.narrow or piece.slots
            own = parts[self.wire.rank]
            if piece.rows is piece.home and not piece.narrow:
                weighted = torch.empty_like(own)
                weighted_sum(piece.rows, weights, out=weighted)
                own.copy_(weighted)
            else:
                weighted_sum(piece.rows, weights, out=own)
            piece.reduced = True
            if not piece.narrow:
                self._take_back(piece)
            piece.transfer = self.wire.exchange([own] * self.wire.size, parts)

    def _complete(self, piece: _Piece) -> None:
        """Complete the gather."""
        piece.transfer.wait()
        for part, slot in zip(piece.narrow, piece.slots, strict=False):
            slot.copy_(part)
        self._take_back(piece)

    # What the stages use.

    def _cut(self, bucket: _Bucket) -> list[_Piece]:
        buffer, n = bucket.buffer, self.wire.size
        message = MESSAGE_BYTES if buffer.device.type == "cpu" else SCRATCH_BYTES // n
        columns = buffer.numel() // n
        matrix = buffer[: columns * n].view(n, columns)
        pieces = []
        for slots in cut(buffer.numel(), n, -(-message // buffer.itemsize)):
            home = matrix[:, slots[0]] if slots[0] != slice(0, 0) else None
            pieces.append(_Piece(bucket, [buffer[slot] for slot in slots], home))
        return pieces

    def _lend(self, piece: _Piece) -> Tensor:
        """Scratch for the rows of a piece [n, c]; and for `narrow`, where the wire's dtype is."""
        buffer, n = piece.bucket.buffer, self.wire.size
        narrow = narrow_dtype(self.state, buffer)
        dtype = narrow or buffer.dtype
        lengths = [slot.numel() for slot in piece.slots]
        width = lengths[self.wire.rank]
        count = (n * width + (sum(lengths) if narrow else 0)) * dtype.itemsize
        if piece.home is None:  # a few columns, which have no home to return to
            memory = torch.empty(count, dtype=torch.uint8, device=buffer.device)
        else:
            largest = max(bucket.buffer.nbytes for bucket in self._buckets)
            limit = max(min(SCRATCH_BYTES, 2 * largest), count)
            while self._scratch.lent + count > limit:
                self._release(next(iter(self._holders)))
            memory = piece.scratch = self._scratch.lend(count, buffer.device, limit)
            self._holders[piece] = None
        flat = memory.view(dtype)
        piece.narrow = list(flat[n * width :].split_with_sizes(lengths)) if narrow else []
        return flat[: n * width].view(n, width)

    def _release(self, piece: _Piece) -> None:
        """Do what lets a piece give back its scratch."""
        if piece.reduced:
            self._complete(piece)
            return
        self._arrive_piece(piece)
        assert piece.home is not None
        piece.home.copy_(piece.rows)
        piece.rows = piece.home
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
