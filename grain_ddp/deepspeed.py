"""DeepSpeed: import this before `deepspeed.initialize`, and the "grain" section of the config acts.

    { "zero_optimization": {"stage": 2}, "grain": {"enabled": true} }

Whoever calls `initialize`: the engine then aggregates with GRAIN, and ``engine.grain`` is its
`GrainState`. Without the section, or with ``"enabled": false``, DeepSpeed is left alone. For a
script that nobody wants to edit: ``python -m grain_ddp.deepspeed train.py ...``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grain_ddp._core.aggregation import MESSAGE_BYTES, Aggregation
from grain_ddp._core.packing import flatten, packs
from grain_ddp._core.sharded import ShardedAggregation
from grain_ddp._core.state import GrainState
from grain_ddp._math.record import StepRecord
from grain_ddp._wire.torch_wire import TorchWire, default_group
from grain_ddp.sinks import jsonl

try:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import logger
    from deepspeed.utils.logging import print_dist
except ImportError as error:
    raise ImportError(
        'grain_ddp.deepspeed needs DeepSpeed: pip install "grain-ddp[deepspeed]", after torch.'
    ) from error

OLDEST = (0, 19, 1)

_OPTIONS = set(inspect.signature(GrainState).parameters) - {"process_group", "on_step"}
_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}

# What is replaced in DeepSpeed, with the parameters that are relied upon.
_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
_SEAMS: dict[type, dict[str, tuple[str, ...]]] = {
    DeepSpeedEngine: {"_reduce_non_expert_gradients": ("grads", "elements_per_buffer")},
    DeepSpeedZeroOptimizer: {
        "reduce_ready_partitions_and_remove_grads": ("param", "i"),
        "independent_gradient_partition_epilogue": (),
        "gradient_reduction_w_predivide": ("tensor", "communication_data_type"),
        "allreduce_bucket": ("bucket", "communication_data_type"),
        "get_gradient_for_reduction": ("param",),
    },
    DeepSpeedZeroOptimizer_Stage3: {
        "reduce_ready_partitions_and_remove_grads": ("param",),
        "independent_gradient_partition_epilogue": (),
        _SCATTER: ("params_to_reduce", "communication_data_type"),
    },
}

# Settings that cannot be honoured: where they are in the config, which values, and why.
_REFUSED: list[tuple[str, Callable[[Any], bool], str]] = [
    ("sequence_parallel_size", lambda v: v > 1, "several ranks share one group's samples"),
    ("tensor_parallel.autotp_size", lambda v: v > 1, "a rank holds a part of a group's gradient"),
    ("expert_parallel.enabled", bool, "experts have data-parallel groups of their own"),
    ("sparse_gradients", bool, "a sparse gradient has no Gramian; leave it dense"),
    ("managed_gradient_accumulation", lambda v: v is False, "no backward pass is the step's last"),
    ("compile.deepcompile", bool, "it reduces gradients inside of the compiled graph"),
    ("zero_optimization.mics_shard_size", lambda v: v > 0, "MiCS averages in two levels"),
    ("zero_optimization.zero_quantized_gradients", bool, "the gradients that arrive are not exact"),
    ("zero_optimization.zero_hpz_partition_size", lambda v: v > 1, "it has not been tried"),
    ("zero_optimization.zenflow", bool, "it averages some gradients later than others"),
    ("zero_optimization.offload_optimizer.super_offload", bool, "it has a reduction of its own"),
    (
        "optimizer.type",
        lambda v: str(v).lower() in ("onebitadam", "zerooneadam", "onebitlamb"),
        "it averages momenta, not gradients",
    ),
    ("optimizer.type", lambda v: str(v).lower() == "muon", "it needs whole matrices, not parts"),
]


def attach(engine: Any) -> None:
    """Let the engine aggregate as the "grain" section of its config says; without one, nothing.

    Raises:
        ValueError: an option or a combination that cannot be honoured, by the name of its key.
        RuntimeError: a DeepSpeed that is not supported.
    """
    engine.grain = None
    config = engine._config._param_dict
    _check_config(config)
    options = _section(config)
    if options is None:
        return
    _check_version()
    _check_engine(engine)
    stage = int(engine.zero_optimization_stage())
    if stage and _basic_optimizer(engine) is None:
        return  # for inference
    log = options.pop("log", None)
    options.setdefault("scope", "bucket" if stage >= 2 else "global")
    state = _state(options)
    wire = TorchWire(engine.seq_data_parallel_group or default_group())
    if state.wire_dtype is None and engine.communication_data_type in _DTYPES.values():
        state.wire_dtype = engine.communication_data_type
    state.on_step = _sink(log, wire)
    optimizer = engine.optimizer
    _check_groups(engine, state, stage)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _Stage3(engine, state, wire)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        _Stage12(engine, state, wire)
    elif stage <= 1:  # also DeepSpeed's BF16_Optimizer, whose stage is 1
        _Replicated(engine, state, wire)
    else:
        raise ValueError(
            f"grain_ddp: zero_optimization.stage {stage} with {type(optimizer).__name__} is not "
            "supported. Use one of DeepSpeed's own ZeRO optimizers, or disable grain."
        )
    engine.grain = state
    if wire.rank == 0:
        _announce(engine, state, wire, stage)


# The config


def _section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options in the config's "grain" section; None if there is none, or it is not enabled."""
    if "grain" not in config:
        return None
    section = config["grain"]
    if not isinstance(section, Mapping):
        raise ValueError(
            f'grain_ddp: grain must be a section such as {{"enabled": true}}, not {section!r}.'
        )
    options = dict(section)
    enabled = options.pop("enabled", None)
    if not isinstance(enabled, bool):
        raise ValueError(f"grain_ddp: grain.enabled must be true or false, but it is {enabled!r}.")
    if not enabled:
        return None
    known = _OPTIONS | {"log"}
    for name in options:
        if name not in known:
            raise ValueError(
                f"grain_ddp: grain.{name} is not an option. There are: enabled, "
                f"{', '.join(sorted(known))}."
            )
    return options


