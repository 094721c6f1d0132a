"""DeepSpeed with the "grain" section: each fault is right or refused, at every stage."""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import launch, run
from ranks import flat, gather, loss, network, relative_error, same_everywhere
from torch import Tensor, nn

pytest.importorskip("deepspeed")

import deepspeed
from deepspeed.runtime import constants
from engines import MOMENTUM, RATE, STAGES, config, engine_for, min_norm, parameters, train

from grain_ddp._wire.neighbours import SWITCH
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp.deepspeed.config import _resembles
from grain_ddp.deepspeed.seams import SCATTER, honour_timeout

NEAR = ["Grain", "GRAIN", "grain_ddp", "grain-ddp", "grains", "gran", "graain", "grian", "gRaIn "]


def refusal(settings: Any, **how: Any) -> str:
    try:
        deepspeed.initialize(model=network(), model_parameters=network().parameters(), **how)
    except ValueError as error:
        return str(error)
    return f"no error: {settings}"


def near_misses() -> list[str]:
    found = []
    for key in NEAR:
        settings = config(1) | {key: {"enabled": True}}
        found.append(refusal(settings, config=settings))
    return found


def test_a_section_with_nearly_the_name_is_an_error() -> None:
    for found in run(2, near_misses):
        for key, error in zip(NEAR, found, strict=True):
            assert repr(key) in error
            assert "grain_ddp: expected" in error


def test_no_key_of_deepspeeds_own_is_taken_for_the_section() -> None:
    keys = {value for value in vars(constants).values() if isinstance(value, str)}
    keys |= {
        "zero_optimization",
        "bf16",
        "fp16",
        "train",
        "training",
        "brain",
        "monitor",
        "trainer",
    }
    assert len(keys) > 50
    assert not any(map(_resembles, keys))


def ways(path: str) -> list[tuple[str, str]]:
    """For each way to pass a config: the scope that is in use, and the error for "Grain"."""
    found, path = [], path + str(torch.distributed.get_rank())
    for how in ("dict", "file", "base64", "config_params", "args"):
        results = []
        for key in ("grain", "Grain"):
            settings: Any = config(1) | {key: {"enabled": True, "scope": "bucket"}}
            text = json.dumps(settings)
            Path(path).write_text(text)
            settings = {
                "dict": settings,
                "base64": base64.urlsafe_b64encode(text.encode()).decode(),
            }.get(how, path)
            more = {"config": settings}
            if how == "config_params":
                more = {"config_params": settings}
            elif how == "args":
                more = {"args": argparse.Namespace(deepspeed_config=path)}
            if key == "Grain":
                results.append(refusal(how, **more))
                continue
            optimizer = torch.optim.SGD((model := network()).parameters(), lr=RATE)
            engine = deepspeed.initialize(model=model, optimizer=optimizer, **more)[0]
            results.append(engine.grain.scope)
        found.append(tuple(results))
    return found


def test_every_way_to_pass_a_config(tmp_path: Path) -> None:
    for rank in run(2, ways, str(tmp_path / "zero.json"), deadline=120):
        for scope, error in rank:
            assert scope == "bucket"
            assert "the config has 'Grain'" in error


def own_part(engine: Any) -> Tensor:
    """What this rank holds of the parameters, as bits: what pads a shard may be NaN."""
    held = flat(getattr(p, "ds_tensor", p) for p in engine.module.parameters())
    return held.view(torch.int32)


