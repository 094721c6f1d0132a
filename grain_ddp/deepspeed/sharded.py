"""Stages 1, 2 and 3, where each rank keeps the part of the gradient that it owns."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from grain_ddp._core.sharded import ShardedAggregation
from grain_ddp._core.state import GrainState
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp.deepspeed.owner import Owner
from grain_ddp.deepspeed.seams import SCATTER, version

Owned = tuple[int, Any, Tensor]
"""A parameter's group, the parameter, and its flat gradient."""


class Sharded(Owner[ShardedAggregation]):
    """Stages 1, 2 and 3: the owner of a part of the parameters gets that part of the aggregate.

    In bucket scope DeepSpeed fills its buckets as always, and `bucket` stands for its reduction.
    In global scope it fills none, so that the gradients add up in the parameters; at the end of
    the step's last pass they are aggregated in place, and then put into the buckets, where only
    this rank's part is taken. What differs between the stages, their tables of what belongs to
    whom, is in the subclasses.
    """

    fixed = ("scope",)

    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        self.optimizer = engine.optimizer
        super().__init__(engine, state, wire)
        self.names = {id(p): name for name, p in engine.module.named_parameters()}
        # Since the last end: what autograd made a gradient of, and what came to `bucket`.
        self.arrived, self.came = set[str](), set[str]()
        for _, p in self.trained():
            if p.requires_grad:
                note = functools.partial(_note, self.arrived, self.names[id(p)])
                p.register_post_accumulate_grad_hook(note)
        self.into_bucket = self.optimizer.reduce_ready_partitions_and_remove_grads
        self.epilogue = self.optimizer.independent_gradient_partition_epilogue
        self.optimizer.independent_gradient_partition_epilogue = self.end_of_pass
        self.holds = state.scope == "global"
        if self.holds:
            self.optimizer.reduce_ready_partitions_and_remove_grads = lambda *_: None

    def bind(self) -> ShardedAggregation:
        # Stage 3 of DeepSpeed knows the mean only.
        sums = not getattr(self.optimizer, "gradient_average", True)
        itemsize = max(p.itemsize for p in self.engine.module.parameters())
        return ShardedAggregation(
            self.state,
            self.wire,
            self,
            scale=self.wire.size if sums else 1,
            scratch=2 * self.optimizer.reduce_bucket_size * itemsize,
        )

    # What DeepSpeed calls, in this order.

    def bucket(self, gradients: Sequence[Owned]) -> list[list[Tensor]]:
        """A bucket is full: aggregate, in place, what belongs to each rank, and return that."""
        names = [self.names[id(p)] for _, p, _ in gradients]
        self.came.update(names)
        if not self.holds:
            self.meet(names)
        owned = self.owned(gradients)
        if not self.holds:
            self.push(owned, gradients)
        return owned

    def end_of_pass(self) -> None:
        """A backward pass ends (stage 1 in bucket scope: a step's last one)."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        if self.holds and not boundary:
            return
        with torch.no_grad():
            if self.holds:
                self.release()
            else:
                self.catch_up()
        self.epilogue()
        self.meet([], sorted(self.arrived - self.came))
        self.arrived.clear()
        self.came.clear()
        if boundary and self.aggregation.pending:
            self.aggregation.finish()

    # What is done then.

    def catch_up(self) -> None:
        """Put into the buckets what DeepSpeed forgets: its hooks miss some gradients.

        At stage 3 it looks after a leaf module when that has run, and a ModuleList never does; at
        stage 1 with overlap_comm after what the step's last pass reaches, and not the ones before.
        """
        for i, p in self.trained() if self.arrived - self.came else ():
            name = self.names[id(p)]
            if name in self.arrived - self.came and not self.taken(p):
                if self.gradient(p) is not None:
                    self.replay(i, p)
                else:  # set to None since
                    self.arrived.discard(name)

    def release(self) -> None:
        """Aggregate the gradients that were held back, and hand them to DeepSpeed's buckets."""
        held = self.trained()
        present = [self.gradient(p) is not None for _, p in held]
        if not self.same(present):
            found = self.wire.gather_objects(present, "the comparison of held gradients")
            every = zip(*found, strict=True)
            for j, ranks in enumerate(every):
                if any(ranks) and not all(ranks):
                    self.complement(held[j][1])
                    present[j] = True
        held = [one for one, there in zip(held, present, strict=True) if there]
        for dtype in dict.fromkeys(self.gradient(p).dtype for _, p in held):
            some = [(i, p) for i, p in held if self.gradient(p).dtype == dtype]
            flat = [(i, p, _flat(self.gradient(p))) for i, p in some]
            self.push(self.owned(flat), flat)
        if self.aggregation.pending:
            self.aggregation.finish()
        self.arrived.clear()
        for i, p in held:
            self.arrived.add(self.names[id(p)])
            self.replay(i, p)

    def push(self, owned: list[list[Tensor]], gradients: Sequence[Owned]) -> None:
        """Aggregate, now or with all of the step, what belongs to each rank, in place."""
        self.state.step = self.engine.global_steps
        with torch.no_grad():
            named = [(self.names[id(p)], gradient) for _, p, gradient in gradients]
            self.aggregation.guard.note(named)
            self.aggregation.push(owned)

    def meet(self, names: list[str], missed: Sequence[str] = ()) -> None:
        """See that every rank has come to a bucket of these parameters, or to the pass's end.

        A rank whose loss does not reach a parameter fills other buckets. At the end nothing may
        have `missed` them: DeepSpeed would have averaged it, or left it as it was on each rank.
        """
        every = [(names, missed)]
        if not self.same(every):
            every = self.wire.gather_objects(every[0], "the comparison of a bucket's parameters")
        lost = sorted({name for _, missed in every for name in missed})
        if lost:
            raise RuntimeError(
                "grain_ddp: expected all gradients to come to be aggregated, but DeepSpeed "
                f"{version()} has gone another way with those of {', '.join(lost[:20])}"
                f"{f' and {len(lost) - 20} more' if len(lost) > 20 else ''} (this is rank "
                f"{self.wire.rank}). No parameter has changed in this step. Was a setting of the "
                "optimizer changed after initialize? (Some versions reduce nothing on a CPU if "
                "zero_optimization.contiguous_gradients is false: set it to true.)"
            )
        if len(every) == 1:
            return
        rows = zip_longest(*(names for names, _ in every))
        first = next(row for row in rows if len(set(row)) > 1)
        found = ", ".join(f"rank {j}: {name or 'none'}" for j, name in enumerate(first))
        raise ValueError(
            "grain_ddp: expected gradients of the same parameters, in the same order, on every "
            f"rank, but the next one is {found} (this is rank {self.wire.rank}). Let every rank's "
            'loss reach the same parameters, or, at stages 1 and 2, set grain.scope to "global", '
            "which counts what is missing as zero."
        )

    def same(self, value: Any) -> bool:
        """Whether it is the same on every rank."""
        self.wire.come_to(self.wire.number, str(self))
        device = torch.device(self.engine.device)
        return self.wire.same(repr(value), device, "the comparison of gradients")

    # What a stage knows.

    @abstractmethod
    def trained(self) -> list[tuple[int, Any]]:
        """All trained parameters, each after the number of its group."""

    @abstractmethod
    def taken(self, parameter: Any) -> bool:
        """Whether DeepSpeed has put the parameter's gradient into a bucket since the last end."""

    @abstractmethod
    def gradient(self, parameter: Any) -> Any:
        """The parameter's local gradient, accumulated over the step so far, or None."""

    @abstractmethod
    def complement(self, parameter: Any) -> None:
        """Called on every rank for a parameter that has a gradient on some only."""

    @abstractmethod
    def owned(self, gradients: Iterable[Owned]) -> list[list[Tensor]]:
        """What belongs to each rank, as views of the gradients."""

    @abstractmethod
    def replay(self, group: int, parameter: Any) -> None:
        """Do for a parameter what DeepSpeed's hook would have done."""