def _state(options: dict[str, Any]) -> GrainState:
    name = options.get("wire_dtype")
    if name is not None:
        if not isinstance(name, str) or name not in _DTYPES:
            raise ValueError(
                f"grain_ddp: grain.wire_dtype must be null or one of {', '.join(_DTYPES)}, but it "
                f"is {name!r}."
            )
        options["wire_dtype"] = _DTYPES[name]
    try:
        return GrainState(**options)
    except ValueError as error:
        raise ValueError(str(error).replace("grain_ddp: ", "grain_ddp: grain.", 1)) from None


def _check_version() -> None:
    found = tuple(map(int, re.findall(r"\d+", deepspeed.__version__)[:3]))
    if found < OLDEST:
        raise RuntimeError(
            f"grain_ddp: needs DeepSpeed {'.'.join(map(str, OLDEST))} or newer, but this is "
            f"{deepspeed.__version__}. Upgrade it."
        )
    for owner, methods in _SEAMS.items():
        for name, expected in methods.items():
            parameters = _parameters(getattr(owner, name, None))[: len(expected)]
            if parameters != expected:
                raise RuntimeError(
                    f"grain_ddp: DeepSpeed {deepspeed.__version__} has another "
                    f"{owner.__name__}.{name} than grain_ddp knows: expected the parameters "
                    f"{expected}, found {parameters}. Use a version that grain_ddp supports."
                )


def _parameters(method: Any) -> tuple[str, ...]:
    if method is None:
        return ()
    if method.__name__ == "wrapped_fn":  # DeepSpeed's instrumentation, which hides the signature
        method = inspect.getclosurevars(method).nonlocals["func"]
    return tuple(inspect.signature(method).parameters)[1:]


def _check_config(config: Mapping[str, Any]) -> None:
    if _section(config) is not None:
        _refuse((key, why) for key, bad, why in _REFUSED if _refuses(config, key, bad))


