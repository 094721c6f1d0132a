"""Options are fixed once in use, and a state has one owner."""

from __future__ import annotations

import copy
import gc
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from hypothesis import given
from hypothesis import strategies as st
from ranks import gather, loss, network, relative_error
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook, reduce_gradients
from grain_ddp._core.fingerprint import describe
from grain_ddp._core.options import NAMES, Kind, Options


def test_options_are_checked_when_they_are_assigned() -> None:
    state = GrainState()
    state.cap = 2
    assert state.options == Options(cap=2)
    with pytest.raises(ValueError, match="cap must be None or a number of at least 1"):
        state.cap = 0.5
    with pytest.raises(ValueError, match=r"cap must be .* characters"):
        state.cap = 10**400
    with pytest.raises(AttributeError, match=r"no option 'weigthing'\. There are: scope"):
        state.weigthing = "mean"  # a typing error
    assert state.cap == 2


def test_its_repr_says_the_options() -> None:
    text = repr(GrainState(cap=2))
    assert "cap=2" in text
    assert "scope='global'" in text
    assert all(f"{name}=" in text for name in NAMES)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=8),
    st.sampled_from(["global", "bucket", "rank", "node", "mean", "min_norm", "drop"]),
    st.lists(st.lists(st.integers(-1, 3), max_size=2), max_size=2), st.just(torch.bfloat16),
    st.just(10**400), st.just(torch.ones(2)), st.binary(max_size=3),
)  # fmt: skip


@given(st.sampled_from(NAMES), VALUES)
def test_any_value_is_taken_or_refused_in_a_sentence(name: str, value: Any) -> None:
    try:
        state = GrainState(**{name: value})
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert refused.startswith("grain_ddp: ")
        assert len(refused) < 600
        return
    again = GrainState()
    if name != "on_step" and not callable(value):
        again.load_state_dict(state.state_dict())
        assert again.options == state.options


@given(st.one_of(VALUES, st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), VALUES)))
def test_any_state_dict_is_taken_or_refused_in_a_sentence(values: Any) -> None:
    state = GrainState()
    before, refused = state.state_dict(), "grain_ddp: "
    try:
        state.load_state_dict(values)
    except ValueError as error:
        refused = str(error)
        assert state.state_dict() == before
    assert refused.startswith("grain_ddp: ")


@pytest.mark.parametrize("step", ["", -1, float("nan"), None, 1.0, True])
def test_steps_are_whole_numbers(step: Any) -> None:
    with pytest.raises(ValueError, match="step must be an int >= 0"):
        GrainState().load_state_dict({"step": step})


def test_kinds() -> None:
    options = Options(warmup_steps=2)
    assert [options.kind(s) for s in (1, 2)] == [Kind.PLAIN_MEAN, Kind.WEIGHTS_PER_STEP]
    assert Options(scope="bucket").kind(0) is Kind.WEIGHTS_PER_BUCKET
    mean = Options(weighting="mean", record_every=2)
    assert [mean.kind(s) for s in (0, 1)] == [Kind.RECORDED_MEAN, Kind.PLAIN_MEAN]
    assert Options(weighting="mean", nonfinite="drop").kind(0) is Kind.WEIGHTS_PER_STEP


def weighting_of(factor: float, function: Any = None) -> Any:
    def rule(gramian: torch.Tensor) -> torch.Tensor:
        return torch.full((len(gramian),), factor / len(gramian))

    return function or rule


class Rule:
    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, gramian: torch.Tensor) -> torch.Tensor:
        weights = gramian.diagonal() ** -self.power
        return weights / weights.sum()


def test_callables_are_told_apart_by_what_they_are_made_of() -> None:
    assert describe(weighting_of(1.0)) == describe(weighting_of(1.0))
    assert describe(weighting_of(1.0)) != describe(weighting_of(2.0))
    assert describe(Rule(1)) == describe(Rule(1)) != describe(Rule(2))
    assert describe(Rule(1).__call__) != describe(Rule(2).__call__)
    assert describe(partial(Rule(1), out=3)) != describe(partial(Rule(1), out=4))
    assert describe(partial(weighting_of, torch.ones(2))) != describe(
        partial(weighting_of, torch.zeros(2))
    )
    rule: Any = Rule(1)
    rule.itself = rule
    assert describe(rule).startswith("test_state.Rule (checksum ")


def other_closures() -> None:
    state = GrainState(weighting=weighting_of(1.0 + dist.get_rank()))
    step(state)


def step(state: GrainState, number: int = 0) -> nn.Module:
    model = network()
    loss(model, number).backward()
    reduce_gradients(model.parameters(), state)
    return model


def changed() -> None:
    state = GrainState()
    model = step(state)
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match=r"weighting cannot .* serves reduce_grad.*load_st"):
            state.weighting = "mean"
    with pytest.raises(ValueError, match="process_group cannot"):
        state.process_group = dist.group.WORLD
    state.load_state_dict({**state.state_dict(), "weighting": "mean", "step": 7})
    loss(model, 0).backward()
    record = reduce_gradients(model.parameters(), state)
    assert record is not None
    assert record.step == 7
    assert record.status == "mean"


def test_options_are_fixed_from_the_first_use_on() -> None:
    run(2, changed)


def other_model() -> None:
    state = GrainState()
    kept = step(state)
    names = r"serves reduce_gradients of 6 parameters.*cannot serve reduce_gradients of 6 para"
    with pytest.raises(ValueError, match=names):
        step(state)
    model = DistributedDataParallel(network())
    model.register_comm_hook(state, grain_hook)
    with pytest.raises(ValueError, match="serves reduce_gradients, and cannot serve the DDP model"):
        loss(model, 0).backward()
    assert kept is not None


