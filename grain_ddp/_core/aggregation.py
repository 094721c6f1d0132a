"""A model's gradient aggregation: buckets are pushed, and go through their stages.

The stages themselves are in `transposed` and `sketched`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from grain_ddp._core.agreement import Marks, record_of
from grain_ddp._core.groups import partition
from grain_ddp._core.options import Kind
from grain_ddp._core.passes import Parts
from grain_ddp._core.sketched import Sketched, sketch_size
from grain_ddp._core.stages import Bucket, Stages
from grain_ddp._core.state import GrainState, Owner
from grain_ddp._core.transposed import Transposed
from grain_ddp._math.record import StepRecord
from grain_ddp._wire.wire import Wire


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
        self.state, self.options = state, state.options
        groups = partition(self.options.groups, wire)
        self._marks = Marks(wire, str(owner or self))
        k = sketch_size(self.options, wire)
        if k is None:
            self._stages: Stages = Transposed(state, wire, groups, self._marks)
        else:
            self._stages = Sketched(state, wire, groups, self._marks, k)
        self.wire, self.size = self._stages.wire, self._stages.rows
        self._passes = self._stages.passes
        self._stream: torch.cuda.Stream | None = None
        self.drop()

    def __str__(self) -> str:
        return "an aggregation of its own"

    def drop(self) -> None:
        """Forget what is under way."""
        self._buckets: list[Bucket] = []
        self._stages.drop()

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
                    self._stages.begin(self.options.kind(self.state.step))
            bucket = Bucket(buffer, done)
            self._buckets.append(bucket)
            self._marks.push(len(buffer), buffer.dtype)
            if self.options.microbatches > 1:
                parts = parts or [(len(self._buckets), len(buffer))]
                bucket.blocks = self._passes.add(buffer, parts, self._stages.message(buffer))
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
                record = self._complete()
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        self._buckets = []
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
        stages, buckets, lag = self._stages, self._buckets, self._stages.lag
        stages.advance()
        if stages.kind is not Kind.WEIGHTS_PER_STEP and len(buckets) > 2 + lag:
            # Two buckets back: its Gramian has long arrived, and its scratch is needed now.
            stages.reduce(buckets[-3 - lag])
        if lag and len(buckets) > 1:
            stages.cross(buckets[-2])
        stages.enter(buckets[-1])
        if len(buckets) > 1 + lag:
            stages.arrive(buckets[-2 - lag])

    def _complete(self) -> StepRecord | None:
        """Take all buckets to their last stage."""
        stages, buckets, kind = self._stages, self._buckets, self._stages.kind
        for bucket in buckets:
            stages.cross(bucket)
        for bucket in buckets:
            stages.arrive(bucket)
        # Before any gather, so that the Gramian does not queue behind it.
        if kind.has_gramian and self.options.scope == "global":
            stages.sum(buckets)
        for bucket in buckets:
            stages.reduce(bucket)
        found = [bucket.sum.weights() for bucket in buckets if bucket.sum is not None]
        stages.complete(buckets)
        if kind.has_gramian and self.options.records(self.state.step):
            return record_of(self.state, found)
        return None

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
