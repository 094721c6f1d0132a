"""The guard: a rank that stands out is named, left out or an error, on every rank alike."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from ranks import batch, flat, gather, network, same_everywhere
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import FaultyWorker, GrainState, grain_hook, reduce_gradients

BAD, WHEN = 2, 64
"""The faulty rank, and the step of its fault."""


def fault(tensor: str, factor: float) -> Any:
    """Spoils an entry of a gradient, of the faulty rank in the faulty step, before the hook."""

    def attach(model: nn.Module, now: dict[str, int]) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if now["step"] != WHEN or dist.get_rank() != BAD:
                return gradient
            gradient = gradient.clone()
            gradient.view(-1)[3] += factor * gradient.norm()
            return gradient

        dict(model.named_parameters())[tensor].register_hook(spoil)

    return attach


def train(
    options: dict[str, Any],
    steps: int = WHEN + 4,
    factor: float = 30.0,
    ddp: bool = True,
) -> Any:
    """Parameters after each of the last steps, and the suspects of every record."""
    torch.manual_seed(0)
    state = GrainState(**options)
    model: Any = network()
    now = {"step": 0}
    if factor:
        fault("0.weight", factor)(model, now)
    inner = model
    if ddp:
        model = DistributedDataParallel(model, bucket_cap_mb=0.001)
        model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found, kept = [], []
    for step in range(steps):
        now["step"] = step
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        if not ddp:
            reduce_gradients(model.parameters(), state)
        optimizer.step()
        if state.last is not None and state.last.step == step:
            found += state.last.suspects
        if step >= WHEN:
            assert same_everywhere(flat(inner.parameters()))
            kept.append(flat(inner.parameters()))
    return found, torch.stack(kept), state.last


@pytest.mark.parametrize("scope", ["global", "bucket"])
@pytest.mark.parametrize("weighting", ["mean", "min_norm"])
def test_the_rank_is_named_and_nothing_changes(scope: str, weighting: str) -> None:
    options = {"scope": scope, "weighting": weighting}
    plain = run(4, train, options)
    watched = run(4, train, {**options, "guard": "warn"})
    for (none, expected, _), (suspects, parameters, _) in zip(plain, watched, strict=True):
        assert none == []
        assert [(s.step, s.rank, s.kind, s.tensor) for s in suspects] == [
            (WHEN, BAD, "peak", "0.weight")
        ]
        assert torch.equal(expected, parameters)


def without_the_faulty() -> Any:
    """The mean of the others in the faulty step, by hand."""
    model = network()
    for step in range(WHEN + 1):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            assert p.grad is not None
            every = gather(p.grad)
            if step == WHEN:
                del every[BAD]
            p.grad = torch.stack(every).mean(0)
        optimizer.step()
    return flat(model.parameters())


@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_drop_leaves_out_the_suspect(scope: str) -> None:
    options = {"scope": scope, "weighting": "mean", "guard": "drop"}
    expected = run(4, without_the_faulty)
    for (suspects, parameters, _), wanted in zip(run(4, train, options), expected, strict=True):
        assert [(s.step, s.rank) for s in suspects] == [(WHEN, BAD)]
        if scope == "global":
            assert torch.allclose(parameters[0], wanted, rtol=1e-5, atol=1e-6)
        else:  # the first bucket, of the last layers, came before the fault was seen
            assert not torch.allclose(parameters[0], wanted, rtol=1e-5, atol=1e-6)
            assert torch.allclose(parameters[0][:500], wanted[:500], rtol=1e-5, atol=1e-6)


def dropped(options: dict[str, Any]) -> Any:
    state = GrainState(guard="drop", **options)
    model = DistributedDataParallel(network())
    model.register_comm_hook(state, grain_hook)
    x, y = batch(0)
    x = x * (np.nan if dist.get_rank() == BAD else 1.0)
    for _ in range(options.get("microbatches", 1)):
        nn.functional.cross_entropy(model(x), y).backward()
    gradient = flat(p.grad for p in model.parameters())
    assert same_everywhere(gradient)
    assert gradient.isfinite().all()
    assert state.last is not None
    return state.last.dropped, {(s.rank, s.kind) for s in state.last.suspects}


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, (BAD,)),
        ({"weighting": "mean", "record_every": 7}, (BAD,)),
        ({"weighting": "mean", "warmup_steps": 3}, (BAD,)),
        ({"groups": 2}, (1,)),
        ({"groups": [[0, 2], [1, 3]]}, (0,)),
        ({"groups": [[0, 1, 2], [3]]}, (0,)),
        ({"microbatches": 2}, (4, 5)),
        ({"sketch": 512}, (BAD,)),
        ({"sketch": 512, "groups": 2, "scope": "bucket"}, ((1,),)),
    ],
    ids=str,
)
def test_what_is_not_finite_is_left_out_in_every_way(options: dict[str, Any], rows: Any) -> None:
    for found, suspects in run(4, dropped, options):
        assert found == rows
        assert suspects == {(BAD, "nonfinite")}


def test_the_loop_names_the_rank_too() -> None:
    options = {"guard": "warn", "weighting": "mean"}
    for suspects, _, _ in run(4, train, options, WHEN + 1, 30.0, False):
        assert [(s.rank, s.tensor) for s in suspects] == [(BAD, "parameter 0 [47, 11]")]


def raises(ddp: bool) -> Any:
    state = GrainState(guard="raise", weighting="mean", record_every=100)
    model: Any = network()
    if ddp:
        model = DistributedDataParallel(model)
        model.register_comm_hook(state, grain_hook)
    before = flat(model.parameters()).clone()
    x, y = batch(0)
    x = x * (np.inf if dist.get_rank() == BAD else 1.0)
    with pytest.raises(FaultyWorker, match=f"rank {BAD} .*No parameter has changed") as caught:
        nn.functional.cross_entropy(model(x), y).backward()
        reduce_gradients(model.parameters(), state)
    assert [s.rank for s in caught.value.suspects] == [BAD]
    assert torch.equal(before, flat(model.parameters()))
    assert state.step == 0
    model.zero_grad()  # the step runs again, with a sound batch
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    if not ddp:
        reduce_gradients(model.parameters(), state)
    assert same_everywhere(flat(p.grad for p in model.parameters()))
    return state.step


@pytest.mark.parametrize("ddp", [True, False])
def test_raise_is_an_error_on_every_rank_and_the_step_can_run_again(ddp: bool) -> None:
    assert run(4, raises, ddp) == [1] * 4


def logged() -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grain_ddp").addHandler(handler)
    train({"guard": "warn", "weighting": "mean"})
    return lines


def test_rank_0_says_it_in_a_sentence() -> None:
    first, *others = run(4, logged)
    assert others == [[], [], []]
    (line,) = first
    assert line.startswith(f"rank {BAD} (cpu of ")
    assert f"at step {WHEN} it has an entry" in line


def replicas(action: str | None, part: str) -> Any:
    state = GrainState(guard=action, check_replicas=3, weighting="mean", record_every=100)
    inner = nn.Sequential(network(), nn.BatchNorm1d(3))
    inner.register_buffer("scale", torch.ones(3))
    model = DistributedDataParallel(inner, broadcast_buffers=False)
    model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(8):
        if step == 4 and dist.get_rank() == BAD:
            with torch.no_grad():
                tensor = dict([*inner.named_parameters(), *inner.named_buffers()])[part]
                tensor.view(-1).view(torch.int32)[1] ^= 1 << 3
        optimizer.zero_grad()
        x, y = batch(step)
        try:
            nn.functional.cross_entropy(model(x), y).backward()
        except FaultyWorker as error:
            return error.suspects
        optimizer.step()
        if state.last is not None and state.last.step == step:
            found += state.last.suspects
    return tuple(found)


@pytest.mark.parametrize("action", [None, "raise"])
def test_a_replica_that_differs_is_named_with_its_first_tensor(action: str | None) -> None:
    for suspects in run(4, replicas, action, "0.2.weight"):
        assert [(s.step, s.rank, s.kind, s.tensor) for s in suspects] == [
            (6, BAD, "replica", "0.2.weight")
        ]


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ValueError, match="guard must be None, 'warn', 'drop' or 'raise'"):
        GrainState(guard="ask")
    with pytest.raises(ValueError, match="check_replicas must be an int >= 0"):
        GrainState(check_replicas=-1)


def differing() -> str:
    state = GrainState(guard="warn" if dist.get_rank() else None)
    model = DistributedDataParallel(network())
    model.register_comm_hook(state, grain_hook)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    return ""


def test_ranks_with_other_guards_are_told() -> None:
    for outcome in launch(2, differing):
        assert outcome.error is not None
        assert "guard must be the same on every rank" in outcome.error