def test_another_model_is_an_error_that_names_both() -> None:
    run(2, other_model)


def moves_on() -> Any:
    """A state whose model is gone serves the next one, over its ranks."""
    half = dist.new_group([0, 1])
    state = GrainState()
    model = DistributedDataParallel(network())
    model.register_comm_hook(state, grain_hook)
    loss(model, 0).backward()
    del model
    gc.collect()
    if dist.get_rank() < 2:
        model = DistributedDataParallel(network(), process_group=half)
        model.register_comm_hook(state, grain_hook)
        loss(model, 1).backward()
        assert state.last is not None
        return len(state.last.weights), state.step
    return None


def test_a_state_moves_on_when_its_model_is_gone() -> None:
    assert run(3, moves_on) == [(2, 2), (2, 2), None]


def both_at_once() -> None:
    state = GrainState()
    first = DistributedDataParallel(network())
    first.register_comm_hook(state, grain_hook)
    loss(first, 0).backward()
    second = DistributedDataParallel(network())
    second.register_comm_hook(state, grain_hook)
    with pytest.raises(ValueError, match=r"serves the DDP model Sequential .* cannot serve"):
        loss(second, 0).backward()


def test_a_second_ddp_model_is_refused_while_the_first_is_there() -> None:
    run(2, both_at_once)


def skips_a_step(ddp: bool) -> None:
    state = GrainState()
    model: Any = network()
    if ddp:
        model = DistributedDataParallel(model)
        model.register_comm_hook(state, grain_hook)
    for number in range(4):
        loss(model, number).backward()
        if number == 1 and dist.get_rank() == 1:
            state.step += 1  # as if it had skipped one
        if not ddp:
            reduce_gradients(model.parameters(), state)


@pytest.mark.parametrize("ddp", [False, True])
def test_a_rank_that_is_at_another_step_is_told_at_once(ddp: bool) -> None:
    for outcome in launch(2, skips_a_step, ddp, timeout=10):
        assert outcome.error is not None
        assert "the number of the step must be the same on every rank, but it is" in outcome.error


def test_callables_with_other_closures_are_an_error() -> None:
    for outcome in launch(2, other_closures, timeout=10):
        assert outcome.error is not None
        assert "weighting must be the same on every rank" in outcome.error


TOLD = {0: 1.0, 1: 1.0}


def by_a_table(gramian: torch.Tensor) -> torch.Tensor:
    return torch.tensor([TOLD[0], TOLD[1]], dtype=torch.float64) / sum(TOLD.values())


def other_weights() -> None:
    """The same function, and a table beside it that differs: the next Gramian tells."""
    TOLD[1] = 1.0 + dist.get_rank()
    state, model = GrainState(weighting=by_a_table), network()
    for number in range(2):
        loss(model, number).backward()
        reduce_gradients(model.parameters(), state)


def test_weights_that_differ_are_told_with_the_next_gramian() -> None:
    for outcome in launch(2, other_weights, timeout=10):
        assert outcome.error is not None
        assert "the weights so far (a checksum) must be the same on every rank" in outcome.error


def test_copies_are_free() -> None:
    state = GrainState(cap=2, warmup_steps=3)
    state.step = 4
    for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert again.options == state.options
        assert again.step == 4
        assert again.owner is None


def test_a_state_is_loaded_without_executing_anything(tmp_path: Path) -> None:
    state = GrainState(scope="bucket", groups=[[0, 1], [2, 3]], wire_dtype="bf16", cap=2)
    assert state.wire_dtype is torch.bfloat16
    torch.save(state.state_dict(), tmp_path / "state.pt")
    again = GrainState()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.options == state.options


def complex_gradients() -> float:
    generator = torch.Generator().manual_seed(dist.get_rank())
    p = nn.Parameter(torch.zeros(40, dtype=torch.complex64))
    p.grad = torch.randn(40, dtype=torch.complex64, generator=generator)
    q = nn.Parameter(torch.zeros(3))
    q.grad = torch.randn(3, generator=generator)
    own = torch.cat([torch.view_as_real(p.grad).reshape(-1), q.grad])
    rows = torch.stack(gather(own)).double()
    record = reduce_gradients([p, q], GrainState())
    assert record is not None
    expected = torch.from_numpy(record.weights) @ rows
    torch.testing.assert_close(torch.from_numpy(record.gramian), rows @ rows.T)
    in_loop = relative_error(torch.cat([torch.view_as_real(p.grad).reshape(-1), q.grad]), expected)
    return max(in_loop, complex_under_ddp())


def complex_under_ddp() -> float:
    torch.manual_seed(0)
    net = nn.Linear(7, 3, dtype=torch.complex64)
    model, state = DistributedDataParallel(net), GrainState()
    model.register_comm_hook(state, grain_hook)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(dist.get_rank())) + 1j
    rows = []
    for value in (net, model):
        net.zero_grad()
        value(x).abs().square().mean().backward()
        own = torch.cat([torch.view_as_real(p.grad).reshape(-1) for p in net.parameters()])
        rows.append(torch.stack(gather(own)).double())
    assert state.last is not None
    return relative_error(rows[1][0], torch.from_numpy(state.last.weights) @ rows[0])


def test_complex_gradients() -> None:
    """In the loop and under DDP."""
    assert max(run(3, complex_gradients)) < 1e-6