def past_the_seam(stage: int, scope: str, passes: int) -> bool:
    """One bucket of the last pass is left to DeepSpeed: whether parameters are as before."""
    settings = config(stage, {"scope": scope}, zero={"reduce_bucket_size": 600})
    engine = engine_for({**settings, "gradient_accumulation_steps": passes})
    optimizer = engine.optimizer
    before = own_part(engine).clone()
    name = SCATTER if stage == 3 else "gradient_reduction_w_predivide"
    ours, theirs = getattr(optimizer, name), getattr(type(optimizer), name)
    last = next(reversed(list(engine.module.parameters())))

    def bypass(first: Any, dtype: torch.dtype) -> Any:
        bucket = optimizer.ipg_buckets[dtype].params
        if stage < 3:
            bucket = [optimizer.bit16_groups[i][index] for i, index, _ in bucket]
        lost = engine.is_gradient_accumulation_boundary() and any(p is last for p in bucket)
        return theirs(optimizer, first, dtype) if lost else ours(first, dtype)

    setattr(optimizer, name, bypass)
    with pytest.raises(RuntimeError, match=r"another way with those of .*4\.bias"):
        train(engine, 1)
    return torch.equal(before, own_part(engine))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_gradient_that_goes_past_the_seam_is_an_error(stage: int) -> None:
    for scope, passes in (("bucket", 1), ("bucket", 2), ("global", 2)):
        assert run(2, past_the_seam, stage, scope, passes) == [True, True]


class Extra(nn.Module):
    """One more parameter, at the output, which only some passes reach."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.extra = network(), nn.Parameter(torch.ones(3))
        self.reached = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y * self.extra if self.reached else y


def reached_by_the_first_pass(stage: int, scope: str, zero: dict[str, Any]) -> float:
    """The error of a step whose second pass does not reach a parameter."""
    model = Extra()
    before = flat(model.parameters()).double()
    for k in range(2):
        model.reached = k == 0
        (loss(model, k) / 2).backward()
    rows = torch.stack(gather(flat(p.grad for p in model.parameters()).double()))
    settings = config(stage, {"scope": scope}, gradient_accumulation_steps=2, zero=zero)
    engine = engine_for(settings, Extra())
    for k in range(2):
        engine.module.reached = k == 0
        engine.backward(loss(engine, k))
        engine.step()
    result = parameters(engine)
    assert same_everywhere(result)
    return relative_error(before - result.double(), RATE * min_norm(rows))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_parameter_that_only_an_earlier_pass_reaches(overlap: bool) -> None:
    for stage, scope in ((0, "global"), (1, "bucket"), (1, "global"), (2, "global")):
        zero = {"overlap_comm": overlap}
        assert max(run(2, reached_by_the_first_pass, stage, scope, zero)) < 1e-5


class Listed(nn.Module):
    """A leaf module for DeepSpeed that is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.parts = nn.Linear(11, 8), nn.ModuleList([nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](self.first(x).tanh())


def leaf(scope: str, passes: int) -> float:
    """The error of a step with a leaf module whose gradients DeepSpeed does not look after."""
    model, rows = Listed(), []
    before = flat(model.parameters()).double()
    for k in range(passes):
        model.zero_grad()
        (loss(model, k) / passes).backward()
        rows.append(torch.stack(gather(flat(p.grad for p in model.parameters()).double())))
    expected = sum(map(min_norm, rows)) if scope == "bucket" else min_norm(sum(rows))
    model = Listed()
    deepspeed.utils.set_z3_leaf_modules(model, [nn.ModuleList])
    settings = config(3, {"scope": scope}, gradient_accumulation_steps=passes)
    engine = engine_for(settings, model)
    train(engine, 1)
    return relative_error(before - parameters(engine).double(), RATE * expected)


@pytest.mark.skipif(3 not in STAGES, reason="DeepSpeed's stage 3 is sometimes wrong on a CPU")
@pytest.mark.parametrize("scope", ["bucket", "global"])
def test_a_leaf_module_that_is_never_called(scope: str) -> None:
    for passes in (1, 2):
        assert max(run(2, leaf, scope, passes)) < 1e-5


def reduced_by_hand(stage: int, grain: dict[str, Any], passes: int, path: str) -> tuple[float, int]:
    """The difference that a second `allreduce_gradients` makes, and the steps that are counted."""
    results = []
    for again in (0, 1):
        log = f"{path}.{again}"
        settings = config(stage, {**grain, "log": log}, gradient_accumulation_steps=passes)
        engine = engine_for(settings)
        for step in range(2):
            for k in range(passes):
                engine.backward(loss(engine, step * passes + k))
                for _ in range(again):
                    engine.allreduce_gradients()
                engine.step()
        results.append(parameters(engine))
    return relative_error(*results), engine.grain.step


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage in (0, 3)])
def test_reducing_by_hand_after_the_pass_changes_nothing(stage: int, tmp_path: Path) -> None:
    """(At stages 1 and 2 it is an IndexError of DeepSpeed's own.)"""
    cases: list[tuple[dict[str, Any], int]] = [
        ({"scope": scope}, passes) for scope in ("bucket", "global") for passes in (1, 2)
    ]
    if stage == 0:
        cases.append(({"microbatches": 2}, 2))
    for grain, passes in cases:
        logs = [tmp_path / f"log.{again}" for again in (0, 1)]
        for difference, steps in run(
            2, reduced_by_hand, stage, grain, passes, str(tmp_path / "log")
        ):
            assert difference < 1e-6
            assert steps == 2
        assert [log.read_text().count("\n") for log in logs] == [2, 2]
        for log in logs:
            log.unlink()


