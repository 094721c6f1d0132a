"""The command line, as a new user meets it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grain_ddp import StepRecord
from grain_ddp.__main__ import main
from grain_ddp._tools import doctor
from grain_ddp.sinks import jsonl


def log_of(path: Path) -> Path:
    sink = jsonl(path)
    for step in range(12):
        rows = np.random.default_rng(step).normal(size=(3, 5)) + 0.3
        sink(StepRecord(step, rows @ rows.T, np.full(3, 1 / 3), 0.1, "mean", (0, 1, 2), ()))
    return path


def test_report_says_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log_of(tmp_path / "run.jsonl")
    assert main(["report", str(path), "--batch", "32"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("12 records, steps 0 to 11, 3 groups.")
    assert "32 examples" in said
    assert f"Picture: {tmp_path / 'run.png'}" in said
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(path), "--out", str(tmp_path / "other.svg")]) == 0
    assert "<svg" in (tmp_path / "other.svg").read_text()


@pytest.mark.parametrize(
    ("out", "expected"),
    [("run.foo", "expected a picture's name"), ("missing/run.png", "No such file")],
)
def test_a_picture_that_cannot_be_written(
    out: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log_of(tmp_path / "run.jsonl")
    assert main(["report", str(path), "--out", str(tmp_path / out)]) == 1
    assert expected in capsys.readouterr().err


def test_report_tells_of_a_broken_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log_of(tmp_path / "run.jsonl")
    path.write_text(path.read_text()[:-9])
    assert main(["report", str(path), "--no-picture"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("11 records")
    assert "left out line 12" in err
    assert not (tmp_path / "run.png").exists()


def test_without_matplotlib_the_words_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(log_of(tmp_path / "run.jsonl"))]) == 1
    out, err = capsys.readouterr()
    assert "What stands out" in out
    assert "pip install 'grain-ddp[plot]'" in err


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ([], 2, "COMMAND"),
        (["reprot"], 2, "invalid choice"),
        (["report"], 2, "LOG"),
        (["report", "no.jsonl"], 1, "no.jsonl: there is no such file"),
        (["report", "no.jsonl", "--batch", "0"], 2, "expected a whole number of at least 1"),
        (["doctor", "--timeout", "soon"], 2, "found 'soon'"),
    ],
)
def test_errors_are_sentences(
    arguments: list[str],
    status: int,
    expected: str,
    refuses: Callable[[list[str], int, str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(arguments, status, expected)


def test_a_reader_may_leave(tmp_path: Path) -> None:
    path = log_of(tmp_path / "run.jsonl")
    command = f"{sys.executable} -m grain_ddp report {path} --no-picture | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert result.stderr == ""


@pytest.mark.parametrize("command", [[], ["report"], ["doctor"], ["bench"], ["plan"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(['grain-ddp', *command])} ")


def test_doctor_passes_here() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "grain_ddp", "doctor"], capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 ranks, gloo:  passed: " in result.stdout


def test_doctor_tells_what_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-device")
    assert not doctor.examine(60)
    said = capsys.readouterr().out
    assert "FAILED on rank" in said
    assert "no-such-device" in said


def test_doctor_does_not_wait_longer_than_it_may(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not doctor.examine(0.1)
    assert "FAILED: no answer within 0.1 s" in capsys.readouterr().out
