"""grain-ddp report: what was planted in a run is named, and what was not is not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, Status, StepRecord, grain_hook
from grain_ddp._math.weighting import weigh
from grain_ddp._tools.picture import draw
from grain_ddp._tools.report import Run, findings, summary
from grain_ddp.sinks import jsonl, read_jsonl


def train(planted: str, weighting: str, path: str, steps: int = 60) -> None:
    """Digits on 4 ranks. "outlier": rank 2 has permuted labels. "conflict": ranks 0 and 1 want
    one labelling of the images, ranks 2 and 3 another one."""
    rank = dist.get_rank()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(1)
    if planted == "outlier" and rank == 2:
        y = y[torch.randperm(len(y), generator=generator)]
    if planted == "conflict" and rank >= 2:
        y = (y + 1) % 10
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    model = DistributedDataParallel(net)
    state = GrainState(weighting=weighting, on_step=jsonl(path))
    model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        mine = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()


def report(planted: str, weighting: str, folder: Path) -> str:
    path = folder / "run.jsonl"
    run(4, train, planted, weighting, str(path))
    return summary(Run.of(read_jsonl(path)), batch=64)


@pytest.mark.parametrize("weighting", ["mean", "min_norm"])
def test_an_outlier_is_named_and_nobody_else(weighting: str, tmp_path: Path) -> None:
    text = report("outlier", weighting, tmp_path)
    assert re.findall(r"Group (\d) is an outlier", text) == ["2"]


@pytest.mark.parametrize("weighting", ["mean", "min_norm"])
def test_a_conflict_is_named_by_its_pairs(weighting: str, tmp_path: Path) -> None:
    text = report("conflict", weighting, tmp_path)
    (line,) = [line for line in text.splitlines() if "pull against each other" in line]
    assert set(re.findall(r"(\d) and (\d) \(", line)) == {(a, b) for a in "01" for b in "23"}
    assert "outlier" not in text


def test_a_run_without_trouble_names_nobody(tmp_path: Path) -> None:
    text = report("nothing", "mean", tmp_path)
    assert "outlier" not in text
    assert "pull against each other" not in text
    assert "GRAIN was watching only" in text
    assert "GRAIN would have opposed none" in text or "never pointed against" in text


def records_of(rows: np.ndarray, **changes: Any) -> list[StepRecord]:
    """Records of plain averaging from gradients [T, n, d]."""
    n = rows.shape[1]
    made = [
        StepRecord(k, g @ g.T, np.full(n, 1 / n), 0.0, "mean", tuple(range(n)), ())
        for k, g in enumerate(rows)
    ]
    return [dataclasses.replace(record, **changes) for record in made]


def gradients(steps: int = 40, n: int = 4, seed: int = 0) -> np.ndarray:
    return 0.5 + np.random.default_rng(seed).normal(size=(steps, n, 20))


def words(records: list[StepRecord], batch: int | None = None) -> str:
    return summary(Run.of(records), batch)


def test_groups_alike_are_never_outliers() -> None:
    for seed in range(100):
        rows = gradients(30, 2 + seed % 7, seed)
        run = Run.of(records_of(rows))
        assert run.outliers == []
        assert run.opposed_pairs == []
        assert "times as" not in "".join(f for f in findings(run) if f.startswith("Group "))


def test_two_outliers_of_eight_are_both_found() -> None:
    rows = gradients(n=8)
    rows[:, [1, 6]] -= 0.5  # they know nothing of the direction that the others share
    assert Run.of(records_of(rows)).outliers == [1, 6]


def test_a_long_gradient_is_named() -> None:
    rows = gradients()
    rows[:, 3] *= 8
    text = words(records_of(rows))
    (times,) = re.findall(r"Group 3's gradient is (\S+) times as long", text)
    assert float(times) == pytest.approx(8, rel=0.1)


def test_what_grain_would_have_done_is_what_it_does() -> None:
    """The same gradients, watched and aggregated."""
    rows = gradients()
    watched = Run.of(records_of(rows))
    done = [StepRecord(k, **vars(weigh(g @ g.T, "min_norm"))) for k, g in enumerate(rows)]
    for would, did in zip(watched.grain, done, strict=True):
        np.testing.assert_array_equal(would.weights, did.weights)
    assert not watched.min_norm
    assert Run.of(done).min_norm


def test_noise_scale_is_in_examples_and_judged() -> None:
    rng = np.random.default_rng(0)
    for noise, verdict in ((10.0, "Most of the step is noise"), (0.1, "larger than it needs")):
        # tr Σ = 100 · noise and ‖G‖² = 100
        rows = 1 + np.sqrt(noise) * rng.normal(size=(300, 4, 100))
        run = Run.of(records_of(rows))
        assert run.noise_scale(slice(None)) == pytest.approx(noise, rel=0.1)
        text = words(run.records, batch=32)
        assert verdict in text
        (examples,) = re.findall(r"\(32 examples\), (\S+) examples", text)
        assert float(examples) == pytest.approx(32 * noise, rel=0.2)


def test_what_went_wrong_is_told() -> None:
    records = records_of(gradients(20))
    broken = records[3].gramian.copy()
    broken[1] = broken[:, 1] = np.nan
    records[3] = dataclasses.replace(
        records[3], gramian=broken, dropped=(1,), status=Status.NOT_FINITE
    )
    zero = records[5].gramian.copy()
    zero[2] = zero[:, 2] = 0
    records[5] = dataclasses.replace(records[5], gramian=zero)
    records[6] = dataclasses.replace(records[6], status="zero gradient: nothing to do")
    text = words(records)
    assert "those of GRAIN and the mean." in text  # record 6 is not one of averaging
    assert "1 of 20 records have a gradient with NaN or inf" in text
    assert "Group 1 was dropped in 1 of 20 records" in text
    assert "Group 2 had a gradient of exactly zero in 1 of 20 records" in text
    assert 'In 1 of 20 records the status was "zero gradient: nothing to do"' in text


def test_a_watched_run_stays_one_when_a_gradient_is_not_finite() -> None:
    records = records_of(gradients(20))
    records[3] = dataclasses.replace(
        records[3], gramian=np.full((4, 4), np.nan), status=Status.NOT_FINITE
    )
    run = Run.of(records)
    assert not run.min_norm
    assert "those of the mean; GRAIN was watching only" in summary(run)


def test_another_number_of_groups_starts_anew() -> None:
    records = records_of(gradients(5, 3)) + [
        dataclasses.replace(r, step=r.step + 5) for r in records_of(gradients(20, 4))
    ]
    text = words(records)
    assert text.startswith("20 records, steps 5 to 24, 4 groups")
    assert "the 5 records before step 5" in text


@pytest.mark.parametrize("kind", ["one group", "one record", "all NaN", "all zero", "buckets"])
def test_odd_logs_make_words_and_a_picture(kind: str, tmp_path: Path) -> None:
    rows = gradients(1 if kind == "one record" else 20, 1 if kind == "one group" else 3)
    records = records_of(rows * (0 if kind == "all zero" else 1))
    if kind == "all NaN":
        records = [dataclasses.replace(r, gramian=r.gramian * np.nan) for r in records]
    if kind == "buckets":
        records = [
            dataclasses.replace(
                r,
                gramian=np.stack([r.gramian] * 2),
                weights=np.stack([r.weights] * 2),
                gap=np.zeros(2),
                status=("mean", "mean"),
                active=((0, 1, 2),) * 2,
                dropped=((), ()),
            )
            for r in records
        ]
    assert "What stands out\n- " in words(records)
    if kind == "all NaN":
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(Run.of(records), tmp_path / "run.png")
    else:
        draw(Run.of(records), tmp_path / "run.png")
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
