"""The DDP communication hook."""

# No `from __future__ import annotations` here: DDP wants a hook's annotations as types.

import contextlib
import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.state import GrainState
from grain_ddp._math.suspect import FaultyWorker
from grain_ddp._wire.torch_wire import TorchWire, default_group


def grain_hook(state: GrainState, bucket: GradBucket) -> Future[Tensor]:
    """Aggregate a DDP model's gradients: ``model.register_comm_hook(state, grain_hook)``.

    Buckets are exchanged while the backward pass computes the next ones. The result is complete
    when ``backward()`` returns, as it is without a hook.

    Raises:
        TypeError: the hook was registered without a `GrainState`, or called by something that is
            not DDP's reducer (`torch.compile` with ``optimize_ddp="python_reducer"``).
        ValueError: a sparse gradient, ranks whose options differ, groups that do not fit the ranks,
            one state for two models, or a way of DDP to leave parameters out of the hook.
    """
    if not isinstance(state, GrainState):
        raise TypeError(
            f"grain_ddp: grain_hook needs a GrainState, but found {type(state).__name__}. "
            "Register it with model.register_comm_hook(GrainState(), grain_hook)."
        )
    if not isinstance(bucket, GradBucket):
        raise TypeError(
            "grain_ddp: grain_hook expects one of DDP's gradient buckets, but found "
            f"{type(bucket).__name__}. torch.compile's python_reducer calls hooks once per "
            "parameter and ignores their result: set torch._dynamo.config.optimize_ddp to "
            '"ddp_optimizer".'
        )
    buffer = bucket.buffer()
    if buffer.layout != torch.strided:
        raise ValueError(
            "grain_ddp: expected dense gradients, but bucket "
            f"{bucket.index()} on rank {dist.get_rank()} is {buffer.layout}. "
            "Build the embedding with sparse=False."
        )
    hook = state.owner
    if not isinstance(hook, _Hook) or hook.gone:
        hook = _Hook(state)
    return hook.add(bucket)


def attach(module: nn.Module, state: GrainState) -> bool:
    """Register the hook with the DDP model that `module` is, or that a framework wraps it in.

    Nothing happens where this state's hook is registered already.

    Returns:
        Whether there is such a model. In a world of one rank there need not be: a warning.

    Raises:
        ValueError: there is none, though there are several ranks: something else would average.
    """
    gc.collect()  # a framework that starts anew may have dropped its first wrapper just now
    found = [model for model in _every_model() if module in (model, model.module)]
    for model in found:
        if not _has(model, state):
            model.register_comm_hook(state, grain_hook)
    if found:
        return True
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "grain_ddp: expected a model that DistributedDataParallel wraps, but on rank "
            f"{dist.get_rank()} nothing of that kind wraps {type(module).__name__}. Choose DDP; or "
            'with DeepSpeed leave this out, import grain_ddp.deepspeed and put "grain": '
            '{"enabled": true} into its config.'
        )
    warnings.warn(
        "grain_ddp: the world has one rank, so there is nothing to aggregate. If more were "
        "started, their launcher did not tell them of each other.",
        stacklevel=3,
    )
    return False


