"""DeepSpeed: import this before `deepspeed.initialize`, and the "grain" section of the config acts.

    { "zero_optimization": {"stage": 2}, "grain": {"enabled": true} }

Whoever calls `initialize`: the engine then aggregates with GRAIN, and ``engine.grain`` is its
`GrainState`. Without the section, or with ``"enabled": false``, DeepSpeed is left alone. For a
script that nobody wants to edit: ``python -m grain_ddp.deepspeed train.py ...``.

DeepSpeed's timeline, and what stands in each place (`seams` knows the names, `stages` what is
done). A pass is one backward pass, a step as many as `gradient_accumulation_steps`:

===== ====== ========================================= ============================================
stage scope  DeepSpeed calls                           which is
===== ====== ========================================= ============================================
0     any    `_reduce_non_expert_gradients`, at the    `Replicated.reduce`: aggregates all of them
             end of a step's last pass, with all       in place (with micro-batches as groups, at
             gradients (also its BF16_Optimizer)       the end of every pass: `after_a_pass`)
1, 2  bucket `reduce_ready_partitions_...`, for each   DeepSpeed's own: fills a bucket
             gradient (1: at the end of the last
             pass; 2: in each pass, when it is there)
\\           `gradient_reduction_w_predivide` or       `Stage12.reduce`, `reduce_list`: aggregate
             `allreduce_bucket`, with a full bucket    it now; DeepSpeed takes this rank's part
\\           `independent_gradient_partition_epilogue` `Sharded.end_of_pass`: DeepSpeed's own, which
             (1: after the last pass; 2: each)         reduces what is left; ends the step
3     bucket the same as stage 2, but for the bucket:  `Stage3.scatter`: aggregates it now, returns
             `__avg_scatter_grads`                     this rank's shards
1, 2, global `reduce_ready_partitions_...`, for each   nothing: gradients add up in the parameters
3            gradient, when it is there
\\           `independent_gradient_partition_epilogue` `Sharded.end_of_pass`: after the last pass,
                                                       aggregates all that is held, in place; then
                                                       DeepSpeed's own `reduce_ready_...` for each,
                                                       and its own epilogue
\\           the reduction of a full bucket            nothing to aggregate any more: this rank's
                                                       part is there already
===== ====== ========================================= ============================================
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from grain_ddp._core.state import GrainState
from grain_ddp._wire.torch_wire import TorchWire, default_group
from grain_ddp.deepspeed.config import (
    DTYPES,
    basic_optimizer,
    check_engine,
    check_groups,
    section,
    sink,
)
from grain_ddp.deepspeed.seams import (
    DeepSpeedEngine,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    check_version,
    logger,
    print_dist,
)
from grain_ddp.deepspeed.stages import Replicated, Stage3, Stage12


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
            section(config._param_dict)  # before DeepSpeed starts on what would be refused
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
    check_groups(options, stage, engine.gradient_accumulation_steps())
    wire = TorchWire(engine.seq_data_parallel_group or default_group())
    options.setdefault("scope", "bucket" if stage >= 2 else "global")
    if options.get("wire_dtype") is None and engine.communication_data_type in DTYPES.values():
        options["wire_dtype"] = engine.communication_data_type
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
