"""DeepSpeed with the "grain" section, at every stage, against a single-process reference."""

from __future__ import annotations

import copy
import json
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
from oracle import min_norm_point
from ranks import flat, gather, loss, network, relative_error, same_everywhere

pytest.importorskip("deepspeed")

import deepspeed

import grain_ddp.deepspeed

# DeepSpeed would compile an operation of its own at the first use, which only inference needs.
# (By name: as an attribute, deepspeed.comm.torch is PyTorch.)
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

# On a CPU, older ones are sometimes wrong at stage 3, and reduce nothing if contiguous_gradients is
# false.
RIGHT = tuple(map(int, deepspeed.__version__.split(".")[:3])) >= (0, 19, 8)
STAGES = [0, 1, 2, 3] if RIGHT else [0, 1, 2]
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


def masters(engine: Any) -> torch.Tensor:
    """The parameters in fp32, as the optimizer keeps them."""
    return flat(deepspeed.utils.safe_get_full_fp32_param(p) for p in engine.module.parameters())


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
        for stage in STAGES
        for scope in ("global", "bucket")
        for passes in (1, 2)
    ]
    for ranks in run(n, errors, cases, deadline=240):
        assert max(ranks) < 1e-5, ranks


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


def half(stage: int, scope: str, passes: int, spoil: bool) -> Any:
    """bf16: (error of the first step's change, whether a spoilt step was skipped everywhere)."""
    settings = config(
        stage,
        {"scope": scope},
        bf16={"enabled": True, "check_grad_overflow": True},
        gradient_accumulation_steps=passes,
    )
    engine = engine_for(settings, network(torch.bfloat16))
    before, rows = masters(engine).clone(), []
    for k in range(passes):
        twin = network(torch.bfloat16)
        loss(twin, k, torch.bfloat16).backward()
        rows.append(torch.stack(gather(flat(p.grad for p in twin.parameters()).double() / passes)))
        value = loss(engine, k, torch.bfloat16)
        if spoil and k == 0 and torch.distributed.get_rank() == 1:
            value = value * float("inf")
        engine.backward(value)
        engine.step()
    after = masters(engine)
    assert same_everywhere(after)
    expected = sum(map(min_norm, rows)) if stage >= 2 and scope == "bucket" else min_norm(sum(rows))
    engine.destroy()
    if spoil:
        return torch.equal(before, after)
    return relative_error(before.double() - after.double(), RATE * expected)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_bf16_to_its_rounding(stage: int) -> None:
    assert max(run(3, each_half, stage, False)) < 0.01


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_step_that_overflows_on_one_rank_is_skipped_by_all(stage: int) -> None:
    assert all(run(2, each_half, stage, True))


def each_half(stage: int, spoil: bool) -> Any:
    found = [half(stage, scope, k, spoil) for scope in ("global", "bucket") for k in (1, 2)]
    return all(found) if spoil else max(found)


def many_buckets(stage: int, slack: int) -> tuple[int, float, float]:
    """(buckets, gap, ⟨d, g_i⟩ relative to its bound) where buckets belong to few ranks."""
    grain_ddp.sharded.SLACK = slack
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


def refusals(cases: list[tuple[dict[str, Any], str]]) -> list[str]:
    """The messages that do not name the key, or where there was no error."""
    wrong = []
    for settings, key in cases:
        try:
            engine_for(settings)
        except Exception as error:  # some are DeepSpeed's own, in some of its versions
            if key not in str(error) or ("grain_ddp" not in str(error) and "." in key):
                wrong.append(repr(error))
        else:
            wrong.append(f"no error: {key}")
    return wrong


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
        ({"groups": "node"}, "grain.groups"),
        ({"scoop": "global"}, "grain.scoop"),
        ({"on_step": 1}, "grain.on_step"),
        ({"log": 3}, "grain.log"),
        ({"log": "/dev/null/run.jsonl"}, "grain.log"),
    ]
    cases = [(config(1, options), key) for options, key in grain]
    cases += [(config(1) | {"grain": section}, "grain") for section in (True, "yes", None, [])]
    cases += [(config(1) | {"grain": section}, "grain.enabled") for section in ({}, {"enabled": 1})]
    together = [
        ({"sparse_gradients": True}, "sparse_gradients"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"zero": {"zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"zero": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
    ]
    cases += [
        (config(0 if "sparse_gradients" in more else 3, {}, **more), key) for more, key in together
    ]
    assert run(2, refusals, cases) == [[], []]


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
    assert set(lines[0]) == set(grain_ddp.StepRecord.__dataclass_fields__)


class Branches(torch.nn.Module):
    """The first rank uses one more layer than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.extra = network(), torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return self.extra(y) if torch.distributed.get_rank() == 0 else y


def unused() -> None:
    engine = engine_for(config(1, {}), Branches())
    engine.backward(loss(engine, 0))


def test_a_gradient_on_some_ranks_only_is_an_error_on_all() -> None:
    for outcome in launch(2, unused):
        assert outcome.error is not None
        assert "has a gradient must be the same on every rank" in outcome.error


def test_another_deepspeed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.18.9")
    with pytest.raises(RuntimeError, match=r"0\.19\.1 or newer"):
        grain_ddp.deepspeed._check_version()
    monkeypatch.undo()
    grain_ddp.deepspeed._check_version()
    optimizer = grain_ddp.deepspeed.DeepSpeedZeroOptimizer
    monkeypatch.setattr(optimizer, "allreduce_bucket", lambda self, tensors: None)
    with pytest.raises(RuntimeError, match="allreduce_bucket"):
        grain_ddp.deepspeed._check_version()


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
