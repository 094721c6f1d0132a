"""Sinks: what is written comes back, rank 0 writes alone, and training does not notice."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import run
from ranks import flat, loss, network
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, Status, StepRecord, Suspect, grain_hook
from grain_ddp.sinks import (
    CURVES,
    jsonl,
    log,
    mlflow,
    opentelemetry,
    read_jsonl,
    scalars,
    tensorboard,
    wandb,
)
from grain_ddp.sinks._schema import line_of, parse


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


def test_runs_with_one_file_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first, second = jsonl(path), jsonl(path)
    for step in (0, 1, 2):  # at the same time
        first(record(step))
        second(dataclasses.replace(record(step), gap=0.5))
    with pytest.warns(UserWarning, match="2 runs wrote to .*started last.*run=1 to run=2"):
        assert [(r.step, r.gap) for r in read_jsonl(path)] == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert [(r.step, r.gap) for r in read_jsonl(path, 1)] == [(0, 0.1), (1, 0.1), (2, 0.1)]
    resumed = jsonl(path)
    for step in (2, 3):
        resumed(dataclasses.replace(record(step), gap=0.7))
    assert [(r.step, r.gap) for r in read_jsonl(path, 2)][1:] == [(1, 0.5), (2, 0.7), (3, 0.7)]
    jsonl(path)(record(0))  # started anew
    assert [r.step for r in read_jsonl(path, 3)] == [0]
    with pytest.raises(ValueError, match="has the runs 1 to 3, but 4 was asked for"):
        read_jsonl(path, 4)


@pytest.mark.parametrize(
    "text",
    ["", "\n", "not json\n", '{"step": 1}\n', "[1, 2]\n", "3\n", "[" * 100_000, "\xff\xfe{\0"],
)
def test_a_file_of_another_kind_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sinks\.jsonl"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("field", "value", "expected", "found"),
    [
        ("step", None, "a whole number from 0", "null"),
        ("step", -1, "a whole number from 0", "-1"),
        ("step", 10**400, "a whole number from 0", "1000"),
        ("step", True, "a whole number from 0", "true"),
        ("gramian", 3.0, "inner products [n, n]", "an array []"),
        ("gramian", [], "inner products [n, n]", "an array [0]"),
        ("gramian", [[1.0, 2.0]], "inner products [n, n]", "an array [1, 2]"),
        ("gramian", [[1.0, 0.0], [0.0]], "rows of equal length", "[[1.0, 0.0], [0.0]]"),
        ("gramian", [[-1.0, 0.0], [0.0, 1.0]], "squares on the diagonal", "a negative number"),
        ("gramian", [[None, 0.0], [0.0, 1.0]], "numbers only", "null"),
        ("gramian", [["nought", 0.0], [0.0, 1.0]], "numbers only", "nought"),
        ("gramian", [[10**400, 0.0], [0.0, 1.0]], "numbers within the range", "[[1000"),
        ("weights", [1.0], "an array [2], as the gramian is [2, 2]", "an array [1]"),
        ("weights", {"a": 1}, "numbers only", '{"a": 1}'),
        ("gap", [[0.0]], "a number, as the gramian is [2, 2]", "an array [1, 1]"),
        ("gap", False, "numbers only", "false"),
        ("status", 7, "words", "7"),
        ("active", 3, "a list of groups from 0 to 1", "3"),
        ("active", [0, 2], "a list of groups from 0 to 1", "[0, 2]"),
        ("dropped", [[0], []], "a list of groups from 0 to 1", "[[0], []]"),
    ],
)
def test_a_wrong_field_is_told(
    field: str, value: Any, expected: str, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    jsonl(path)(record(0, 2))
    values = json.loads(path.read_text()) | {"step": 1, field: value}
    path.write_text(path.read_text() + json.dumps(values) + "\n")
    with pytest.raises(ValueError, match=r"^grain_ddp: .*run\.jsonl, line 2, field") as raised:
        read_jsonl(path)
    assert f'field "{field}": expected {expected}' in str(raised.value)
    assert f"but found {found}" in str(raised.value)
    assert len(str(raised.value)) < 400 + len(str(path))


def test_buckets_have_a_schema_too(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    jsonl(path)(buckets())
    for field, value in {"status": "optimal", "gap": 0.0, "active": [0, 1]}.items():
        other = tmp_path / field
        other.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
        with pytest.raises(ValueError, match=f'field "{field}": expected'):
            read_jsonl(other)


def test_a_number_beyond_pythons_limit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    jsonl(path)(record())
    path.write_text(path.read_text().replace('"gap": 0.1', '"gap": ' + "1" * 5000))
    with pytest.raises(ValueError, match="line 1: expected numbers within the range"):
        read_jsonl(path)


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    jsonl(path)(record())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    same(read_jsonl(path)[0], record())


def test_reading_a_log_executes_nothing(tmp_path: Path) -> None:
    """No code is compiled, run, imported or unpickled, whatever the file says."""
    path = tmp_path / "run.jsonl"
    for made in (record(), buckets(), not_finite()):
        jsonl(path)(dataclasses.replace(made, step=record().step))
    code = f"""