def _check_engine(engine: Any) -> None:
    """See that the engine is one that can be honoured: what its config does not tell."""
    refused = []
    mpu = engine.mpu
    if engine.has_moe_layers:
        refused.append(("MoE layers", "experts have data-parallel groups of their own"))
    if engine.pipeline_parallelism:
        refused.append(("pipeline parallelism", "a rank holds a part of a group's gradient"))
    if engine.sequence_parallel_size > 1:
        refused.append(("sequence_parallel_size", "several ranks share one group's samples"))
    if getattr(mpu, "get_model_parallel_world_size", lambda: 1)() > 1:
        refused.append(("mpu (model parallelism)", "a rank holds a part of a group's gradient"))
    if not engine.enable_backward_allreduce:
        refused.append(("optimizer.type", "it does without DeepSpeed's reduction"))
    if "muon" in type(_basic_optimizer(engine)).__name__.lower():
        refused.append(("optimizer (Muon)", "it needs whole matrices, not parts"))
    for name, module in engine.module.named_modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.sparse:
            refused.append(
                (f"sparse=True of {name or 'the model'}", "a sparse gradient has no Gramian")
            )
    expected = _ranks(engine.seq_data_parallel_group)
    for p in engine.module.parameters():
        own = getattr(p, "ds_process_group", None)
        if own is not None and _ranks(own) != expected:
            refused.append(("deepspeed.zero.Init", "a parameter has a process group of its own"))
    _refuse(refused)


def _refuse(refused: Iterable[tuple[str, str]]) -> None:
    for key, why in refused:
        raise ValueError(
            f'grain_ddp: "grain" cannot be honoured together with {key}: {why}. '
            f"Change {key}, or disable grain."
        )


def _check_groups(engine: Any, state: GrainState, stage: int) -> None:
    """ValueError for groups that the stage cannot form."""
    if stage and state.groups != "rank":
        raise ValueError(
            f'grain_ddp: grain.groups must be "rank" at stage {stage}, where each rank owns a part '
            f"of the gradient, but it is {state.groups!r}. Stage 0 has groups of several ranks."
        )
    passes = engine.gradient_accumulation_steps()
    if state.microbatches > 1 and (stage or state.microbatches != passes):
        raise ValueError(
            "grain_ddp: grain.microbatches must be 1, or at stage 0 gradient_accumulation_steps, "
            f"which is {passes}, but it is {state.microbatches} at stage {stage}. Elsewhere "
            "DeepSpeed adds micro-batches up before they can be weighed."
        )


def _basic_optimizer(engine: Any) -> Any:
    """The optimizer that DeepSpeed wraps, or None if it was given none."""
    return getattr(engine, "basic_optimizer", None)


def _refuses(config: Any, key: str, bad: Callable[[Any], bool]) -> bool:
    for name in key.split("."):
        if not isinstance(config, Mapping) or config.get(name) is None:
            return False
        config = config[name]
    return bad(config)


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group or default_group())


def _announce(engine: Any, state: GrainState, wire: TorchWire, stage: int) -> None:
    # The one that does not depend on the log's level, which hides "info" unless it is changed.
    print_dist(
        f"grain_ddp: {state.weighting} over {wire.size} ranks, scope {state.scope}, "
        f"ZeRO stage {stage}",
        ranks=[0],
    )
    if wire.size == 1:
        logger.warning(
            "grain_ddp: the world has one rank, so there is nothing to aggregate. If more were "
            "started, their launcher did not tell them of each other."
        )
    if stage >= 2 and state.scope == "global":
        held = sum(
            getattr(p, "ds_numel", p.numel()) * p.element_size()
            for p in engine.module.parameters()
            if p.requires_grad
        )
        logger.warning(
            f'grain_ddp: grain.scope "global" at stage {stage} keeps the whole local gradient '
            f"until the step: {held / 2**20:.1f} MiB per rank instead of "
            f'{held / wire.size / 2**20:.1f}. "bucket" does not.'
        )


# The log


def _sink(path: Any, wire: TorchWire) -> Callable[[StepRecord], None] | None:
    """`grain_ddp.sinks.jsonl`, whose errors are errors on every rank."""
    if path is None:
        return None
    problem, sink = "", None
    if isinstance(path, str):
        try:
            sink = jsonl(path)
        except OSError as error:
            problem = f"cannot be written: {error}"
    else:
        problem = f"must be null or the path of a file, but it is {path!r}"
    problem = next(filter(None, wire.gather_objects(problem)), "")
    if problem:
        raise ValueError(f"grain_ddp: grain.log {problem}.")
    return sink


