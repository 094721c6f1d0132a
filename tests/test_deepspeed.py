"""DeepSpeed with the "grain" section, at every stage, against a single-process reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import run
from oracle import min_norm_point
from ranks import flat, gather, loss, network, relative_error, same_everywhere

pytest.importorskip("deepspeed")

import deepspeed
import deepspeed.comm.torch

import grain_ddp.deepspeed

# Tests need no compiled communication, which is only for inference.
deepspeed.comm.torch.build_shm_op = lambda: None

RATE, MOMENTUM = 0.5, 0.9
Rule = Callable[[torch.Tensor], torch.Tensor]


def min_norm(rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(min_norm_point(rows))


def mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.mean(0)


def config(stage: int, grain: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, **more.pop("zero", {})}
    result = {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **more,
    }
    if grain is not None:
        result["grain"] = {"enabled": True, **grain}
    return result


def engine_for(settings: dict[str, Any], model: torch.nn.Module | None = None) -> Any:
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=copy.deepcopy(settings), dist_init_required=False
    )[0]


def train(engine: Any, steps: int, first: int = 0, dtype: torch.dtype = torch.float32) -> None:
    passes = engine.gradient_accumulation_steps()
    for step in range(first, first + steps):
        for k in range(passes):
            engine.backward(loss(engine, step * passes + k, dtype))
            engine.step()


def parameters(engine: Any) -> torch.Tensor:
    every = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(every):
        return flat(every).clone()


def reference(
    steps: int, passes: int, rule: Rule, each_pass: bool, clip: float = 0.0
) -> torch.Tensor:
    """What the parameters should be, from gathered gradients, with none of the package."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for step in range(steps):
        rows = []
        for k in range(passes):
            model.zero_grad()
            (loss(model, step * passes + k) / passes).backward()
            own = flat(p.grad for p in model.parameters()).double()
            rows.append(torch.stack(gather(own)))
        total = sum(map(rule, rows)) if each_pass else rule(sum(rows))
        if clip:
            total = total * min(1.0, clip / (float(total.norm()) + 1e-6))
        for p, part in zip(
            model.parameters(), total.split([p.numel() for p in model.parameters()]), strict=True
        ):
            p.grad = part.view_as(p).float()
        optimizer.step()
    return flat(model.parameters())


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
        for stage in range(4)
        for scope in ("global", "bucket")
        for passes in (1, 2)
    ]
    for ranks in run(n, errors, cases, deadline=240):
        assert max(ranks) < 1e-5, ranks


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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_settings_of_zero(stage: int) -> None:
    settings = [dict(zero) for zero in ZERO_SETTINGS]
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
        for stage in range(4)
        for scope in ("global", "bucket")
        for bucket in (1_000_000, 600)
        for more in ({}, {"bf16": {"enabled": True}})
    ]
    for ranks in run(3, against_plain, cases, deadline=300):
        for case, error in zip(cases, ranks, strict=True):
            assert error < (4e-3 if "bf16" in case else 1e-6), case
