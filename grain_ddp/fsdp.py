"""FSDP2: call `apply` after `fully_shard`, and what reduces the gradients is GRAIN.

fully_shard(model)
grain_ddp.fsdp.apply(model, GrainState())
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from grain_ddp._core.sharded import ShardedAggregation
from grain_ddp._core.state import GrainState
from grain_ddp._wire.torch_wire import TorchWire

logger = logging.getLogger("grain_ddp")

# What FSDP calls when a backward pass is complete, all units reduced. An engine callback of our own
# would come too early where reentrant checkpoints run backward passes inside of it.
_COMPLETED = "_root_post_backward_final_callback"
_RESET = "_reset_iter_state"  # since torch 2.13, behind FSDPModule.reset_iter_state


def apply(model: nn.Module, state: GrainState) -> None:
    """Aggregate the gradients of an FSDP2 model with GRAIN: one weight vector per FSDP unit.

    Call it on every rank after the last `fully_shard`, with the root: the module whose forward
    you call. The reduce-scatter of each unit is replaced; everything else is FSDP's own, and
    ``state.last`` is the record of the latest backward pass that reduced gradients. Its leading
    axis has the units in the order in which the backward pass reduced them; so the state's scope
    becomes "bucket", the only one.

    Groups are made of the ranks of the mesh that shards. With a mesh ``[replicas, shards]`` each
    replica aggregates for itself, and FSDP averages the replicas. Where the model is sharded over
    one rank there is nothing to aggregate: then there are no records, and a warning is logged.

    Raises:
        RuntimeError: a PyTorch before 2.9, or one whose FSDP2 is not the one known here.
        TypeError: the model is no FSDP2 module, or the state no `GrainState`.
        ValueError: several `microbatches`, the state or the model is in use already, a
            parameter is not sharded or sharded otherwise than the others, or the ranks' options
            differ.
    """
    if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        raise RuntimeError(
            "grain_ddp: FSDP2 needs PyTorch 2.9 or newer, whose reduce-scatter can be replaced, "
            f"but this is {torch.__version__}. Upgrade it."
        )
    if not isinstance(model, FSDPModule):
        raise TypeError(
            f"grain_ddp: expected a module that fully_shard was called with, but found "
            f"{type(model).__name__}. Call fully_shard(model) first, and apply before "
            "torch.compile(model)."
        )
    if not isinstance(state, GrainState):
        raise TypeError(f"grain_ddp: expected a GrainState, but found {type(state).__name__}.")
    if state.owner is not None:
        raise ValueError(
            f"grain_ddp: this GrainState serves {state.owner}. Make a GrainState for each model."
        )
    units = _units(model)
    internals = list(dict.fromkeys(unit._get_fsdp_state() for unit in units))
    if any(_COMPLETED in vars(one) for one in internals):
        raise ValueError("grain_ddp: apply was called for this model, or a part of it, before.")
    for one in internals:
        if not hasattr(one, _COMPLETED):
            raise RuntimeError(
                f"grain_ddp: the FSDP2 of PyTorch {torch.__version__} has no {_COMPLETED}, by "
                "which a step ends. Use a version that grain_ddp supports."
            )
    for unit in units:
        unit.reshard()  # for its parameters to be the sharded ones
    comm = _ReduceScatter(model, state)
    for unit in units:
        unit.set_custom_reduce_scatter(comm)
    for one in internals:
        _after(one, _COMPLETED, comm.finish)
        if hasattr(one, _RESET):
            _after(one, _RESET, comm.drop)
    if comm.aggregation.wire.size == 1:
        logger.warning(
            "grain_ddp: the model is sharded over one rank, so there is nothing to aggregate and "
            "nothing to record. If more were started, their launcher did not tell them of each "
            "other."
        )


def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _after(owner: Any, name: str, then: Callable[[], None]) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def both() -> None:
        original()
        then()

    setattr(owner, name, both)


class _ReduceScatter:
    """What FSDP calls for its buffers and in place of its reduce-scatter, unit by unit.

    It has the methods of FSDP's own `ReduceScatter`, whose module differs between versions.
    """

    aggregation: ShardedAggregation

    def __init__(self, model: Any, state: GrainState) -> None:
        self.model, self.state = model, state
        self.units = _units(model)
        self.shards, self.replicas = _groups(model, state)
        self.started, self.pushed = False, 0
        self.prepare()

    def prepare(self) -> None:
        """Check the options, on all ranks alike, and begin anew."""
        _check_options(self.state)
        wire = TorchWire(self.shards)
        if self.replicas is not None:  # first, and of all shards, so that every rank raises
            mine = {**self.state.options.agreed(), "step": self.state.step}
            every = wire.gather_objects(mine, "the options of the shards")
            names = {f"{name} (of each shard)": [v[name] for v in every] for name in every[0]}
            TorchWire(self.replicas).agree(names, "the options of the replicas")
        self.aggregation = ShardedAggregation(self.state, wire, self)

    gone = False

    def __str__(self) -> str:
        return f"the FSDP2 model {type(self.model).__name__}"

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Aggregate input [n · c], a unit's padded gradient, into output [c], this rank's part.

        Complete when it returns; on a GPU in the order of the current stream, which is FSDP's own
        for this. The input is used up.
        """
        if not self.started:
            self._start()
        if self.state.owner is None:
            self.prepare()  # its options were loaded from a checkpoint
        elif self.state.owner is not self:
            raise ValueError(
                f"grain_ddp: the GrainState of {self} was given to {self.state.owner} meanwhile. "
                "Make a GrainState for each model."
            )
        wire = self.aggregation.wire
        wire.group = group  # of the same ranks; FSDP may have made another for this purpose
        self.aggregation.scale = _scale(op, wire.size)
        whole = _real(input_tensor)
        parts = whole.view(wire.size, -1).unbind()
        self.pushed += 1
        self.aggregation.guard.note([(f"unit {self.pushed} of the backward pass", whole)])
        self.state.batches.over = True  # every pass that reduces is a step
        self.aggregation.push([[part] for part in parts])
        _real(output_tensor).copy_(parts[wire.rank])

    def _start(self) -> None:
        """In the first backward pass, when the model is as it stays."""
        if getattr(self.model._get_fsdp_state(), "_is_root", True) is False:
            raise ValueError(
                "grain_ddp: apply was called with a part of an FSDP model, so that the rest would "
                "be averaged. Call it with the root: the module whose forward you call."
            )
        added = len(set(_units(self.model)) - set(self.units))
        if added:
            raise ValueError(
                f"grain_ddp: fully_shard was called for {added} more modules after apply; these "
                "would be averaged. Call apply last."
            )
        self.started = True

    def finish(self) -> None:
        """Complete the step, if this backward pass reduced anything."""
        self.pushed = 0
        if self.aggregation.pending:
            self.aggregation.finish()

    def drop(self) -> None:
        """Forget a backward pass that broke off."""
        self.pushed = 0
        self.aggregation.drop()


