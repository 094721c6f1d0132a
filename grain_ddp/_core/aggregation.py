"""A model's gradient aggregation: buckets are pushed, and go through their stages.

The stages themselves are in `transposed` and `sketched`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from grain_ddp._core.agreement import AnyWeights, Marks, record_due
from grain_ddp._core.groups import partition
from grain_ddp._core.guard import Guard
from grain_ddp._core.options import Kind
from grain_ddp._core.passes import Parts
from grain_ddp._core.sketched import Sketched, Sketches, sketch_size
from grain_ddp._core.stages import Bucket, Stages
from grain_ddp._core.state import GrainState, Owner
from grain_ddp._core.transposed import Transposed
from grain_ddp._math.record import StepRecord
from grain_ddp._math.weighting import check_groups
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
        self.guard = Guard(self.options, wire, owner)
        self._partition = partition(self.options.groups, wire)
        self._marks = Marks(wire, str(owner or self))
        rows = range(wire.size * self.options.microbatches)  # with several passes, groups of one
        several = self.options.microbatches > 1
        self._groups = [[row] for row in rows] if several else self._partition
        self._every: dict[int | None, Stages] = {}  # by the size of the sketch
        self._numbers = 0  # in the last step
        self._stages = self._choose(wire.whole)
        self.wire, self.size = self._stages.wire, self._stages.rows
        check_groups(self.options.weighting, self.size)
        self._passes = self._stages.passes
        self._stream: torch.cuda.Stream | None = None
        self.drop()

    def __str__(self) -> str:
        return "an aggregation of its own"

    def _choose(self, wire: Wire) -> Stages:
        """The stages of a step, with a sketch or without. Collective at its first use."""
        k = sketch_size(self.options, wire, self._numbers)
        if k not in self._every:
            arguments = self.state, wire, self._partition, self._marks
            self._every[k] = Sketched(Sketches(*arguments, k)) if k else Transposed(*arguments)
        return self._every[k]

    def drop(self) -> None:
        """Forget what is under way."""
        self._buckets: list[Bucket] = []
        self._stages.drop()
        self.guard.drop()

    def abandon(self) -> None:
        """Let what is under way arrive, then forget it: after a step that broke off elsewhere."""
        try:
            for transfer in [t for bucket in self._buckets for t in bucket.transfers]:
                transfer.wait()
        finally:
            self.drop()
            if self.state.batches.over:  # else what was told last is of the next step
                self.state.batches.clear()

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
                    self._stages = self._choose(self.wire.whole)
                    self.state.batches.agree(self.wire, self._stages.inside)
                    self._stages.begin(self.state.kind)
            bucket = Bucket(buffer, done)
            self._buckets.append(bucket)
            self.state.batches.over = True
            self._marks.push(len(buffer), buffer.dtype)
            self.guard.push(buffer, parts or [(f"bucket {len(self._buckets)}", len(buffer))])
            if self.options.microbatches > 1:
                parts = parts or [(len(self._buckets), len(buffer))]
                bucket.blocks = self._passes.add(buffer, parts, self._stages.message(buffer))
                if not self._last_pass:
                    buffer.zero_()
                    return
            if self.options.guard == "drop" and self._stages.kind is Kind.WEIGHTS_PER_BUCKET:
                bucket.numbers = self.guard.begin(self.state.step, self.state.batches.empty)
            self._advance()

    def finish(self) -> StepRecord | None:
        """Complete the step: the results are in the buffers. The record, if one is due."""
        buckets, found = self._buckets, list[AnyWeights]()
        device = buckets[0].buffer.device
        with self._work(device):
            if self._last_pass:
                found = self._complete()
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        self._buckets = []
        for bucket in buckets:
            if bucket.done is not None:
                bucket.done()
        if not self._last_pass:
            self._passes.done += 1
            self.state.batches.over = False
            self.guard.end_pass()
            return None
        self._passes.drop()
        self._numbers = sum(len(bucket.buffer) for bucket in buckets)
        self.guard.drop()
        suspects = self.guard.take()
        record = record_due(self.state, self._stages.kind, found, suspects, self.size)
        self.state.advance(record)
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
            self._arrive(buckets[-2 - lag])

    def _arrive(self, bucket: Bucket) -> None:
        self._marks.left_out = self.guard.judge(bucket.numbers, self._groups)
        bucket.numbers = None
        self._stages.arrive(bucket)

    def _complete(self) -> list[AnyWeights]:
        """Take all buckets to their last stage. The weights that were found."""
        stages, buckets, kind = self._stages, self._buckets, self._stages.kind
        numbers = self.guard.begin(self.state.step, self.state.batches.empty)
        self.guard.compare_replicas(self.state.step)
        for bucket in buckets:
            stages.cross(bucket)
        for bucket in buckets:
            self._arrive(bucket)
        self._marks.left_out = self.guard.judge(numbers, self._groups)
        # Before any gather, so that the Gramian does not queue behind it.
        if kind.has_gramian and self.options.scope == "global":
            stages.sum(buckets)
        for bucket in buckets:
            stages.reduce(bucket)
        found = [bucket.sum.weights() for bucket in buckets if bucket.sum is not None]
        stages.complete(buckets)
        self.guard.complete()
        return found

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
