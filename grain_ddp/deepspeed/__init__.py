"""DeepSpeed: import this before `deepspeed.initialize`, and the "grain" section of the config acts.

    { "zero_optimization": {"stage": 2}, "grain": {"enabled": true} }

Whoever calls `initialize`: the engine then aggregates with GRAIN, and ``engine.grain`` is its
`GrainState`. Without the section, or with ``"enabled": false``, DeepSpeed is left alone. For a
script that nobody wants to edit: ``python -m grain_ddp.deepspeed train.py ...``.

DeepSpeed's timeline of a step of several passes, forward and backward, and what is called there
instead of its own (the names, and the version that has them, are in `seams`):

stage  scope   when                         DeepSpeed calls         which does
0      any     last pass ends (a)           _reduce_non_expert_...  aggregate all, in place
1      bucket  last pass ends: a gradient   reduce_ready_...        its own: fills a bucket
               a bucket is full             gradient_reduction_...  aggregate it, in place (b)
               all are in buckets           ..._epilogue            its own, then the step's end
2, 3   bucket  as 1, but in every pass, when a gradient is there; 3 has its buckets reduced by
               __avg_scatter_grads, which returns this rank's shards
1-3    global  a gradient is there          reduce_ready_...        nothing: it adds up in .grad
               last pass ends               ..._epilogue            aggregate all that is held, in
                                                                    place; its own reduce_ready_...
                                                                    for each; its own
               a bucket is full             as above                nothing: it is aggregated

(a) With micro-batches as groups: every pass. Also DeepSpeed's BF16_Optimizer, which is "stage 1".
(b) Or allreduce_bucket, without contiguous_gradients. DeepSpeed then takes this rank's part.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from grain_ddp._core.options import DTYPES
from grain_ddp._core.state import GrainState
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp.deepspeed.config import (
    basic_optimizer,
    check_engine,
    check_microbatches,
    section,
    sink,
)
from grain_ddp.deepspeed.replicated import Replicated
from grain_ddp.deepspeed.seams import (
    DeepSpeedEngine,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    check_version,
    honour_timeout,
    logger,
    print_dist,
    process_group,
)
from grain_ddp.deepspeed.sharded import Stage3, Stage12


def install() -> None:
    """Make every DeepSpeed engine look at the "grain" section of its config. Once is enough."""
    original = DeepSpeedEngine.__init__
    if hasattr(original, "grain_ddp"):
        return

    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        config = given.get("config_class")
        # Before DeepSpeed starts on what would be refused, and before its first collective.
        enabled = config is not None and section(config._param_dict) is not None
        if enabled and given.get("mpu") is None and given.get("mesh_device") is None:
            honour_timeout()
        original(self, *args, **kwargs)
        attach(self)

    initialise.grain_ddp = True  # type: ignore[attr-defined]
    DeepSpeedEngine.__init__ = initialise


def attach(engine: Any) -> None:
    """Let the engine aggregate as the "grain" section of its config says; without one, nothing.

    Raises:
        ValueError: an option or a combination that cannot be honoured, by the name of its key.
        RuntimeError: a DeepSpeed that is not supported.
    """
    engine.grain = None
    options = section(engine._config._param_dict)
    if options is None:
        return
    check_version()
    check_engine(engine)
    stage = int(engine.zero_optimization_stage())
    if stage and basic_optimizer(engine) is None:
        return  # for inference
    check_microbatches(options, stage, engine.gradient_accumulation_steps())
    wire = TorchWire(process_group(engine))
    options.setdefault("scope", "bucket" if stage >= 2 else "global")
    narrow = engine.communication_data_type
    widest = max(p.itemsize for p in engine.module.parameters())
    # With a sketch the gradients travel as they are: a narrower dtype for them is refused then.
    wanted = narrow in DTYPES.values() and (not options.get("sketch") or narrow.itemsize < widest)
    if options.get("wire_dtype") is None and wanted:
        options["wire_dtype"] = narrow
    on_step = sink(options.pop("log", None), wire)
    state = GrainState(**options, on_step=on_step)
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        Stage3(engine, state, wire)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        Stage12(engine, state, wire)
    elif stage <= 1:  # also DeepSpeed's BF16_Optimizer, whose stage is 1
        Replicated(engine, state, wire)
    else:
        raise ValueError(
            f"grain_ddp: zero_optimization.stage {stage} with {type(optimizer).__name__} is not "
            "supported. Use one of DeepSpeed's own ZeRO optimizers, or disable grain."
        )
    engine.grain = state
    if wire.rank == 0:
        _announce(engine, state, wire, stage)


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


install()
