"""Anything at all, into what is public: a right answer, or an error that is documented.

Options and saved states are in tests/test_state.py, Gramians in tests/test_solver.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grain_ddp import GrainState, min_norm, reduce_gradients
from grain_ddp._core.options import NAMES
from grain_ddp._math.record import StepRecord
from grain_ddp.sinks._schema import FIELDS, line_of, parse

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**400), st.floats(), st.text(max_size=5)
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
WHOLE = StepRecord(3, np.eye(2), np.full(2, 0.5), 0.0, "optimal", (0, 1), ())


def attempt(call: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether it gives an answer, and that; else its error is one of ours, and short."""
    try:
        return True, call()
    except ValueError as error:
        said = str(error)
    assert said.startswith("grain_ddp: ")
    assert len(said) < 1000
    return False, None


@settings(deadline=None)
@given(st.one_of(JSON, st.dictionaries(st.sampled_from([*FIELDS, "run"]), JSON)), st.booleans())
def test_a_line_of_a_log(value: Any, complete: bool) -> None:
    if complete and isinstance(value, dict):
        value = {**json.loads(line_of(WHOLE, "run")), **value}
    _, found = attempt(lambda: parse(json.dumps(value), "run.jsonl, line 1"))
    if found is not None:
        assert parse(line_of(found[0], "again"), "again") is not None


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_as_a_line(text: str) -> None:
    assert attempt(lambda: parse(text, "run.jsonl, line 1"))[1] is None


ENTRIES = st.one_of(st.dictionaries(st.sampled_from([*NAMES, "log", "enabled", "x"]), JSON), JSON)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["grain", "Grain", "zero_optimization", "x"]), ENTRIES))
def test_a_config_of_deepspeed(config: Any) -> None:
    pytest.importorskip("deepspeed")
    from grain_ddp.deepspeed.config import section

    taken, found = attempt(lambda: section(config))
    if taken:
        assert (found is not None) == (config.get("grain", {}).get("enabled") is True)


@settings(deadline=None)
@given(
    st.one_of(
        JSON,
        st.lists(st.lists(st.floats(width=32), min_size=2, max_size=2), min_size=2, max_size=2),
        st.binary(max_size=9).map(lambda raw: np.frombuffer(raw, np.uint8)),
        st.just(torch.ones(2, 2, dtype=torch.complex64)),
    )
)
def test_a_gramian(value: Any) -> None:
    taken, found = attempt(lambda: min_norm(value))
    if taken:
        weights = np.asarray(found.weights)
        assert (weights >= 0).all()
        assert weights.sum() == pytest.approx(1)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["f", "d", "h", "c", "none", "sparse"]), st.integers(0, 3)))
)
def test_gradients_in_one_process(kinds: list[tuple[str, int]]) -> None:
    """Of any dtype and length, missing, empty or sparse: two passes of one process."""
    dtypes = {"f": torch.float32, "d": torch.float64, "h": torch.float16, "c": torch.complex64}
    parameters = []
    for kind, length in kinds:
        p = nn.Parameter(torch.ones(length, dtype=dtypes.get(kind, torch.float32)))
        if kind != "none":
            p.grad = torch.ones_like(p).to_sparse() if kind == "sparse" else torch.ones_like(p)
        parameters.append(p)
    state = GrainState(microbatches=2)
    if attempt(lambda: reduce_gradients(parameters, state))[0]:
        for p in parameters:
            if p.grad is not None:
                p.grad = torch.ones_like(p)
        reduce_gradients(parameters, state)
        assert all(p.grad is None or torch.equal(p.grad, torch.ones_like(p)) for p in parameters)