import sys
from grain_ddp.sinks._files import Log
path, loud = {str(path)!r}, []
list(Log(path).records())  # what Python imports when it is first used is there now
def heard(event, _):
    if event in ("exec", "compile", "import", "os.system", "subprocess.Popen", "pickle.find_class"):
        loud.append(event)
sys.addaudithook(heard)
list(Log(path).records())
print(loud)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "[]", out.stderr


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
    from grain_ddp.sinks._services import _summary_writer

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


@pytest.fixture
def tracking(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of MLflow."""
    logged: list[tuple[dict[str, float], int, str | None]] = []
    service = SimpleNamespace(
        active_run=lambda: None,
        log_metrics=lambda values, step, run_id: logged.append((values, step, run_id)),
        logged=logged,
    )
    monkeypatch.setitem(sys.modules, "mlflow", service)
    return service


def test_mlflow_gets_the_scalars(tracking: SimpleNamespace) -> None:
    mlflow("run 7")(record(4))
    ((values, step, run_id),) = tracking.logged
    assert (step, run_id) == (4, "run 7")
    assert values["grain/norm_mean"] == record(4).norm_mean
    with pytest.raises(RuntimeError, match="expected an active MLflow run"):
        mlflow()(record(4))


def test_mlflow_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its others need a database
    service.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with service.start_run() as active:
        pickle.loads(pickle.dumps(mlflow()))(record(4))
    (found,) = service.MlflowClient().get_metric_history(active.info.run_id, "grain/weight/1")
    assert (found.value, found.step) == (pytest.approx(1 / 3), 4)


class Meter:
    def __init__(self) -> None:
        self.values: dict[tuple[str, int | None], float] = {}

    def create_gauge(self, name: str) -> SimpleNamespace:
        def keep(value: float, attributes: dict[str, int] | None) -> None:
            self.values[name, (attributes or {}).get("group")] = value

        return SimpleNamespace(set=keep)


def test_opentelemetry_gets_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", ModuleType("opentelemetry"))
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", ModuleType("metrics"))
    meter = Meter()
    opentelemetry(meter)(record(4))
    assert meter.values["grain.step", None] == 4
    assert meter.values["grain.norm_mean", None] == record(4).norm_mean
    assert meter.values["grain.weight", 1] == pytest.approx(1 / 3)


def test_opentelemetry_takes_them() -> None:
    pytest.importorskip("opentelemetry")
    sdk, export = (
        pytest.importorskip(f"opentelemetry.sdk.metrics{name}") for name in ("", ".export")
    )
    reader = export.InMemoryMetricReader()
    opentelemetry(sdk.MeterProvider([reader]).get_meter("here"))(record(4))
    data = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    points = {metric.name: metric.data.data_points for metric in data}
    assert points["grain.norm_mean"][0].value == record(4).norm_mean
    assert {p.attributes["group"] for p in points["grain.cosine"]} == {0, 1, 2}


def test_the_noise_scale_is_smoothed() -> None:
    """tr Σ = 1000 and ‖G‖² = 100: of one step nobody can tell, of many within a tenth."""
    writer, rng = Writer(), np.random.default_rng(0)
    sink = tensorboard(writer)
    single, smooth = [], []
    for step in range(200):
        rows = 1 + np.sqrt(10) * rng.normal(size=(4, 100))
        made = dataclasses.replace(record(step, 4), gramian=rows @ rows.T)
        sink(made)
        single.append(made.noise_scale)
        smooth.append(writer.scalars["grain/noise_scale_smooth"][0])
    assert np.isinf(single).any()
    assert np.max(smooth[50:]) < 20
    assert np.median(smooth[50:]) == pytest.approx(10, rel=0.1)
    sink(not_finite())  # is left out, as is another number of groups


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("tensorboard", lambda: tensorboard("nowhere")),
        ("wandb", wandb),
        ("mlflow", mlflow),
        ("opentelemetry", opentelemetry),
    ],
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


def test_suspects_come_back_and_older_logs_have_none(tmp_path: Path) -> None:
    suspect = Suspect(7, 2, "node3", "cuda:1 (GPU-4f)", "nonfinite", "head.weight", math.inf, 2)
    line = line_of(dataclasses.replace(record(8), suspects=(suspect,)), "run")
    found = parse(line, "here")
    assert found is not None
    assert found[0].suspects == (suspect,)
    plain = line_of(record(8), "run")
    assert "suspects" not in plain
    parsed = parse(plain, "here")
    assert parsed is not None
    assert parsed[0].suspects == ()
    with pytest.raises(ValueError, match='field "suspects": expected a list of objects'):
        parse(line.replace('"rank": 2', '"rank": "two"'), "here")
