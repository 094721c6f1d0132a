"""The benchmark runs under a launcher, its figures reach the plan, and it says what it lacks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run
from torch.distributed.run import get_args_parser

from grain_ddp.__main__ import main
from grain_ddp._tools import bench, measure, trial
from grain_ddp._tools.network import Cluster


def test_it_runs_and_the_plan_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "grain_ddp", "bench", "--quick", "--backend", "gloo"]
    result = subprocess.run(
        [*command, "--json", str(out), "--out", str(picture)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 ranks on 1 host, ")  # rank 0 alone speaks
    assert result.stdout.count("| plain DDP |") == 1
    assert "Its ratios mean nothing" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    rows = {row["variant"]: row for row in found["steps"]}
    assert list(rows)[:3] == ["plain DDP", "no-op hook", "GRAIN, global"]
    assert {"GRAIN, bucket, bf16 on the wire", "monitor, every 10 steps"} <= set(rows)
    assert rows["plain DDP"]["ratio"] == 1
    for row in rows.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert 0 < row["seconds"] < 60
    cluster = Cluster.of(found["cluster"])
    assert cluster.far is None
    assert cluster.near is not None
    assert 1e-7 < cluster.near.latency < 1
    assert 1e6 < cluster.near.bandwidth < 1e12
    assert all(
        1e7 < speed < 1e13 for speed in (cluster.gramian, cluster.weighted_sum, cluster.copy)
    )

    assert main(["plan", "--from", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 ranks on 1 host" in said
    assert main(["plan", "--from", str(out), "--gpus", "8"]) == 1
    assert "none was measured. Give its speed with --link" in capsys.readouterr().err
    assert main(["plan", "--from", str(out), "--gpus", "8", "--link", "10Gbit/s"]) == 0


def clocked() -> float:
    """Rank 1 is slower to arrive, and not counted as slow."""
    import time

    if dist.get_rank():
        time.sleep(0.5)
    return trial.clock(lambda: None, torch.device("cpu"), 10)


def test_a_clock_starts_when_all_are_there() -> None:
    assert max(run(2, clocked)) < 0.04


def places(names: list[str]) -> list[list[int]]:
    os.environ["GROUP_RANK"] = names[dist.get_rank()]
    return measure.hosts()


def test_hosts() -> None:
    assert run(3, places, ["0", "1", "0"]) == [[[0, 2], [1]]] * 3
    assert run(2, places, ["0", "0"]) == [[[0, 1]]] * 2


def cluster_of(names: list[str]) -> Any:
    os.environ["GROUP_RANK"] = names[dist.get_rank()]
    return measure.measure_cluster(torch.device("cpu"))


def test_links_inside_and_between_hosts() -> None:
    every = run(4, cluster_of, ["0", "0", "1", "1"])
    assert every[0] == every[1] == every[2] == every[3]
    assert every[0].per_host == 2
    assert every[0].near is not None
    assert every[0].far is not None


def unequal() -> str:
    with pytest.raises(ValueError, match="as many ranks on every host") as raised:
        cluster_of(["0", "0", "1"])
    return str(raised.value)


def test_unequal_hosts_are_told() -> None:
    assert all("[2, 1]" in said for said in run(3, unequal))


def test_variants() -> None:
    found = trial.variants(["global"], ["rank", "node", 4], ["own", "fp16"], [1, 5])
    assert list(found) == [
        "plain DDP",
        "no-op hook",
        "GRAIN, global",
        "GRAIN, global, fp16 on the wire",
        "GRAIN, global, groups of node",
        "GRAIN, global, groups of node, fp16 on the wire",
        "GRAIN, global, groups of 4",
        "GRAIN, global, groups of 4, fp16 on the wire",
        "monitor, every step",
        "monitor, every 5 steps",
    ]
    options = found["GRAIN, global, groups of 4, fp16 on the wire"]
    assert options == {"scope": "global", "groups": 4, "wire_dtype": torch.float16}


@pytest.mark.parametrize("layers", [1, 3])
def test_the_model_has_the_size_asked_for(layers: int) -> None:
    size = sum(p.numel() for p in trial.network(1e5, layers).parameters())
    assert size == pytest.approx(1e5, rel=0.02)


@pytest.fixture
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("not_launched")
@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ([], 1, "Start it with a launcher: torchrun --nproc_per_node=4 -m grain_ddp bench"),
        (["--rounds", "0"], 2, "expected a whole number of at least 1"),
        (["--record-every", "3", "0"], 2, "expected a whole number of at least 1"),
        (["--groups", "hosts"], 2, "expected rank, node or a number, but found 'hosts'"),
        (["--parameters", "big"], 2, "such as 7B"),
        (["--out", "bench.foo"], 1, "expected a picture's name"),
        (["--json", "missing/bench.json"], 1, "missing is not a folder"),
        (["--json", "/"], 1, "it is a folder"),
    ],
)
def test_errors_are_sentences(
    arguments: list[str], status: int, expected: str, refuses: Callable[[list[str], int, str], None]
) -> None:
    refuses(["bench", *arguments], status, expected)


@pytest.mark.usefixtures("not_launched")
def test_a_rank_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="local rank 1 has no GPU of its own: there are 1"):
        bench._start("nccl")


@pytest.mark.usefixtures("not_launched")
@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_mpiexec_starts_it_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    mpi = ModuleType("grain_ddp.mpi")
    mpi.init_process_group = asked.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grain_ddp.mpi", mpi)
    monkeypatch.setenv(name, "0")
    assert bench._start("gloo") == torch.device("cpu")
    assert asked == ["gloo"]


def test_numbers_of_a_group() -> None:
    assert bench._group("16") == 16
    for wrong in ("0", "-2", "hosts"):
        with pytest.raises(argparse.ArgumentTypeError):
            bench._group(wrong)


def test_a_round_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down between rounds changes times, and no ratio."""
    times = iter([9, 9, 9, 1, 2, 3, 60, 40, 20, 100, 200, 300])

    class Trial:
        def __init__(self, name: str, options: Any, net: Any, *_: Any) -> None:
            self.name, self.options, self.model, self.state = name, options, net, None
            self.times: list[float] = []

        def block(self, x: Any, y: Any, steps: int) -> float:
            return next(times)

    monkeypatch.setattr(trial, "Trial", Trial)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    contest = {"plain DDP": None, "no-op hook": None, "other": {}}
    rows = trial.compare(100, 1, 2, 3, 1, contest, torch.device("cpu"))
    found = {row["variant"]: (row["seconds"], row["ratio"], row["quartiles"]) for row in rows}
    # Rounds 1 and 3 go forwards, round 2 backwards.
    assert found["other"] == (60, 3, [3, 3])
    assert found["no-op hook"] == (40, 2, [2, 2])
    assert np.isclose(found["plain DDP"][0], 20)


def test_torchrun_takes_no_option_of_bench_for_its_own() -> None:
    """Its parser looks for abbreviations behind the program's name too, and ends if two fit."""
    parser = argparse.ArgumentParser()
    bench.arguments(parser)
    options = [word for action in parser._actions for word in action.option_strings]
    assert "--record-every" in options
    given = ["-m", "grain_ddp", "bench", *options]
    assert get_args_parser().parse_args(given).training_script_args == given[2:]
