"""DeepSpeed with the "grain" section, at every stage, against a single-process reference."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from harness import launch, run
from ranks import batch, flat, gather, loss, network, relative_error, same_everywhere

pytest.importorskip("deepspeed")

import deepspeed
from deepspeed.accelerator import get_accelerator
from engines import (
    MOMENTUM,
    RATE,
    RIGHT,
    STAGES,
    config,
    engine_for,
    masters,
    mean,
    min_norm,
    parameters,
    reference,
    train,
)

import grain_ddp.deepspeed
from grain_ddp.deepspeed import seams
from grain_ddp.sinks._schema import FIELDS


def errors(cases: list[tuple[dict[str, Any], int, bool]], steps: int = 4) -> list[float]:
    """For each (config, passes, weights for each pass): the error after some steps."""
    found = []
    for settings, passes, each_pass in cases:
        settings = {**settings, "gradient_accumulation_steps": passes}
        engine = engine_for(settings)
        train(engine, steps)
        result = parameters(engine)
        assert same_everywhere(result)
        assert engine.grain.step == steps
        assert same_everywhere(torch.from_numpy(np.atleast_2d(engine.grain.last.weights)))
        clip = settings.get("gradient_clipping", 0.0)
        found.append(relative_error(result, reference(steps, passes, min_norm, each_pass, clip)))
        engine.destroy()
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
def test_parameters_equal_the_reference(n: int) -> None:
    cases = [
        (config(stage, {"scope": scope}), passes, scope == "bucket" and stage >= 2)
        for stage in STAGES
        for scope in ("global", "bucket")
        for passes in (1, 2)
    ]
    for ranks in run(n, errors, cases, deadline=240):
        assert max(ranks) < 1e-5, ranks


def two_and_one(rows: torch.Tensor) -> torch.Tensor:
    return min_norm(torch.stack([rows[:2].mean(0), rows[2]]))


def sketched_and_grouped() -> list[float]:
    """At every stage, in both scopes; the sketch has room for every number."""
    found = []
    for stage in STAGES:
        for options, rule in (
            ({"sketch": 4000}, min_norm),
            ({"groups": 2}, two_and_one),
            ({"groups": 2, "sketch": 4000, "scope": "bucket"}, two_and_one),
        ):
            engine = engine_for(config(stage, options))
            train(engine, 2)
            result = parameters(engine)
            assert same_everywhere(result)
            found.append(relative_error(result, reference(2, 1, rule, True)))
            engine.destroy()
    engine = engine_for(config(2, {"sketch": 4000}, bf16={"enabled": True}))
    assert engine.grain.wire_dtype is None  # as wide as the gradients: they travel as they are
    engine.destroy()
    with pytest.raises(ValueError, match="sketch does not go with wire_dtype"):
        engine_for(config(2, {"sketch": 4000}, communication_data_type="bf16"))
    return found


def test_sketches_and_groups() -> None:
    for ranks in run(3, sketched_and_grouped, deadline=240):
        assert max(ranks) < 1e-5, ranks


def groups_of_other_sizes(scope: str) -> list[float]:
    """At stage 0: passes as groups, and groups of two ranks; the errors after some steps."""
    found, n = [], torch.distributed.get_world_size()
    for more, passes in (({"microbatches": 2}, 2), ({"groups": n}, 1), ({"groups": 1}, 1)):
        if n == 1 and passes == 1:
            continue  # nothing is aggregated
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        engine = engine_for(config(0, {"scope": scope, **more}, gradient_accumulation_steps=passes))
        train(engine, 4)
        for step in range(4):
            rows = []
            for k in range(passes):
                model.zero_grad()
                loss(model, step * passes + k).backward()
                rows.append(torch.stack(gather(flat(p.grad for p in model.parameters()).double())))
            every = torch.stack(rows, 1).flatten(0, 1)
            if more.get("groups", 1) > 1:
                every = every.view(-1, n, every.shape[1]).mean(1)
            sizes = [p.numel() for p in model.parameters()]
            for p, part in zip(model.parameters(), min_norm(every).split(sizes), strict=True):
                p.grad = part.view_as(p).float()
            optimizer.step()
        assert engine.grain.step == 4
        assert engine.grain.last.weights.shape[-1] == len(every)
        result = parameters(engine)
        assert same_everywhere(result)
        found.append(relative_error(result, flat(model.parameters())))
        engine.destroy()
    return found


@pytest.mark.parametrize("n", [1, 2])
def test_passes_and_several_ranks_as_groups(n: int) -> None:
    for ranks in run(n, groups_of_other_sizes, "global"):
        assert max(ranks) < 1e-5, ranks


def groups_that_are_refused() -> list[str]:
    found = []
    for stage, more in ((2, {"microbatches": 2}), (0, {"microbatches": 3})):
        try:
            engine_for(config(stage, more, gradient_accumulation_steps=2))
        except ValueError as error:
            found.append(str(error))
    return found


def test_groups_that_a_stage_cannot_form() -> None:
    for found in run(2, groups_that_are_refused):
        assert "grain.microbatches must be 1" in found[0]
        assert "at stage 2" in found[0]
        assert "gradient_accumulation_steps, which is 2, but it is 3 at stage 0" in found[1]


class Checkpointed(torch.nn.Module):
    """The usual network in two segments, whose activations are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net[0](x)
        for segment in (self.net[1:3], self.net[3:]):
            x = torch.utils.checkpoint.checkpoint(segment, x, use_reentrant=True)
        return x