def one_pass_too_many() -> None:
    engine = engine_for(config(0, {"microbatches": 2}, gradient_accumulation_steps=2))
    for k in range(2):
        engine.backward(loss(engine, k))


def test_passes_that_are_groups_need_a_step_after_each() -> None:
    for outcome in launch(2, one_pass_too_many):
        assert "expected engine.step() after each of 2 backward passes" in str(outcome.error)


def stopped(stage: int, amid: bool) -> float:
    """Seconds until the first rank's error, when the second stops between steps or in the exchange.

    Gradients travel by the backend's own messages, as between hosts.
    """
    os.environ[SWITCH] = "0"
    settings = config(stage, {}, zero={"stage3_param_persistence_threshold": 0})
    engine = engine_for(settings)
    train(engine, 1)
    other = int(gather(torch.tensor([os.getpid()]))[1])
    if torch.distributed.get_rank() == 1:
        if amid:
            TorchWire.exchange = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    try:
        train(engine, 1, first=1)
    except RuntimeError:
        return time.monotonic() - start
    finally:
        os.kill(other, signal.SIGKILL)
    raise AssertionError("the second rank's gradient is not missed")


@pytest.mark.parametrize(
    ("stage", "amid"), [(0, False), (0, True), (1, False), (2, True), (3, False)]
)
def test_a_rank_that_stops_ends_the_others_in_the_worlds_timeout(stage: int, amid: bool) -> None:
    if stage not in STAGES:
        pytest.skip("DeepSpeed's stage 3 is sometimes wrong on a CPU")
    first, second = launch(2, stopped, stage, amid, timeout=4, deadline=40)
    assert second.exitcode == -signal.SIGKILL
    assert first.error is None, first.error
    assert 2 < first.value < 12


def stopped_at_the_start() -> float:
    """The same, when the second stops before DeepSpeed has started."""
    other = int(gather(torch.tensor([os.getpid()]))[1])
    deepspeed.init_distributed("gloo")
    honour_timeout()  # the collective that `initialize` begins with
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    try:
        engine_for(config(1, {}))
    except RuntimeError:
        return time.monotonic() - start
    finally:
        os.kill(other, signal.SIGKILL)
    raise AssertionError("the second rank is not missed")


def test_also_while_deepspeed_starts() -> None:
    first, _ = launch(2, stopped_at_the_start, timeout=4, deadline=40)
    assert first.error is None, first.error
    assert first.value < 12


def refused(what: str, stage: int) -> str:
    model = nn.Linear(11, 3, dtype=torch.complex64) if what == "complex" else network()
    trained = list(model.parameters())
    if what == "outside":
        trained.append(nn.Parameter(torch.ones(3)))
    optimizer = torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM)
    try:
        deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, {}))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", STAGES)
def test_complex_parameters_are_refused(stage: int) -> None:
    """(By plain DeepSpeed too at stage 0; at the others it drops the imaginary part.)"""
    for error in run(2, refused, "complex", stage):
        assert "the complex weight" in error


def test_parameters_that_deepspeed_does_not_reduce_are_refused() -> None:
    for error in run(2, refused, "outside", 0):
        assert "parameters of the optimizer that are not in the model" in error
