"""Sinks: what is written comes back, rank 0 writes alone, and training does not notice."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run
from ranks import flat, loss, network
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, Status, StepRecord, grain_hook
from grain_ddp.sinks import CURVES, jsonl, log, read_jsonl, scalars, tensorboard, wandb


def record(step: int = 0, n: int = 3) -> StepRecord:
    rows = np.random.default_rng(step).normal(size=(n, 5))
    return StepRecord(step, rows @ rows.T, np.full(n, 1 / n), 0.1, Status.MEAN, tuple(range(n)), ())


def buckets() -> StepRecord:
    one = record()
    return StepRecord(
        7,
        np.stack([one.gramian, 2 * one.gramian]),
        np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]),
        np.array([0.0, 1e-17]),
        ("optimal in another version", Status.CUSTOM),
        ((0, 1), (0, 1, 2)),
        ((2,), ()),
    )


def not_finite() -> StepRecord:
    gramian = np.array([[np.inf, np.nan], [np.nan, 1.0]])
    return StepRecord(2, gramian, np.array([0.0, 1.0]), float("nan"), "x", (1,), (0,))


def same(found: StepRecord, expected: StepRecord) -> None:
    for field in dataclasses.fields(StepRecord):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert type(a) is type(b), field.name
        if isinstance(a, (float, np.ndarray)):
            np.testing.assert_array_equal(a, b)  # every bit of it; NaN equals NaN
        else:
            assert a == b


@pytest.mark.parametrize("made", [record(), buckets(), not_finite()], ids=["one", "b", "nan"])
def test_a_record_comes_back_as_it_was(made: StepRecord, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "run.jsonl"
    jsonl(path)(made)
    (found,) = read_jsonl(path)
    same(found, made)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, which JSON does not have


def test_a_broken_line_is_told_and_the_next_run_starts_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = jsonl(path)
    sink(record(0))
    sink(record(1))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="left out line 2"):
        assert [r.step for r in read_jsonl(path)] == [0]
    jsonl(path)(record(1))
    with pytest.warns(UserWarning, match="left out line 2"):
        assert [r.step for r in read_jsonl(path)] == [0, 1]


def test_steps_that_were_run_again_count_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = jsonl(path)
    for step in (0, 1, 2, 3, 2, 3):
        sink(dataclasses.replace(record(step), gap=float(step)))
    sink(dataclasses.replace(record(3), gap=9.0))
    assert [(r.step, r.gap) for r in read_jsonl(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 9.0)]


@pytest.mark.parametrize("text", ["", "\n", "not json\n", '{"step": 1}\n', "[1, 2]\n", "3\n"])
def test_a_file_of_another_kind_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sinks\.jsonl"):
        read_jsonl(path)


def test_a_place_that_cannot_be_written_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        jsonl(tmp_path)


def test_a_disk_that_fails_later_does_not_end_the_training(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "run.jsonl"
    sink = jsonl(path)
    path.unlink()
    path.parent.rmdir()
    with pytest.warns(UserWarning, match="step 5 is missing in .*The training goes on"):
        sink(record(5))


def test_states_with_sinks_pickle(tmp_path: Path) -> None:
    for sink in (jsonl(tmp_path / "run.jsonl"), log()):
        state = pickle.loads(pickle.dumps(GrainState(on_step=sink)))
        state.on_step(record())
    assert len(read_jsonl(tmp_path / "run.jsonl")) == 1


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value, step


class Run:
    def __init__(self) -> None:
        self.metrics: list[tuple[str, Any]] = []
        self.logged: list[dict[str, float]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def test_scalars_are_finite_and_few() -> None:
    assert scalars(record())["cosine/2"] == record().cosine_to_others[2]
    assert scalars(buckets())["weight/0"] == pytest.approx(0.35)
    assert all(np.isfinite(list(scalars(not_finite()).values())))
    many = scalars(record(n=CURVES + 1))
    assert not any("/" in name for name in many)


def test_tensorboard_gets_the_scalars() -> None:
    writer = Writer()
    tensorboard(writer)(record(4))
    assert writer.scalars["grain/norm_mean"] == (record(4).norm_mean, 4)


def test_tensorboard_writes_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = pickle.loads(pickle.dumps(tensorboard(tmp_path)))
    sink(record(4))
    from grain_ddp.sinks import _summary_writer

    _summary_writer(tmp_path).close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("grain/norm_mean")
    assert event.step == 4
    assert event.value == pytest.approx(record(4).norm_mean)


def test_wandb_gets_the_scalars_on_an_axis_of_their_own() -> None:
    active = Run()
    wandb(active)(record(4))
    assert ("grain/*", "grain/step") in active.metrics
    assert active.logged[0]["grain/step"] == 4
    assert active.logged[0]["grain/norm_mean"] == record(4).norm_mean


@pytest.mark.parametrize(
    ("module", "make"),
    [("tensorboard", lambda: tensorboard("nowhere")), ("wandb", wandb)],
)
def test_what_is_not_installed_is_a_sentence(
    module: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'grain-ddp\[{module}\]'"):
        make()


def test_the_log_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "grain_ddp")
    log()(record(4))
    log()(not_finite())
    log()(buckets())
    assert "step 4: norm" in caplog.messages[0]
    assert caplog.messages[1].endswith("dropped groups [0]")
    assert len(caplog.messages) == 3


def monitor(folder: str, watched: bool, every: int) -> tuple[list[torch.Tensor], list[str]]:
    """Parameters after each step, with sinks or without; the files there are now."""
    options = {"on_step": jsonl(f"{folder}/run.jsonl")} if watched else {}
    state = GrainState(weighting="mean", record_every=every, **options)
    model = DistributedDataParallel(network(), bucket_cap_mb=0.001)
    model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for step in range(6):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        found.append(flat(model.parameters()))
    return found, sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("every", [1, 3])
def test_parameters_are_bit_equal_with_and_without_sinks(every: int, tmp_path: Path) -> None:
    plain = run(3, monitor, str(tmp_path), False, every)
    assert plain[0][1] == []
    watched = run(3, monitor, str(tmp_path), True, every)
    for (expected, _), (found, _) in zip(plain, watched, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # Written once, by rank 0.
    assert [r.step for r in read_jsonl(tmp_path / "run.jsonl")] == list(range(0, 6, every))
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == len(range(0, 6, every))