def other_ways(stage: int, scope: str) -> tuple[float, float, float, float]:
    """Errors with recomputed activations, with tensor.backward() and with passes that DeepSpeed
    coalesces; and how far the mean is."""
    engine = engine_for(config(stage, {"scope": scope}), Checkpointed())
    train(engine, 3)
    again = relative_error(parameters(engine), reference(3, 1, min_norm, False))
    engine = engine_for(config(stage, {"scope": scope}))
    for step in range(3):
        loss(engine, step).backward()
        engine.step()
    direct = relative_error(parameters(engine), reference(3, 1, min_norm, False))
    engine = engine_for(config(stage, {"scope": scope}))
    for step in range(3):
        with engine.coalesce_grad_reduction():
            for k in range(2):
                engine.backward(loss(engine, 2 * step + k) / 2)
        engine.step()
    assert engine.grain.step == 3
    expected = reference(3, 2, min_norm, False)
    coalesced = relative_error(parameters(engine), expected)
    return again, direct, coalesced, relative_error(expected, reference(3, 2, mean, False))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_other_ways_of_the_backward_pass(stage: int) -> None:
    for scope in ("global", "bucket"):
        for *found, distance in run(2, other_ways, stage, scope):
            assert max(found) < 1e-5
            assert distance > 1e-2  # else nothing here would tell the min-norm point from the mean