class Stage12(Sharded):
    """A rank owns a stretch of all the parameters, one after the other."""

    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        super().__init__(engine, state, wire)
        # DeepSpeed's simplest reduction, the one that is replaced: a whole bucket, of which only
        # this rank's part is used.
        self.optimizer.reduce_scatter = False
        self.optimizer.gradient_reduction_w_predivide = self.reduce
        self.optimizer.allreduce_bucket = self.reduce_list

    def reduce(self, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        """Aggregate this rank's part of a flat bucket. (With `contiguous_gradients`.)"""
        filled = self.optimizer.ipg_buckets[communication_data_type]
        return self._reduce(tensor, filled.params)

    def reduce_list(
        self, bucket: list[Tensor], communication_data_type: torch.dtype, **_: Any
    ) -> Tensor:
        """The same for a list of gradients. (Without `contiguous_gradients`.)"""
        filled = self.optimizer.ipg_buckets[communication_data_type]
        entries = {id(g): entry for g, entry in zip(filled.grads, filled.params, strict=True)}
        return self._reduce(self.optimizer.flatten(bucket), [entries[id(g)] for g in bucket])

    def _reduce(self, flat: Tensor, entries: list[tuple[int, int, int]]) -> Tensor:
        every = [(i, self.optimizer.bit16_groups[i][index]) for i, index, _ in entries]
        parts = flat.split_with_sizes([p.numel() for _, p in every]) if every else []
        if every:
            self.bucket([(i, p, g) for (i, p), g in zip(every, parts, strict=True)])
        return flat

    def trained(self) -> list[tuple[int, Any]]:
        groups = enumerate(self.optimizer.bit16_groups)
        return [(i, p) for i, group in groups for p in group if p.numel()]

    def taken(self, parameter: Any) -> bool:
        key, buckets = self.optimizer.get_param_id(parameter), self.optimizer.ipg_buckets.values()
        waits = any(key == entry[-1] for bucket in buckets for entry in bucket.params)
        return waits or bool(self.optimizer.params_already_reduced[key])

    def gradient(self, parameter: Any) -> Any:
        return self.optimizer.get_gradient_for_reduction(parameter)

    def complement(self, parameter: Any) -> None:
        if self.gradient(parameter) is None:
            parameter.grad = torch.zeros_like(parameter)
            if self.optimizer.use_grad_accum_attribute:
                self.optimizer.fill_grad_accum_attribute()

    def owned(self, gradients: Iterable[Owned]) -> list[list[Tensor]]:
        optimizer = self.optimizer
        owned: list[list[Tensor]] = [[] for _ in range(self.wire.size)]
        for i, p, gradient in gradients:
            key = optimizer.get_param_id(p)
            ranks = optimizer.param_to_partition_ids[i][key]
            starts = sorted(
                (int(optimizer.grad_start_offset[i][rank][key]), rank) for rank in ranks
            )
            stops = [start for start, _ in starts[1:]] + [len(gradient)]
            for (start, rank), stop in zip(starts, stops, strict=True):
                owned[rank].append(gradient[start:stop])
        return owned

    def replay(self, group: int, parameter: Any) -> None:
        self.optimizer.setup_buckets()
        self.into_bucket(parameter, group)


class Stage3(Sharded):
    """A rank owns a shard of each parameter."""

    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        super().__init__(engine, state, wire)
        self.optimizer.reduce_scatter = True  # for DeepSpeed to take the one that is replaced
        setattr(self.optimizer, SCATTER, self.scatter)

    def scatter(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """Aggregate a bucket of parameters: this rank's shard of each one's gradient."""
        return self.bucket([(0, p, _flat(p.grad)) for p in params_to_reduce])[self.wire.rank]

    def trained(self) -> list[tuple[int, Any]]:
        return [(0, p) for group in self.optimizer.fp16_groups for p in group]

    def taken(self, parameter: Any) -> bool:
        buckets = self.optimizer.ipg_buckets.values()
        waits = any(p is parameter for bucket in buckets for p in bucket.params)
        return waits or parameter.grad is None

    def gradient(self, parameter: Any) -> Any:
        return parameter.grad

    def complement(self, parameter: Any) -> None:
        raise ValueError(
            f"grain_ddp: expected a gradient of {self.names[id(parameter)]} on every rank or on "
            f"none, but some have one (this is rank {self.wire.rank}, where it is "
            f"{'there' if parameter.grad is not None else 'missing'}). At stage 3 every rank's "
            "loss has to reach the same parameters."
        )

    def owned(self, gradients: Iterable[Owned]) -> list[list[Tensor]]:
        owned: list[list[Tensor]] = [[] for _ in range(self.wire.size)]
        for _, _, gradient in gradients:
            width = -(-len(gradient) // self.wire.size)
            for rank, views in enumerate(owned):
                views.append(gradient[rank * width : (rank + 1) * width])
        return owned

    def replay(self, group: int, parameter: Any) -> None:
        self.into_bucket(parameter)


def _note(names: set[str], name: str, _: Tensor) -> None:
    names.add(name)


def _flat(gradient: Tensor) -> Tensor:
    """The gradient as one row, in its own memory; it is made contiguous if it is not."""
    if not gradient.is_contiguous():
        gradient.data = gradient.contiguous()
    return gradient.detach().view(-1)
