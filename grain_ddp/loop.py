"""The aggregation for training loops without DDP."""

from __future__ import annotations

import os
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.packing import flatten, packs
from grain_ddp._core.state import GrainState
from grain_ddp._math.record import StepRecord
from grain_ddp._wire.torch_wire import TorchWire, default_group
from grain_ddp._wire.wire import Wire

BUCKET_BYTES = 25 << 20
"""Gradients smaller than this are copied together into buckets of this size, as DDP does."""


def reduce_gradients(
    parameters: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]], state: GrainState
) -> StepRecord | None:
    """Aggregate ``.grad`` of the parameters in place, over ``state.process_group`` or the default.

    Call it on every rank between ``backward()`` and ``optimizer.step()``, with the same parameters
    in the same order; a module stands for its parameters, and names beside them do no harm. A
    gradient that is None counts as zero; where it is None on every rank, it stays None. With
    ``microbatches=m`` call it after each of the m backward passes; that also works in a single
    process without torch.distributed.

    Returns:
        The step's record: None on the steps that make none (`record_every`, `warmup_steps`), and
        before the last of several passes.

    Raises:
        ValueError: the ranks' parameters or options differ, a gradient is sparse, nothing has a
            gradient on any rank, or the state serves a DDP model.
        TypeError: what is given are no parameters, or the state is no `GrainState`.
        RuntimeError: torch.distributed is not initialised.
    """
    if not isinstance(state, GrainState):
        raise TypeError(f"grain_ddp: expected a GrainState, but found {type(state).__name__}.")
    trained = _trained(parameters)
    loop = state.owner
    if loop is None or loop.gone:
        loop = _Loop(state, trained)
    elif not isinstance(loop, _Loop) or not loop.knows(trained):
        raise ValueError(
            f"grain_ddp: this GrainState serves {loop}{getattr(loop, 'sizes', '')}, and cannot "
            f"serve reduce_gradients{_sizes(trained)} too. Make a GrainState for each model."
        )
    aggregation = loop.aggregation
    with torch.no_grad():
        aggregation.wire.come_to(loop.number, f"{loop}{loop.sizes}")
        _fill_missing(trained, aggregation.wire, state.step)
        named = {id(p): _real(p) for p in trained if p.grad is not None}
        if not named:
            raise ValueError("grain_ddp: no parameter has a gradient on any rank.")
        names = {id(p): f"parameter {j} {list(p.shape)}" for j, p in enumerate(trained)}
        names = {id(gradient): names[key] for key, gradient in named.items()}
        for pack in packs(named.values(), BUCKET_BYTES):
            parts = [(names[id(gradient)], gradient.numel()) for gradient in pack]
            aggregation.push(*flatten(pack), parts)
        return aggregation.finish()


def _trained(
    parameters: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> list[Tensor]:
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    found = [one[1] if isinstance(one, tuple) and len(one) == 2 else one for one in given]
    for one in found:
        if not isinstance(one, Tensor):
            raise TypeError(
                "grain_ddp: expected a model, or its parameters(), but found "
                f"{type(one).__name__} among them."
            )
    return [p for p in found if isinstance(p, Tensor) and p.requires_grad]


class _Loop:
    """What `reduce_gradients` keeps of its model from step to step."""

    def __init__(self, state: GrainState, trained: list[Tensor]) -> None:
        group = state.process_group
        if group is None and not (state.microbatches > 1 and _alone()):
            group = default_group()
        self._group = group
        self._known = WeakValueDictionary({id(p): p for p in trained})
        self.sizes = _sizes(trained)
        self.aggregation = Aggregation(state, TorchWire(group), self)
        self.number = self.aggregation.wire.number

    def __str__(self) -> str:
        return "reduce_gradients"

    @property
    def gone(self) -> bool:
        """Whether its process group was destroyed, or all of its parameters."""
        if self._group is not None and self._group not in dist.distributed_c10d._world.pg_map:
            return True
        return self.sizes != _sizes([]) and not self._known

    def replica(self) -> list[tuple[str, Tensor]]:
        """The parameters that there are."""
        return [(f"parameter {j}", p) for j, p in enumerate(self._known.values())]

    def knows(self, trained: list[Tensor]) -> bool:
        """Whether these belong to its model: some of them, where others were frozen or added."""
        new = {id(p): p for p in trained if id(p) not in self._known}
        if trained and len(new) == len(trained):
            return not self._known
        if new:
            self._known.update(new)
        return True


def _sizes(trained: list[Tensor]) -> str:
    return f" of {len(trained)} parameters, {sum(p.numel() for p in trained):,} elements"


def _real(parameter: Tensor) -> Tensor:
    """The gradient; a complex one as pairs of real numbers, whose products are Re aᴴb."""
    gradient = parameter.grad
    assert gradient is not None
    if not gradient.is_complex():
        return gradient
    if gradient.is_conj():
        parameter.grad = gradient = gradient.resolve_conj()
    return torch.view_as_real(gradient)


def _alone() -> bool:
    """Whether this process is one that nobody started together with others."""
    return not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1


def _fill_missing(trained: list[Tensor], wire: Wire, step: int) -> None:
    """Give zeros to what has a gradient on some rank only; see that the ranks fit together."""
    layout = [(tuple(p.shape), str(p.dtype if p.grad is None else p.grad.dtype)) for p in trained]
    layouts = [None if p.grad is None else p.grad.layout for p in trained]
    present = [found is not None for found in layouts]
    sparse = [j for j, found in enumerate(layouts) if found not in (None, torch.strided)]
    # Seldom does anything differ: one number tells.
    device = trained[0].device if trained else torch.device("cpu")
    if wire.same(repr((step, layout, present, sparse)), device, "the comparison of gradients"):
        every = present
    else:
        named = {f"parameter {j} (shape and dtype)": one for j, one in enumerate(layout)}
        wire.agree({"the number of the step": step, **named}, "the comparison of parameters")
        found = wire.gather_objects((present, sparse), "the comparison of gradients, one by one")
        every = [any(ranks) for ranks in zip(*(there for there, _ in found), strict=True)]
        sparse = sorted({j for _, theirs in found for j in theirs})
    if sparse:
        raise ValueError(
            f"grain_ddp: expected dense gradients, but parameters {sparse} have sparse ones "
            f"(seen on rank {wire.whole.rank}). Build the embedding with sparse=False."
        )
    for p, anywhere in zip(trained, every, strict=True):
        if anywhere and p.grad is None:
            p.grad = torch.zeros_like(p)