ZERO_SETTINGS = [
    {"overlap_comm": True, "contiguous_gradients": True},
    {"overlap_comm": True, "contiguous_gradients": False},
    {"overlap_comm": False, "contiguous_gradients": False},
    {"overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": False},
    {"overlap_comm": True, "contiguous_gradients": False, "reduce_scatter": False},
    {"overlap_comm": True, "contiguous_gradients": True, "round_robin_gradients": True},
    {"use_multi_rank_bucket_allreduce": False},
    {"offload_optimizer": {"device": "cpu"}},
]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_settings_of_zero(stage: int) -> None:
    settings = [zero for zero in ZERO_SETTINGS if RIGHT or zero.get("contiguous_gradients", True)]
    if stage == 3:
        settings += [
            {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
            {"sub_group_size": 500, "stage3_param_persistence_threshold": 0},
        ]
    cases = [
        (
            config(stage, {"scope": scope}, zero=zero, gradient_clipping=0.05),
            passes,
            scope == "bucket" and stage >= 2,
        )
        for zero in settings
        for scope, passes in (("global", 2), ("bucket", 1), ("bucket", 2))
    ]
    for ranks in run(2, errors, cases, deadline=300):
        assert max(ranks) < 1e-5, list(zip(cases, ranks, strict=True))


def against_plain(cases: list[dict[str, Any]], steps: int = 3) -> list[float]:
    """The error of weighting="mean" against plain DeepSpeed."""
    found = []
    for settings in cases:
        results = []
        for grain in ({**settings["grain"], "weighting": "mean"}, {"enabled": False}):
            half = settings.get("bf16", settings.get("fp16", {})).get("enabled", False)
            engine = engine_for({**settings, "grain": grain})
            dtype = next(engine.module.parameters()).dtype if half else torch.float32
            train(engine, steps, dtype=dtype)
            results.append(parameters(engine))
            assert same_everywhere(results[-1])
            assert (engine.grain is None) == (not grain["enabled"])
            engine.destroy()
        found.append(relative_error(*results))
    return found


def test_mean_is_plain_deepspeed() -> None:
    cases = [
        config(
            stage,
            {"scope": scope},
            zero={"reduce_bucket_size": bucket},
            gradient_accumulation_steps=2,
            **more,
        )
        for stage in STAGES
        for scope in ("global", "bucket")
        for bucket in (1_000_000, 600)
        for more in ({}, {"bf16": {"enabled": True}})
    ]
    for ranks in run(3, against_plain, cases, deadline=300):
        for case, error in zip(cases, ranks, strict=True):
            assert error < (4e-3 if "bf16" in case else 1e-6), case


REDUCTIONS = [
    {"gradient_allreduce_op": "sum"},
    {"gradient_allreduce_op": "sum", "zero": {"contiguous_gradients": False}},
    {"prescale_gradients": True, "zero": {"reduce_scatter": False}},
    {"gradient_predivide_factor": 2.0, "zero": {"reduce_scatter": False}},
    {"communication_data_type": "bf16"},
    {"communication_data_type": "fp32", "bf16": {"enabled": True}},
    {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
]


def test_settings_of_the_reduction() -> None:
    cases = [
        config(stage, {}, gradient_accumulation_steps=2, **copy.deepcopy(more))
        for stage in STAGES
        for more in REDUCTIONS
        if RIGHT or more.get("zero", {}).get("contiguous_gradients", True)
        if stage != 0 or "data_types" not in more  # DeepSpeed has no such optimizer
        if stage != 3 or "gradient_allreduce_op" not in more  # and refuses this itself
    ]
    for ranks in run(3, against_plain, cases, deadline=300):
        for case, error in zip(cases, ranks, strict=True):
            exact = "bf16" not in case and "communication_data_type" not in case
            assert error < (1e-6 if exact else 4e-3), case


def half(stage: int, scope: str, passes: int, spoil: bool, dtype: torch.dtype) -> Any:
    """bf16 or fp16: the error of the first step's change; of a spoilt step, whether all is well."""
    if dtype == torch.float16:
        # PyTorch has fp16 on every CPU. DeepSpeed takes it only on those that are fast with it.
        get_accelerator().is_fp16_supported = lambda: True
        section = {"fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}}
    else:
        section = {"bf16": {"enabled": True, "check_grad_overflow": True}}
    settings = config(stage, {"scope": scope}, gradient_accumulation_steps=passes, **section)
    engine = engine_for(settings, network(dtype))
    before, rows = half_masters(engine, stage).clone(), []
    for k in range(passes):
        twin = network(dtype)
        (loss(twin, k, dtype) * 1024).backward()
        own = flat(p.grad for p in twin.parameters()).double() / 1024
        rows.append(torch.stack(gather(own / passes)))
        value = loss(engine, k, dtype)
        if spoil and k == 0 and torch.distributed.get_rank() == 1:
            value = value * float("inf")
        if stage == 0:
            value = value * 1024  # DeepSpeed forgets it there, and divides by it all the same
        engine.backward(value)
        engine.step()
    after = half_masters(engine, stage).clone()
    assert same_everywhere(after)
    scale = engine.optimizer.loss_scale if dtype == torch.float16 else 1024
    assert scale == (512 if spoil and dtype == torch.float16 else 1024)
    expected = sum(map(min_norm, rows)) if stage >= 2 and scope == "bucket" else min_norm(sum(rows))
    if not spoil:
        engine.destroy()
        return relative_error(before.double() - after.double(), RATE * expected)
    skipped = torch.equal(before, after) and engine.skipped_steps == 1
    train(engine, 1, first=1, dtype=dtype)
    final = half_masters(engine, stage)
    assert same_everywhere(final)
    engine.destroy()
    return skipped and not torch.equal(final, after) and bool(final.isfinite().all())


def half_masters(engine: Any, stage: int) -> torch.Tensor:
    if stage == 0:
        return flat(p for group in engine.optimizer.fp32_groups for p in group)
    return masters(engine)


HALVES = [(dtype, stage) for dtype in (torch.bfloat16, torch.float16) for stage in STAGES]
HALVES.remove((torch.bfloat16, 0))  # without master weights


@pytest.mark.parametrize(("dtype", "stage"), HALVES, ids=str)
def test_half_precision_to_its_rounding(dtype: torch.dtype, stage: int) -> None:
    bound = 0.01 if dtype == torch.bfloat16 else 0.002
    assert max(run(3, each_half, stage, False, dtype)) < bound


@pytest.mark.parametrize(("dtype", "stage"), HALVES, ids=str)
def test_a_step_that_overflows_on_one_rank_is_skipped_by_all(
    dtype: torch.dtype, stage: int
) -> None:
    assert all(run(2, each_half, stage, True, dtype))


def each_half(stage: int, spoil: bool, dtype: torch.dtype) -> Any:
    found = [half(stage, s, k, spoil, dtype) for s in ("global", "bucket") for k in (1, 2)]
    return all(found) if spoil else max(found)


def many_buckets(stage: int, slack: int) -> tuple[int, float, float]:
    """(buckets, gap, ⟨d, g_i⟩ relative to its bound) where buckets belong to few ranks."""
    grain_ddp._core.sharded.SLACK = slack
    settings = config(stage, {"scope": "bucket"}, zero={"reduce_bucket_size": 600})
    engine = engine_for(settings)
    before, twin = parameters(engine), network()
    loss(twin, 0).backward()
    rows = torch.stack(gather(flat(p.grad for p in twin.parameters()).double()))
    train(engine, 1)
    step = (before - parameters(engine)).double() / RATE
    record = engine.grain.last
    assert same_everywhere(parameters(engine))
    products = rows @ step / (step.norm() * rows.norm(dim=1).max())
    scale = float(np.abs(record.gramian).max())
    return len(record.weights), float(record.gap.max()) / scale, float(products.min())


@pytest.mark.parametrize("stage", STAGES[1:])
def test_many_buckets(stage: int) -> None:
    for slack in (0, 4096):
        for count, gap, product in run(3, many_buckets, stage, slack):
            assert count > 1
            assert gap < 1e-9
            assert product > -1e-5


def saved_and_resumed(stage: int, folder: str) -> float:
    settings = config(stage, {"warmup_steps": 3})
    straight = engine_for(settings)
    train(straight, 6)
    first = engine_for(settings)
    train(first, 2)
    first.save_checkpoint(folder)
    second = engine_for(settings)
    with torch.no_grad():
        for p in second.module.parameters():
            p += 1
    second.load_checkpoint(folder)
    train(second, 4, first=2)
    assert second.grain.step == 6
    assert second.grain.last.step == 5
    return relative_error(parameters(second), parameters(straight))


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_gives_the_same_trajectory(stage: int, tmp_path: Path) -> None:
    assert max(run(2, saved_and_resumed, stage, str(tmp_path))) == 0


def saved_by_some(folder: str, again: bool) -> Any:
    """At stage 0, and at 2, whose parts DeepSpeed itself fits to another number of ranks or not."""
    found: list[Any] = []
    for stage in (0, 2):
        engine = engine_for(config(stage, {}))
        path = f"{folder}/{stage}"
        if not again:
            train(engine, 2)
            engine.save_checkpoint(path)
            found.append(parameters(engine))
            continue
        try:
            engine.load_checkpoint(path)
        except Exception as error:
            found.append(str(error))
            continue
        loaded = parameters(engine)
        train(engine, 1, first=2)
        found.append((loaded, engine.grain.step, engine.grain.last.weights.shape))
    return found


def test_another_number_of_ranks_goes_on_or_is_refused(tmp_path: Path) -> None:
    saved = run(2, saved_by_some, str(tmp_path), False)[0]
    for (loaded, steps, shape), refusal in run(3, saved_by_some, str(tmp_path), True):
        assert torch.equal(loaded, saved[0])
        assert (steps, shape) == (3, (3,))
        assert "world size" in refusal


def complaint(start: Callable[[], object], key: str) -> str | None:
    """What is wrong with the error: it does not name the key, or there is none."""
    try:
        start()
    except Exception as error:  # some are DeepSpeed's own, in some of its versions
        ours = "grain_ddp: " in str(error) or type(error).__name__ == "DeepSpeedConfigError"
        if key in str(error) and ours:
            return None
        return repr(error)
    return f"no error: {key}"


def refusals(cases: list[tuple[dict[str, Any], str]]) -> list[str]:
    found = [complaint(lambda s=settings: engine_for(s), key) for settings, key in cases]
    return [wrong for wrong in found if wrong]


def test_errors_at_initialize_name_the_key() -> None:
    grain = [
        ({"scope": "layer"}, "grain.scope"),
        ({"scope": ["global"]}, "grain.scope"),
        ({"cap": 0.5}, "grain.cap"),
        ({"cap": 2, "weighting": "mean"}, "grain.cap"),
        ({"weighting": "median"}, "grain.weighting"),
        ({"wire_dtype": "int8"}, "grain.wire_dtype"),
        ({"wire_dtype": ["bf16"]}, "grain.wire_dtype"),
        ({"warmup_steps": -1}, "grain.warmup_steps"),
        ({"record_every": True}, "grain.record_every"),
        ({"microbatches": 2}, "grain.microbatches"),
        ({"groups": "host"}, "grain.groups"),
        ({"sketch": 0}, "grain.sketch"),
        ({"scoop": "global"}, "grain.scoop"),
        ({"on_step": 1}, "grain.on_step"),
        ({"log": 3}, "grain.log"),
        ({"log": "/dev/null/run.jsonl"}, "grain.log"),
    ]
    cases = [(config(1, options), key) for options, key in grain]
    cases += [(config(1) | {"grain": section}, "grain") for section in (True, "yes", None, [])]
    cases += [(config(1) | {"grain": section}, "grain.enabled") for section in ({}, {"enabled": 1})]
    assert run(2, refusals, cases) == [[], []]


def test_combinations_that_are_refused_by_their_key() -> None:
    offload = {"device": "cpu"}
    zero: list[tuple[int, dict[str, Any], str]] = [
        (3, {"mics_shard_size": 1}, "mics_shard_size"),
        (3, {"zero_quantized_gradients": True}, "zero_quantized_gradients"),
        (3, {"zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
        (2, {"zenflow": {"topk_ratio": 0.1}, "offload_optimizer": offload}, "zenflow"),
        (3, {"offload_optimizer": offload | {"super_offload": True}}, "offload_optimizer.super"),
    ]
    cases = [
        (config(stage, {}, zero=more), f"zero_optimization.{key}") for stage, more, key in zero
    ]
    others: list[tuple[dict[str, Any], str]] = [
        ({"sparse_gradients": True}, "sparse_gradients"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
    ]
    for name in ("OneBitAdam", "ZeroOneAdam", "OneBitLamb", "Muon"):
        others.append(({"optimizer": {"type": name, "params": {"lr": 0.1}}}, "optimizer.type"))
    cases += [(config(0, {}) | more, key) for more, key in others]
    assert run(2, refusals, cases) == [[], []]


class Muon(torch.optim.SGD):
    """Not DeepSpeed's, which compiles at its import; what counts is how an optimizer is called."""


class Topology:
    """An mpu whose two ranks are one group of what `kind` says, and two of all else."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        groups = [torch.distributed.new_group([rank]) for rank in range(2)]
        self.own = groups[torch.distributed.get_rank()]

    def __getattr__(self, name: str) -> Any:
        together = self.kind in name or (self.kind == "model" and "tensor" in name)
        if name.endswith("_world_size"):
            return lambda: 2 if together else 1
        if name.endswith("_rank"):
            return lambda: torch.distributed.get_rank() if together else 0
        if name.endswith("_group"):
            return lambda: torch.distributed.group.WORLD if together else self.own
        raise AttributeError(name)


def refused_model(what: str) -> str | None:
    """A combination that is not in the config."""
    deepspeed.init_distributed("gloo")
    model: torch.nn.Module = network()
    more: dict[str, Any] = {}
    if what == "MoE":
        expert = torch.nn.Linear(8, 8)
        moe = deepspeed.moe.layer.MoE(8, expert, num_experts=2, ep_size=2)
        model = torch.nn.Sequential(torch.nn.Linear(11, 8), moe)
        every = {"params": list(model.parameters()), "name": "all"}
        split = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer
        more["optimizer"] = torch.optim.SGD(split(every), lr=RATE)
    elif what == "pipeline":
        layers = [torch.nn.Linear(11, 8), torch.nn.Linear(8, 3)]
        model = deepspeed.pipe.PipelineModule(layers, num_stages=2)
    elif what == "Muon":
        more["optimizer"] = Muon(model.parameters(), lr=RATE)
    elif what == "model parallelism":
        more["mpu"] = Topology("model")
    elif what == "sequence_parallel_size":
        more["mpu"] = Topology("sequence")
    elif what == "sparse=True":
        model = torch.nn.Embedding(5, 3, sparse=True)
    more.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=RATE))
    settings = config(0 if what in ("pipeline", "sparse=True") else 1, {})
    return complaint(
        lambda: deepspeed.initialize(
            model=model, config=settings, dist_init_required=False, **more
        ),
        what,
    )


NOT_IN_THE_CONFIG = ["MoE", "pipeline", "Muon", "model parallelism", "sequence_parallel_size"]


@pytest.mark.parametrize("what", [*NOT_IN_THE_CONFIG, "sparse=True"])
def test_combinations_that_the_config_does_not_tell(what: str) -> None:
    assert run(2, refused_model, what) == [None, None]


def for_inference() -> list[bool]:
    engines = [deepspeed.initialize(model=network(), config=config(3, {}))[0]]
    engines += [engine_for(config(3)), engine_for(config(3) | {"grain": {"enabled": False}})]
    return [engine.grain is None for engine in engines]


def test_where_there_is_nothing_to_do() -> None:
    assert run(2, for_inference) == [[True] * 3] * 2


def on_two_minds() -> None:
    rank = torch.distributed.get_rank()
    engine_for(config(2, {"weighting": ["min_norm", "mean"][rank]}))


def test_ranks_with_different_options() -> None:
    for outcome in launch(2, on_two_minds):
        assert outcome.error is not None
        assert "weighting must be the same on every rank" in outcome.error


def alone(log: str) -> int:
    engine = engine_for(config(1, {"log": log}))
    train(engine, 2)
    return len(engine.grain.last.weights)


def test_a_world_of_one_and_the_log(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    assert run(1, alone, str(log)) == [1]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["weights"] == [1.0]
    required = {name for name, default in FIELDS.items() if default is dataclasses.MISSING}
    assert set(lines[0]) == {*required, "run"}


def said() -> tuple[list[str], list[str]]:
    """What `initialize` prints, and what it warns of, at DeepSpeed's own log level."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    deepspeed.utils.logger.addHandler(handler)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        engine_for(config(2, {}))
    return [
        [line for line in lines if "grain_ddp: " in line]
        for lines in (printed.getvalue().splitlines(), warned)
    ]


def test_the_number_of_ranks_is_seen_once() -> None:
    (first, warned), (second, _) = run(2, said)
    assert len(first) == 1
    assert "min_norm over 2 ranks, scope bucket, ZeRO stage 2" in first[0]
    assert (second, warned) == ([], [])
    [(first, warned)] = run(1, said)
    assert "min_norm over 1 ranks" in first[0]
    assert len(warned) == 1
    assert "the world has one rank" in warned[0]


class Branches(torch.nn.Module):
    """One more parameter than usual, which only the first rank's gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.extra = network(), torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return y * (self.extra if torch.distributed.get_rank() == 0 else self.extra.detach())


def unused(stage: int, scope: str) -> float:
    """The error of a step where a missing gradient counts as zero."""
    model = Branches()
    before, rows = flat(model.parameters()).double(), []
    loss(model, 0).backward()
    for p in model.parameters():
        rows.append(torch.zeros_like(p) if p.grad is None else p.grad)
    rows = torch.stack(gather(flat(rows).double()))
    settings = config(stage, {"scope": scope}, zero={"reduce_bucket_size": 600})
    engine = engine_for(settings, Branches())
    engine.backward(loss(engine, 0))
    engine.step()
    return relative_error(before - parameters(engine).double(), RATE * min_norm(rows))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_on_some_ranks_only_counts_as_zero(stage: int) -> None:
    for scope in ("global", "bucket") if stage == 0 else ("global",):
        assert max(run(3, unused, stage, scope)) < 1e-5


@pytest.mark.parametrize(
    ("stage", "scope"), [(1, "bucket"), (2, "bucket"), (3, "bucket"), (3, "global")]
)
def test_a_gradient_on_some_ranks_only_is_an_error_on_all(stage: int, scope: str) -> None:
    for outcome in launch(3, unused, stage, scope):
        assert outcome.error is not None
        assert "grain_ddp: expected" in outcome.error
        assert "extra" in outcome.error


def interrupted(stage: int, scope: str, everywhere: bool) -> Any:
    """Parameters, mean and plain, after a backward pass that fails on all ranks or the last."""
    results = []

    def fail(gradient: torch.Tensor) -> None:
        raise ArithmeticError("in the middle")

    for grain in ({"scope": scope, "weighting": "mean"}, None):
        engine = engine_for(config(stage, grain, zero={"reduce_bucket_size": 600}))
        for step in range(3):
            hidden = engine.module[:3](batch(step)[0])
            if step == 1 and (everywhere or torch.distributed.get_rank() == 1):
                hidden.register_hook(fail)
            value = engine.module[3:](hidden).square().mean()
            with contextlib.suppress(ArithmeticError) if everywhere else contextlib.nullcontext():
                engine.backward(value)
                engine.step()
        results.append(parameters(engine))
        assert same_everywhere(results[-1])
    return relative_error(*results)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_pass_that_fails_on_every_rank_leaves_nothing_behind(stage: int) -> None:
    """(At stages 2 and 3 DeepSpeed itself cannot go on.)"""
    for scope in ("global", "bucket"):
        assert max(run(2, interrupted, stage, scope, True)) < 1e-6


@pytest.mark.parametrize(("stage", "scope"), [(0, "global"), (1, "bucket"), (2, "bucket")])
def test_a_pass_that_fails_on_one_rank_ends_all(stage: int, scope: str) -> None:
    first, second = launch(2, interrupted, stage, scope, False, deadline=40, timeout=10)
    assert second.error is not None
    assert "in the middle" in second.error
    assert first.error is not None
    assert first.exitcode == 0  # it did not hang


def two_at_once(stage: int) -> list[float]:
    """Two engines, in turns, one of them evaluated in between; errors of both."""
    engines = [engine_for(config(stage, {"scope": scope})) for scope in ("global", "bucket")]
    for step in range(3):
        for engine in engines:
            train(engine, 1, first=step)
        engines[0].eval()
        with torch.no_grad():
            loss(engines[0], 0)
        engines[0].train()
    engines[0].destroy()
    train(engines[1], 1, first=3)
    assert [engine.grain.step for engine in engines] == [3, 4]
    return [relative_error(parameters(engines[1]), reference(4, 1, min_norm, False))]


@pytest.mark.parametrize("stage", STAGES)
def test_two_engines(stage: int) -> None:
    for found in run(2, two_at_once, stage):
        assert max(found) < 1e-5


def test_another_deepspeed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.18.9")
    with pytest.raises(RuntimeError, match=r"0\.19\.1 or newer"):
        seams.check_version()
    monkeypatch.undo()
    seams.check_version()
    optimizer = seams.DeepSpeedZeroOptimizer
    monkeypatch.setattr(optimizer, "allreduce_bucket", lambda self, tensors: None)
    with pytest.raises(RuntimeError, match="allreduce_bucket"):
        seams.check_version()


def test_a_script_that_nobody_edits(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, deepspeed\n"
        "assert hasattr(deepspeed.DeepSpeedEngine.__init__, 'grain_ddp')\n"
        "import grain_ddp.deepspeed\n"
        "print(sys.argv, __name__)\n"
    )
    for before, after in ([], []), (["--local_rank=0"], ["--local_rank=0"]):
        command = [sys.executable, "-m", "grain_ddp.deepspeed", *before, str(script), "--lr", "1"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
        assert out.returncode == 0, out.stderr
        assert str([str(script), *after, "--lr", "1"]) + " __main__" in out.stdout