# The stages


class _Owner:
    gone = False
    engine: Any

    def __str__(self) -> str:
        return f"the DeepSpeed engine of {type(self.engine.module).__name__}"


class _Replicated(_Owner):
    """Every rank has the whole result: stage 0, and the optimizer of stage 1 that keeps bf16
    parameters with fp32 gradients."""

    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        self.engine, self.state = engine, state
        self.aggregation = Aggregation(state, wire, self)
        # DeepSpeed divides the loss by the number of passes, of which each is a group here.
        self.scale = state.microbatches * (1 if engine.gradient_average else wire.size)
        engine._reduce_non_expert_gradients = self.reduce
        if state.microbatches > 1:
            self.at_the_last = engine.allreduce_gradients
            engine.allreduce_gradients = self.after_a_pass

    def reduce(self, grads: Sequence[Tensor], elements_per_buffer: int) -> None:
        """What DeepSpeed calls at the end of a step's accumulation with all gradients."""
        if not all(isinstance(g, Tensor) and g.layout == torch.strided for g in grads):
            raise ValueError(
                "grain_ddp: expected dense gradients, but some are sparse. Build the embedding "
                "with sparse=False."
            )
        self.state.step = self.engine.global_steps
        for dtype in dict.fromkeys(g.dtype for g in grads):
            some = [g for g in grads if g.dtype == dtype]
            limit = elements_per_buffer * dtype.itemsize
            if self.state.scope == "global":
                # The big ones by themselves, where they are: without the copy that a bucket is.
                limit = MESSAGE_BYTES
                some.sort(key=lambda g: g.nbytes < limit)
            for pack in packs(some, limit):
                flat, copy_back = flatten(pack)
                self.aggregation.push(flat, functools.partial(self._done, flat, copy_back))
        self.aggregation.finish()

    def after_a_pass(self, *arguments: Any, **options: Any) -> None:
        """What DeepSpeed calls after each backward pass; only after the last it reduces itself."""
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.buffered_allreduce_fallback()
        self.at_the_last(*arguments, **options)

    def _done(self, flat: Tensor, copy_back: Callable[[], None]) -> None:
        if self.scale != 1:
            flat *= self.scale
        copy_back()


