"""The guard where gradients are sharded: FSDP2, and DeepSpeed's stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run
from ranks import batch, flat, network, same_everywhere
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import grain_ddp.fsdp
from grain_ddp import FaultyWorker, GrainState

BAD = 1
needs_fsdp = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_reduce_scatter"), reason="FSDP2 needs PyTorch 2.9"
)


def inputs(step: int, when: int) -> Any:
    x, y = batch(step)
    return x * (float("inf") if dist.get_rank() == BAD and step == when else 1.0), y


def with_fsdp(guard: str, weighting: str) -> Any:
    model: Any = network()
    for part in (model[0], model[2], model):
        fully_shard(part)
    state = GrainState(scope="bucket", weighting=weighting, guard=guard)
    grain_ddp.fsdp.apply(model, state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[Any] = []
    for step in range(4):
        optimizer.zero_grad()
        x, y = inputs(step, when=2)
        try:
            nn.functional.cross_entropy(model(x), y).backward()
        except FaultyWorker as error:
            return [(s.step, s.rank, s.kind) for s in error.suspects], state.step
        optimizer.step()
        assert state.last is not None
        if state.last.step == step:
            found += [(s.step, s.rank, s.kind) for s in state.last.suspects]
    finite = flat(p.full_tensor() for p in model.parameters()).isfinite().all()
    return found, bool(finite)


@needs_fsdp
@pytest.mark.parametrize("weighting", ["mean", "min_norm"])
def test_fsdp_units_are_watched(weighting: str) -> None:
    expected = [(2, BAD, "nonfinite")]
    assert run(2, with_fsdp, "warn", weighting) == [(expected, False)] * 2
    assert run(2, with_fsdp, "raise", weighting) == [(expected, 2)] * 2
    for suspects, finite in run(2, with_fsdp, "drop", weighting):
        assert set(suspects) == set(expected)  # of each unit
        assert finite


def with_deepspeed(stage: int, scope: str, guard: str) -> Any:
    from engines import config, engine_for

    grain = {"scope": scope, "weighting": "mean", "guard": guard, "check_replicas": 2}
    engine = engine_for(config(stage, grain))
    found: list[Any] = []
    for step in range(4):
        x, y = inputs(step, when=2)
        try:
            engine.backward(nn.functional.cross_entropy(engine(x), y))
        except FaultyWorker as error:
            return [(s.rank, s.kind, s.tensor) for s in error.suspects], engine.global_steps
        engine.step()
        if engine.grain.last is not None and engine.grain.last.step == step:
            found += [(s.rank, s.kind, s.tensor) for s in engine.grain.last.suspects]
    whole = flat(engine.module.parameters())
    if stage < 3:
        assert same_everywhere(whole)
    return found, bool(whole.isfinite().all())


@pytest.mark.parametrize("scope", ["global", "bucket"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_is_watched(stage: int, scope: str) -> None:
    pytest.importorskip("deepspeed")
    from engines import STAGES

    if stage not in STAGES:
        pytest.skip("this DeepSpeed is wrong on CPUs at stage 3")
    for suspects, finite in run(2, with_deepspeed, stage, scope, "drop"):
        assert {(rank, kind) for rank, kind, _ in suspects} == {(BAD, "nonfinite")}
        assert {tensor for _, _, tensor in suspects} <= {n for n, _ in network().named_parameters()}
        assert finite
    for suspects, steps in run(2, with_deepspeed, stage, scope, "raise"):
        assert {(rank, kind) for rank, kind, _ in suspects} == {(BAD, "nonfinite")}
        assert steps == 2