def _real(flat: Tensor) -> Tensor:
    """The same memory; complex numbers as pairs of real ones, whose products are Re aᴴb."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def _check_options(state: GrainState) -> None:
    if state.microbatches != 1:
        raise ValueError(
            f"grain_ddp: with FSDP2 microbatches must be 1, but it is {state.microbatches}."
        )
    if state.scope != "bucket":
        state.scope = "bucket"  # the only one


def _groups(
    model: nn.Module, state: GrainState
) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """The ranks that every parameter is sharded over, and those that hold copies of this shard."""
    first = None
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if not isinstance(p, DTensor):
            raise ValueError(
                f"grain_ddp: the parameter {name} is not sharded, so that nobody would aggregate "
                "its gradient. Leave it out of ignored_params, or set requires_grad to False."
            )
        mesh, placements = p.device_mesh, p.placements
        hybrid = len(placements) == 2 and isinstance(placements[0], Replicate)
        if not isinstance(placements[-1], Shard) or len(placements) != 1 + hybrid:
            raise ValueError(
                f"grain_ddp: expected parameters sharded over one dimension of a mesh, or "
                f"replicated over the first of two and sharded over the second, but {name} is "
                f"{placements} on {mesh}. Tensor parallelism is not supported; for replicas "
                "alone use DistributedDataParallel and grain_hook."
            )
        groups = [mesh.get_group(k) for k in range(mesh.ndim)]
        ranks = [dist.get_process_group_ranks(group) for group in groups]
        if first is None:
            first = name, groups, ranks
        elif ranks != first[2]:
            raise ValueError(
                f"grain_ddp: all parameters must be sharded over the same ranks, but {first[0]} "
                f"is over {first[2]} and {name} over {ranks} (this is rank {dist.get_rank()}). "
                "Give every fully_shard the same mesh."
            )
    if first is None:
        raise ValueError("grain_ddp: no parameter of the model requires a gradient.")
    *replicas, shards = first[1]
    if shards.size() == 1 and replicas and replicas[0].size() > 1:
        raise ValueError(
            f"grain_ddp: the mesh has {replicas[0].size()} replicas and shards over 1 rank: FSDP "
            "would average all. Swap its dimensions, or use DistributedDataParallel."
        )
    if state.process_group is not None:
        found = dist.get_process_group_ranks(state.process_group)
        if found != first[2][-1]:
            raise ValueError(
                f"grain_ddp: the state's process_group has ranks {found}, but the model is "
                f"sharded over ranks {first[2][-1]} (this is rank {dist.get_rank()}). Leave the "
                "state's at None."
            )
    return shards, replicas[0] if replicas else None


def _scale(op: Any, n: int) -> float:
    """What Σ wᵢ gᵢ is multiplied with, in place of the mean, for what FSDP wants."""
    if op == dist.ReduceOp.AVG:
        return 1.0
    if op == dist.ReduceOp.SUM:
        return float(n)  # FSDP divides
    if op == dist.ReduceOp.PREMUL_SUM:
        return float(n * op.__getstate__()[1])  # set_gradient_divide_factor
    raise ValueError(f"grain_ddp: expected a mean or a sum over the ranks, but found {op}.")
