"""The command line, as a new user meets it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import grain_ddp
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
    assert f"Page: {tmp_path / 'run.html'}" in said
    assert f"Picture: {tmp_path / 'run.png'}" in said
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(path), "--out", str(tmp_path / "other.svg")]) == 0
    assert "<svg" in (tmp_path / "other.svg").read_text()
    assert main(["report", str(path), "--out", str(tmp_path / "other.html")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("other.html", "other.svg", "run.html", "run.jsonl", "run.png")
    ]


@pytest.mark.parametrize(
    ("out", "expected"),
    [("run.foo", "expected a picture's name"), ("missing/run.png", "missing is not a folder")],
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
    path = str(log_of(tmp_path / "run.jsonl"))
    assert main(["report", path]) == 0
    out, err = capsys.readouterr()
    assert "What stands out" in out
    assert "pip install 'grain-ddp[plot]'" in err
    assert (tmp_path / "run.html").exists()
    assert not (tmp_path / "run.png").exists()
    assert main(["report", path, "--out", str(tmp_path / "run.png")]) == 1  # it was asked for


def test_somebody_elses_file_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page, picture = (tmp_path / f"run.{ending}" for ending in ("jsonl", "html", "png"))
    log_of(path)
    for _ in range(2):  # our own are
        assert main(["report", str(path)]) == 0
    picture.write_bytes(b"a picture of mine")
    assert main(["report", str(path)]) == 1
    assert (
        f"{picture} cannot be written: it exists, and grain_ddp did not" in capsys.readouterr().err
    )
    assert picture.read_bytes() == b"a picture of mine"
    assert main(["report", str(path), "--force"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")

    mine = tmp_path / "mine"
    mine.write_text("<html>grain_ddp</html>")
    page.unlink()
    page.symlink_to(mine)
    assert main(["report", str(path)]) == 1
    assert "symbolic link, which is not followed" in capsys.readouterr().err
    assert main(["report", str(path), "--force"]) == 0
    assert mine.read_text() == "<html>grain_ddp</html>"
    assert not page.is_symlink()


@pytest.mark.parametrize("name", ["r.png", "r.html"])
def test_a_log_is_not_overwritten_by_its_picture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log_of(tmp_path / name)
    before = path.read_bytes()
    for more in ([], ["--force"]):
        assert main(["report", str(path), *more]) == 1
        assert "it is what the command reads" in capsys.readouterr().err
        assert path.read_bytes() == before


@pytest.mark.parametrize("name", [b"a$b$c.jsonl", b"\xff\xfe.jsonl", "größe.jsonl".encode()])
def test_any_name_of_a_file(name: bytes, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    log_of(path)
    result = command("report", str(path), LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    assert result.stdout.isascii()
    assert b"Picture: " in result.stdout
    assert path.with_suffix(".html").read_text(encoding="utf-8").startswith("<!doctype")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "grain_ddp", *arguments],
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_output_in_ascii() -> None:
    result = command("plan", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert b"| 380 us |" in result.stdout


@pytest.mark.parametrize("name", ["report", "plan"])
def test_a_full_disk_and_a_closed_output_are_told(name: str, tmp_path: Path) -> None:
    log = [str(log_of(tmp_path / "run.jsonl")), "--no-picture"] if name == "report" else []
    for where, expected in (
        (">/dev/full", "grain_ddp: the output cannot be written: No space left on device."),
        (">&-", "grain_ddp: the standard output is closed: there is nowhere to write."),
    ):
        result = subprocess.run(
            f"exec {shlex.join([sys.executable, '-m', 'grain_ddp', name, *log])} {where}",
            shell=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (result.returncode, result.stderr.strip()) == (1, expected)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"grain_ddp {grain_ddp.__version__}\n"


def test_ctrl_c_is_not_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(timeout: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "grain_ddp: interrupted.\n"


def test_follow_keeps_the_page_current_until_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on while the report sleeps."""
    path = tmp_path / "run.jsonl"
    path.write_text("")
    lines = log_of(tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    written = iter([lines[0][:50], lines[0][50:], "".join(lines[1:]), ""])
    pages = []

    def sleep(seconds: float) -> None:
        page = path.with_suffix(".html")
        pages.append(page.read_text() if page.exists() else "")
        text = next(written)
        if not text:
            raise KeyboardInterrupt
        with path.open("a") as file:
            file.write(text)

    monkeypatch.setattr("time.sleep", sleep)
    assert main(["report", str(path), "--follow"]) == 0
    assert pages[:2] == ["", ""]
    assert "Too early to tell: 1 record of 10" in pages[2]
    assert "12 records, steps 0 to 11" in pages[3]
    assert 'http-equiv="refresh"' in pages[3]
    assert "refresh" not in path.with_suffix(".html").read_text()  # of a run that has ended
    out = capsys.readouterr().out
    assert "run.jsonl, step 0: Too early to tell" in out
    assert "run.jsonl, step 11: " in out


def test_two_logs_are_compared_and_two_runs_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = log_of(tmp_path / "a.jsonl"), log_of(tmp_path / "b.jsonl")
    assert main(["report", str(one), str(other)]) == 0
    out = capsys.readouterr().out
    assert out.count("Verdict: ") == 2
    assert out.startswith("a.jsonl\n12 records")
    assert "<h1>a.jsonl and b.jsonl</h1>" in (tmp_path / "a.html").read_text()
    assert main(["report", str(one), str(one)]) == 0
    assert main(["report", str(one), str(one), str(one)]) == 1
    assert "one log, or two to compare, but found 3" in capsys.readouterr().err

    log_of(one)  # another run with the same file
    assert main(["report", str(one)]) == 0
    assert "2 runs wrote to" in capsys.readouterr().err
    assert main(["report", str(one), "--run", "1"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["report", str(one), "--run", "3"]) == 1
    assert "has the runs 1 to 2, but 3 was asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ([], 2, "COMMAND"),
        (["reprot"], 2, "invalid choice"),
        (["report"], 2, "LOG"),
        (["report", "no.jsonl"], 1, "no.jsonl: there is no such file"),
        (["report", "."], 1, "expected a log, but found a folder"),
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


def test_a_run_of_nothing_finite_has_words_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log_of(tmp_path / "run.jsonl")
    path.write_text(re.sub(r"\[\[[\d.]+", "[[1e400", path.read_text()))
    assert main(["report", str(path)]) == 0
    assert "100 % of the records have NaN or inf" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.html", "run.jsonl"]


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
    assert re.search("2 ranks, gloo: +passed: ", result.stdout)


def test_doctor_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not this one')")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.remove(''); from grain_ddp.__main__ import main; "
            "sys.exit(main(['doctor']))",
        ],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(grain_ddp.__file__).parents[1])},
    )
    assert result.returncode == 0, result.stdout + result.stderr


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
