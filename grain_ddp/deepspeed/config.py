"""The "grain" section of DeepSpeed's config: what it may say, and what cannot be honoured."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

import torch
import torch.distributed as dist

from grain_ddp._core.options import short
from grain_ddp._core.state import GrainState
from grain_ddp._math.record import StepRecord
from grain_ddp._wire.torch_wire import TorchWire, default_group
from grain_ddp.sinks import jsonl

_OPTIONS = set(inspect.signature(GrainState).parameters) - {"process_group", "on_step"} | {"log"}

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


def section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options in the config's "grain" section; None if there is none, or it is not enabled.

    Raises:
        ValueError: a name or a value that is none, or a combination that cannot be honoured, by
            the name of its key.
    """
    for key in config:
        if key != "grain" and _resembles(str(key)):
            raise ValueError(
                f'grain_ddp: expected "grain" or nothing like it, but the config has {key!r}, '
                'which nothing reads. Call it "grain", or take it out.'
            )
    if "grain" not in config:
        return None
    section = config["grain"]
    if not isinstance(section, Mapping):
        raise ValueError(
            f'grain_ddp: grain must be a section such as {{"enabled": true}}, not {short(section)}.'
        )
    options = dict(section)
    enabled = options.pop("enabled", None)
    if not isinstance(enabled, bool):
        raise ValueError(
            f"grain_ddp: grain.enabled must be true or false, but it is {short(enabled)}."
        )
    if not enabled:
        return None
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(
                f"grain_ddp: grain.{name} is not an option. There are: enabled, "
                f"{', '.join(sorted(_OPTIONS))}."
            )
    try:
        GrainState(**{name: value for name, value in options.items() if name != "log"})
    except ValueError as error:
        raise ValueError(str(error).replace("grain_ddp: ", "grain_ddp: grain.", 1)) from None
    _refuse((key, why) for key, bad, why in _REFUSED if _has(config, key, bad))
    return options


def _resembles(key: str) -> bool:
    """Whether the key looks like "grain" in other letters, with more of a name, or mistyped."""
    letters = re.sub("[^a-z]", "", key.lower())
    mistyped = SequenceMatcher(None, letters, "grain").ratio() > 0.8  # a letter too many or too few
    return letters.startswith("grain") or sorted(letters) == sorted("grain") or mistyped


def _has(config: Any, key: str, bad: Callable[[Any], bool]) -> bool:
    for name in key.split("."):
        if not isinstance(config, Mapping) or config.get(name) is None:
            return False
        config = config[name]
    return bad(config)


def _refuse(refused: Iterable[tuple[str, str]]) -> None:
    for key, why in refused:
        raise ValueError(
            f'grain_ddp: "grain" cannot be honoured together with {key}: {why}. '
            f"Change {key}, or disable grain."
        )


def check_engine(engine: Any) -> None:
    """ValueError unless the engine is one that can be honoured: what its config does not tell."""
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
    if "muon" in type(basic_optimizer(engine)).__name__.lower():
        refused.append(("optimizer (Muon)", "it needs whole matrices, not parts"))
    for name, module in engine.module.named_modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.sparse:
            refused.append(
                (f"sparse=True of {name or 'the model'}", "a sparse gradient has no Gramian")
            )
    for name, p in engine.module.named_parameters():
        if p.is_complex():
            refused.append((f"the complex {name}", "DeepSpeed counts the real part of it only"))
    known = {id(p) for p in engine.module.parameters()}
    if not engine.zero_optimization_stage() and any(id(p) not in known for p in _trained(engine)):
        refused.append(
            (
                "parameters of the optimizer that are not in the model",
                "at stage 0 DeepSpeed reduces the gradients of the model only",
            )
        )
    expected = _ranks(engine.seq_data_parallel_group)
    for p in engine.module.parameters():
        own = getattr(p, "ds_process_group", None)
        if own is not None and _ranks(own) != expected:
            refused.append(("deepspeed.zero.Init", "a parameter has a process group of its own"))
    _refuse(refused)


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group or default_group())


def basic_optimizer(engine: Any) -> Any:
    """The optimizer that DeepSpeed wraps, or None if it was given none."""
    return getattr(engine, "basic_optimizer", None)


def _trained(engine: Any) -> list[Any]:
    """What an optimizer of stage 0 steps on, or makes its copies of."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp16_groups"):
        return [p for group in optimizer.fp16_groups for p in group]
    if optimizer is basic_optimizer(engine) and optimizer is not None:
        return [p for group in optimizer.param_groups for p in group["params"]]
    return []


def check_microbatches(options: Mapping[str, Any], stage: int, passes: int) -> None:
    """ValueError for micro-batches that the stage, with so many passes for a step, cannot weigh."""
    microbatches = options.get("microbatches", 1)
    if microbatches > 1 and (stage or microbatches != passes):
        raise ValueError(
            "grain_ddp: grain.microbatches must be 1, or at stage 0 gradient_accumulation_steps, "
            f"which is {passes}, but it is {microbatches} at stage {stage}. Elsewhere "
            "DeepSpeed adds micro-batches up before they can be weighed."
        )


def sink(path: Any, wire: TorchWire) -> Callable[[StepRecord], None] | None:
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
        problem = f"must be null or the path of a file, but it is {short(path)}"
    problem = next(filter(None, wire.gather_objects(problem, "the comparison of logs")), "")
    if problem:
        raise ValueError(f"grain_ddp: grain.log {problem}.")
    return sink