class _Sharded(_Owner):
    """Stages 1, 2 and 3: the owner of a part of the parameters gets that part of the aggregate.

    DeepSpeed fills a bucket, has it reduced, and takes this rank's part from it. In bucket scope
    that reduction is replaced. In global scope buckets are held back, so that the gradients add up
    in the parameters; at the boundary they are aggregated in place, and then the buckets go their
    way, with nothing left to reduce.
    """

    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.state, self.wire = state, wire
        self.names = {id(p): name for name, p in engine.module.named_parameters()}
        # Stage 3 of DeepSpeed knows the mean only.
        sums = not getattr(self.optimizer, "gradient_average", True)
        itemsize = max(p.itemsize for p in engine.module.parameters())
        self.aggregation = ShardedAggregation(
            state,
            wire,
            self,
            scale=wire.size if sums else 1,
            scratch=2 * self.optimizer.reduce_bucket_size * itemsize,
        )
        self.ready = self.optimizer.reduce_ready_partitions_and_remove_grads
        self.epilogue = self.optimizer.independent_gradient_partition_epilogue
        self.optimizer.independent_gradient_partition_epilogue = self.complete
        self.holds = state.scope == "global"
        if self.holds:
            self.optimizer.reduce_ready_partitions_and_remove_grads = lambda *_: None

    def complete(self) -> None:
        """What DeepSpeed calls at the end of a backward pass (stage 1: of a step's last one)."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        if not self.holds:
            self.epilogue()
            self.meet([])
            if boundary:
                self.finish()
        elif boundary:
            with torch.no_grad():
                self.release()
            self.epilogue()

    def release(self) -> None:
        """Aggregate the gradients that were held back, and hand them to DeepSpeed's buckets."""
        held = self.held()
        present = [self.gradient(p) is not None for _, p in held]
        if not self.same(present):
            every = zip(*self.wire.gather_objects(present), strict=True)
            for j, ranks in enumerate(every):
                if any(ranks) and not all(ranks):
                    self.complement(held[j][1])
                    present[j] = True
        held = [one for one, there in zip(held, present, strict=True) if there]
        for dtype in dict.fromkeys(self.gradient(p).dtype for _, p in held):
            some = [(i, p) for i, p in held if self.gradient(p).dtype == dtype]
            self.push(self.owned((i, p, _flat(self.gradient(p))) for i, p in some))
        self.finish()
        for i, p in held:
            self.replay(i, p)

    def finish(self) -> None:
        if not self.aggregation.pending:
            raise RuntimeError(
                f"grain_ddp: DeepSpeed {deepspeed.__version__} ended a step and no gradient was "
                "reduced (some versions do, on a CPU, with zero_optimization.contiguous_gradients "
                "false). Set it to true, or see whether the loss reaches a parameter."
            )
        self.aggregation.finish()

    def same(self, value: Any) -> bool:
        """Whether it is the same on every rank."""
        return self.wire.same(repr(value), torch.device(self.engine.device))

    def meet(self, parameters: Sequence[Any]) -> None:
        """See that every rank has come to a bucket of these parameters, or to the pass's end.

        A rank whose loss does not reach a parameter fills other buckets.
        """
        names = [self.names[id(p)] for p in parameters]
        if self.same(names):
            return
        every = self.wire.gather_objects(names)
        first = next(row for row in zip_longest(*every) if len(set(row)) > 1)
        found = ", ".join(f"rank {j}: {name or 'none'}" for j, name in enumerate(first))
        raise ValueError(
            "grain_ddp: expected gradients of the same parameters, in the same order, on every "
            f"rank, but the next one is {found} (this is rank {self.wire.rank}). Let every rank's "
            'loss reach the same parameters, or, at stages 1 and 2, set grain.scope to "global", '
            "which counts what is missing as zero."
        )

    def push(self, owned: list[list[Tensor]]) -> None:
        """Aggregate, now or with all of the step, what belongs to each rank, in place."""
        self.state.step = self.engine.global_steps
        with torch.no_grad():
            self.aggregation.push(owned)

    def held(self) -> list[tuple[int, Any]]:
        """All trained parameters, with the number of their group."""
        raise NotImplementedError

    def gradient(self, parameter: Any) -> Any:
        """The parameter's local gradient, accumulated over the step so far, or None."""
        raise NotImplementedError

    def complement(self, parameter: Any) -> None:
        """Called on every rank for a parameter that has a gradient on some only."""
        raise NotImplementedError

    def owned(self, gradients: Iterable[tuple[int, Any, Tensor]]) -> list[list[Tensor]]:
        """Of flat gradients (group, parameter, gradient): what belongs to each rank."""
        raise NotImplementedError

    def replay(self, group: int, parameter: Any) -> None:
        """Do for a parameter what DeepSpeed's hook would have done."""
        raise NotImplementedError


