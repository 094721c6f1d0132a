"""Stage 0, where every rank keeps the whole gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.packing import flatten, packs
from grain_ddp._core.state import GrainState
from grain_ddp._core.transposed import MESSAGE_BYTES
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp.deepspeed.owner import Owner


class Replicated(Owner[Aggregation]):
    """Every rank has the whole result: stage 0, and the optimizer of stage 1 that keeps bf16
    parameters with fp32 gradients."""

    fixed = ("microbatches",)

    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        super().__init__(engine, state, wire)
        # DeepSpeed divides the loss by the number of passes, of which each is a group here.
        self.scale = state.microbatches * (1 if engine.gradient_average else wire.size)
        engine._reduce_non_expert_gradients = self.reduce
        self.left: list[Any] = []  # the gradients as they were left
        if state.microbatches > 1:
            self.micro_step = -1  # the last one that was counted
            self.at_the_last = engine.allreduce_gradients
            engine.allreduce_gradients = self.after_a_pass

    def bind(self) -> Aggregation:
        return Aggregation(self.state, self.wire, self)

    def reduce(self, grads: Sequence[Tensor], elements_per_buffer: int) -> None:
        """What DeepSpeed calls at the end of a step's accumulation with all gradients."""
        if not all(isinstance(g, Tensor) and g.layout == torch.strided for g in grads):
            raise ValueError(
                "grain_ddp: expected dense gradients, but some are sparse. Build the embedding "
                "with sparse=False."
            )
        if self.as_left(grads) == self.left and not self.engine._running_engine_backward:
            return  # by hand, when there is nothing to do any more
        self.state.step = self.engine.global_steps
        own = {p.grad.data_ptr(): name for name, p in self.parameters() if p.grad is not None}
        names = {id(g): own.get(g.data_ptr(), f"gradient {j}") for j, g in enumerate(grads)}
        for dtype in dict.fromkeys(g.dtype for g in grads):
            some = [g for g in grads if g.dtype == dtype]
            limit = elements_per_buffer * dtype.itemsize
            if self.state.scope == "global":
                # The big ones by themselves, where they are: without the copy that a bucket is.
                limit = MESSAGE_BYTES
                some.sort(key=lambda g: g.nbytes < limit)
            for pack in packs(some, limit):
                flat, copy_back = flatten(pack)
                parts = [(names[id(g)], g.numel()) for g in pack]
                self.aggregation.push(flat, functools.partial(self._done, flat, copy_back), parts)
        self.aggregation.finish()
        self.left = self.as_left(grads)

    def as_left(self, grads: Sequence[Tensor]) -> list[Any]:
        """What changes with every step, and when a gradient changes."""
        # Those of the parameters, if there are any: what DeepSpeed gives are new views of them.
        own = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return [self.engine.micro_steps, *((id(g), g._version) for g in own or grads)]

    def parameters(self) -> Iterable[tuple[str, Tensor]]:
        every: Iterable[tuple[str, Tensor]] = self.engine.module.named_parameters()
        return every

    def after_a_pass(self, *arguments: Any, **options: Any) -> None:
        """What DeepSpeed calls after each backward pass; only after the last it reduces itself."""
        again, self.micro_step = self.micro_step == self.engine.micro_steps, self.engine.micro_steps
        if again and self.engine._running_engine_backward:
            raise ValueError(
                f"grain_ddp: expected engine.step() after each of {self.state.microbatches} "
                "backward passes, which are groups of their own, but two came without it (this is "
                f"rank {self.wire.rank}). Call it, or set grain.microbatches to 1."
            )
        if again:
            return  # by hand, when there is nothing to do any more
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.buffered_allreduce_fallback()
        self.at_the_last(*arguments, **options)

    def _done(self, flat: Tensor, copy_back: Callable[[], None]) -> None:
        if self.scale != 1:
            flat *= self.scale
        copy_back()