class _Hook:
    """What the hook keeps of its model, and between the buckets of one backward pass.

    DDP's own ``is_last`` does not always tell when a pass is complete. In the first pass of a
    static graph all buckets have the number 0, and DDP waits for them before the pass ends: there
    it is when every parameter has come. Where DDP skips unused buckets it is when the pass ends.
    """

    def __init__(self, state: GrainState) -> None:
        models = _models(state)
        if len(models) > 1:
            raise ValueError(
                f"grain_ddp: this GrainState is registered with {len(models)} models, "
                f"{' and '.join(map(_name, models))}. Make one per model: its buckets are counted "
                "step by step."
            )
        self._model = weakref.ref(models[0]) if models else None
        self._called = _name(models[0]) if models else "a DDP model"
        group = _process_group(state.process_group, models)
        # With this option unused buckets, the last one too, do not reach the hook.
        self._skips = any(getattr(m, "skip_all_reduce_unused_params", False) for m in models)
        self._trained = _trained(models[0]) if models else 0  # parameters in all buckets
        self._names = _named(models[0]) if models else {}
        self._seen: set[int] = set()  # those of this pass
        self._check(state, models)
        self.aggregation = Aggregation(state, TorchWire(group), self)

    def __str__(self) -> str:
        return self._called

    @property
    def gone(self) -> bool:
        return self._model is not None and self._model() is None

    def _check(self, state: GrainState, models: list[DistributedDataParallel]) -> None:
        """ValueError for ways of DDP that go past a hook."""
        if state.microbatches > 1 and (
            self._skips or any(m.find_unused_parameters for m in models)
        ):
            raise ValueError(
                "grain_ddp: microbatches needs every parameter in every pass, but "
                "find_unused_parameters or skip_all_reduce_unused_params is set: DDP would leave "
                "out what the last pass does not use. Set it to False, or microbatches to 1."
            )
        if any(getattr(m, "_delay_all_reduce_params", ()) for m in models):
            raise ValueError(
                "grain_ddp: DistributedDataParallel(delay_all_reduce_named_params=...) averages "
                "those parameters past every hook. Leave the argument out."
            )

    def add(self, bucket: GradBucket) -> Future[Tensor]:
        aggregation, buffer = self.aggregation, bucket.buffer().detach()
        parameters = bucket.parameters()
        found = set(map(id, parameters))
        if aggregation.pending and not self._seen.isdisjoint(found):
            aggregation.abandon()  # the last backward pass was broken off by an exception
        first = not aggregation.pending
        self._seen = found if first else self._seen | found
        if first:
            self._check_model(parameters)
        future: Future[Tensor] = Future()
        if buffer.device.type != "cpu":
            future = Future(devices=[buffer.device])
        parts = [(self._names.get(id(p), id(p)), p.numel()) for p in parameters]
        aggregation.push(buffer, lambda: future.set_result(buffer), parts)
        if bucket.is_last() or (bucket.index() == 0 and len(self._seen) == self._trained):
            try:
                aggregation.finish()
            except FaultyWorker as error:  # not from in here, or DDP could not go on after it
                _after_backward(error)
        elif first and self._skips:
            with contextlib.suppress(RuntimeError):  # not in a backward pass: `Join`
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        return future

    def _check_model(self, parameters: list[Tensor]) -> None:
        """ValueError if these are another model's, which has got the same state meanwhile."""
        model = None if self._model is None else self._model()
        if model is None:
            return
        if not getattr(model, "_divide_by_initial_world_size", True) and (
            self.aggregation.state.kind.averages
        ):
            raise ValueError(
                "grain_ddp: join(divide_by_initial_world_size=False) divides by the ranks that are "
                "still there, which a hook is not told. Leave it at True, or take another "
                'weighting than "mean", which gives absent ranks no weight.'
            )
        if id(parameters[0]) in self._names:
            return
        others = [other for other in _models(self.aggregation.state) if other is not model]
        if others:
            raise ValueError(
                f"grain_ddp: this GrainState serves {self}, and cannot serve {_name(others[0])} "
                "too. Make a GrainState for each model: its buckets are counted step by step."
            )
        self._names = _named(model)

    def replica(self) -> list[tuple[str, Tensor]]:
        """The model's parameters and buffers, by name."""
        model = None if self._model is None else self._model()
        if model is None:
            return []
        return [*model.module.named_parameters(), *model.module.named_buffers()]

    def local(self) -> AbstractContextManager[None]:
        """Backward passes of this rank alone."""
        model = None if self._model is None else self._model()
        return contextlib.nullcontext() if model is None else model.no_sync()

    def _finish(self) -> None:
        if self.aggregation.pending:
            self.aggregation.finish()


def _after_backward(error: Exception) -> None:
    """Raise it when DDP has completed its pass, for which it queues a callback after this one."""

    def fail() -> None:
        raise error

    queue = torch.autograd.Variable._execution_engine.queue_callback
    try:
        queue(lambda: queue(fail))
    except RuntimeError:  # not in a backward pass: `Join`
        raise error from None


def _name(model: DistributedDataParallel) -> str:
    count = sum(p.numel() for p in model.module.parameters())
    return f"the DDP model {type(model.module).__name__} of {count:,} parameters"


def _named(model: DistributedDataParallel) -> dict[int, str]:
    """The names of the parameters, by their id."""
    return {id(p): name for name, p in model.module.named_parameters()}


def _trained(model: DistributedDataParallel) -> int:
    """How many parameters DDP reduces. (Its reducer, which knows, is locked while it calls.)"""
    ignored = model.parameters_to_ignore
    named = model.module.named_parameters()
    return sum(p.requires_grad and name not in ignored for name, p in named)


def _models(state: GrainState) -> list[DistributedDataParallel]:
    """The models whose hook has this state: DDP does not tell a hook whose it is."""
    return [model for model in _every_model() if _has(model, state)]


def _every_model() -> Iterator[DistributedDataParallel]:
    return (m for m in gc.get_objects() if issubclass(type(m), DistributedDataParallel))


def _has(model: DistributedDataParallel, state: GrainState) -> bool:
    return any(held is state for _, held in getattr(model, "_comm_hooks", ()))


def _process_group(
    given: dist.ProcessGroup | None, models: list[DistributedDataParallel]
) -> dist.ProcessGroup:
    theirs: dist.ProcessGroup = models[0].process_group if models else default_group()
    if given is None:
        return theirs
    expected, found = (dist.get_process_group_ranks(group) for group in (theirs, given))
    if models and expected != found:
        raise ValueError(
            f"grain_ddp: the state's process_group has ranks {found}, but the model's has ranks "
            f"{expected} (this is rank {dist.get_rank()}). Give both the same group, or leave the "
            "state's at None."
        )
    return given
