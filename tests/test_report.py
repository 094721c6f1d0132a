"""grain-ddp report: what was planted in a run is named, and what was not is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook
from grain_ddp.report import Run, summary
from grain_ddp.sinks import jsonl, read_jsonl


def train(planted: str, weighting: str, path: str, steps: int = 60) -> None:
    """Digits on 4 ranks. "outlier": rank 2 has permuted labels. "conflict": ranks 0 and 1 want
    one labelling of the images, ranks 2 and 3 another one."""
    rank = dist.get_rank()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    draw = torch.Generator().manual_seed(1)
    if planted == "outlier" and rank == 2:
        y = y[torch.randperm(len(y), generator=draw)]
    if planted == "conflict" and rank >= 2:
        y = (y + 1) % 10
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    model = DistributedDataParallel(net)
    state = GrainState(weighting=weighting, on_step=jsonl(path))
    model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    draw = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        mine = torch.randint(len(x), (64,), generator=draw)
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