class _Stage12(_Sharded):
    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        super().__init__(engine, state, wire)
        # DeepSpeed's simplest reduction, the one that is replaced: a whole bucket, of which only
        # this rank's part is used.
        self.optimizer.reduce_scatter = False
        self.optimizer.gradient_reduction_w_predivide = self.reduce
        self.optimizer.allreduce_bucket = self.reduce_list

    def reduce(self, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        """Aggregate this rank's part of a flat bucket. (With `contiguous_gradients`.)"""
        bucket = self.optimizer.ipg_buckets[communication_data_type]
        return self._reduce(tensor, bucket.params)

    def reduce_list(
        self, bucket: list[Tensor], communication_data_type: torch.dtype, **_: Any
    ) -> Tensor:
        """The same for a list of gradients. (Without `contiguous_gradients`.)"""
        filled = self.optimizer.ipg_buckets[communication_data_type]
        params = {id(g): entry for g, entry in zip(filled.grads, filled.params, strict=True)}
        return self._reduce(self.optimizer.flatten(bucket), [params[id(g)] for g in bucket])

    def _reduce(self, flat: Tensor, params: list[tuple[int, int, int]]) -> Tensor:
        if not self.holds and flat.numel():
            every = [(i, self.optimizer.bit16_groups[i][index]) for i, index, _ in params]
            self.meet([p for _, p in every])
            parts = flat.split_with_sizes([p.numel() for _, p in every])
            self.push(self.owned((i, p, g) for (i, p), g in zip(every, parts, strict=True)))
        return flat

    def held(self) -> list[tuple[int, Any]]:
        groups = enumerate(self.optimizer.bit16_groups)
        return [(i, p) for i, group in groups for p in group if p.requires_grad and p.numel()]

    def gradient(self, parameter: Any) -> Any:
        return self.optimizer.get_gradient_for_reduction(parameter)

    def complement(self, parameter: Any) -> None:
        if self.gradient(parameter) is None:
            parameter.grad = torch.zeros_like(parameter)
            if self.optimizer.use_grad_accum_attribute:
                self.optimizer.fill_grad_accum_attribute()

    def owned(self, gradients: Iterable[tuple[int, Any, Tensor]]) -> list[list[Tensor]]:
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
        self.ready(parameter, group)


class _Stage3(_Sharded):
    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        super().__init__(engine, state, wire)
        self.optimizer.reduce_scatter = True  # for DeepSpeed to take the one that is replaced
        setattr(self.optimizer, _SCATTER, self.scatter)

    def scatter(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """Aggregate a bucket of parameters: this rank's shard of each one's gradient."""
        if not self.holds:
            self.meet(params_to_reduce)
        flats = [_flat(p.grad) for p in params_to_reduce]
        owned = self.owned((0, p, g) for p, g in zip(params_to_reduce, flats, strict=True))
        if not self.holds:
            self.push(owned)
        return owned[self.wire.rank]

    def held(self) -> list[tuple[int, Any]]:
        groups = self.optimizer.fp16_groups
        return [(0, p) for group in groups for p in group if p.requires_grad]

    def gradient(self, parameter: Any) -> Any:
        return parameter.grad

    def complement(self, parameter: Any) -> None:
        raise ValueError(
            f"grain_ddp: expected a gradient of {self.names[id(parameter)]} on every rank or on "
            f"none, but some have one (this is rank {self.wire.rank}, where it is "
            f"{'there' if parameter.grad is not None else 'missing'}). At stage 3 every rank's "
            "loss has to reach the same parameters."
        )

    def owned(self, gradients: Iterable[tuple[int, Any, Tensor]]) -> list[list[Tensor]]:
        owned: list[list[Tensor]] = [[] for _ in range(self.wire.size)]
        for _, _, gradient in gradients:
            width = -(-len(gradient) // self.wire.size)
            for rank, views in enumerate(owned):
                views.append(gradient[rank * width : (rank + 1) * width])
        return owned

    def replay(self, group: int, parameter: Any) -> None:
        self.ready(parameter)


def _flat(gradient: Tensor) -> Tensor:
    """The gradient as one row, in its own memory; it is made contiguous if it is not."""
    if not gradient.is_contiguous():
        gradient.data = gradient.contiguous()
    return gradient.detach().view(-1)


# Switching it on


def install() -> None:
    """Make every DeepSpeed engine look at the "grain" section of its config. Once is enough."""
    original = DeepSpeedEngine.__init__
    if hasattr(original, "grain_ddp"):
        return

    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        config = signature.bind(self, *args, **kwargs).arguments.get("config_class")
        if config is not None:
            _check_config(config._param_dict)  # before DeepSpeed starts on what would be refused
        original(self, *args, **kwargs)
        attach(self)

    initialise.grain_ddp = True  # type: ignore[attr-defined]
    DeepSpeedEngine.__init__ = initialise


def main() -> None:
    """Run a script, whose path and arguments are the command's, with DeepSpeed prepared."""
    arguments = sys.argv[1:]
    # The deepspeed launcher puts its own argument first.
    added = arguments[:1] if arguments and arguments[0].startswith("--local_rank") else []
    script, *rest = arguments[len(added) :] or [""]
    if not script:
        sys.exit("usage: python -m grain_ddp.deepspeed SCRIPT [ARGUMENT ...]")
    sys.argv = [script, *added, *rest]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    # Under its own name, so that a script that imports this module too gets the same one.
    importlib.import_module("grain_ddp.deepspeed").main()
else:
    install()
