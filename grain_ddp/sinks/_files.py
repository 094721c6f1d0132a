"""A run's log: one JSON object per line."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from grain_ddp._math.record import StepRecord
from grain_ddp.sinks._schema import line_of, parse
from grain_ddp.sinks._services import Sink, writes


def jsonl(path: str | Path) -> Sink:
    """Append each record to a file, one JSON object per line; `read_jsonl` gives them back.

    Missing folders are made. Every line is complete on disk before training goes on. A file that
    exists is continued, so that a resumed run has one log. A line holds n² numbers of about 20
    bytes (times the buckets with ``scope="bucket"``): with many groups, raise `record_every`.

    A line that cannot be written (a full disk) is a warning, not the end of the training.

    Raises:
        OSError: the file cannot be opened for writing; from here, not during the training.
    """
    path = Path(path).absolute()  # absolute: also when the program changes its folder
    if writes():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    return partial(_append, path, uuid.uuid4().hex[:8])


def _append(path: Path, run: str, record: StepRecord) -> None:
    if not writes():
        return
    line = line_of(record, run).encode()
    try:
        # One write for a line, so that another run with this file does not come in between.
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line  # the one before was broken off
            if file.write(line) < len(line):
                raise OSError(0, "the disk took a part of it only")
    except OSError as error:
        warnings.warn(
            f"grain_ddp: step {record.step} is missing in {path}: {error.strerror}. The training "
            "goes on.",
            stacklevel=2,
        )


class Log:
    """The records of a file, as far as they are written; it may be asked again later for more."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.broken: list[int] = []  # lines that were left out
        self.read = self.lines = 0  # bytes and lines so far
        self._runs: list[tuple[int, str | None]] = []  # first step, and who wrote last
        self._run_of: dict[str | None, int] = {}

    def records(
        self, growing: bool = False, progress: Callable[[int], object] | None = None
    ) -> Iterator[tuple[int, StepRecord]]:
        """Each record with the number of its run in this file, from 0.

        A run that goes on after a restart is the same one: its records follow on the earlier ones,
        and replace those of the steps that it runs again.

        Args:
            growing: wait for the rest of a line without an end, and do not call it broken.
            progress: called with the bytes read so far.

        Raises:
            OSError: there is no such file.
            ValueError: a line is something else than a record, or the file was cut.
        """
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.read:
                raise ValueError(f"grain_ddp: {self.path} is shorter than it was. Start anew.")
            file.seek(self.read)
            for line in file:
                if growing and not line.endswith(b"\n"):
                    return
                if not self.lines:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
                self.read, self.lines = file.tell(), self.lines + 1
                if progress:
                    progress(self.read)
                if line.isspace():
                    continue
                found = parse(line.decode("utf-8", "replace"), f"{self.path}, line {self.lines}")
                if found is None:
                    self.broken.append(self.lines)
                else:
                    record, name = found
                    yield self._run(record.step, name), record

    def _run(self, step: int, name: str | None) -> int:
        """Of two runs at the same time each line has its own; one after another is told by step."""
        run = self._run_of.get(name, len(self._runs) - 1)
        fresh = run < 0 or step <= self._runs[run][0]
        taken_over = name in self._run_of and self._runs[run][1] != name  # and yet goes on
        if fresh or taken_over:
            run = len(self._runs)
            self._runs.append((step, name))
        self._runs[run] = self._runs[run][0], name
        self._run_of[name] = run
        return run

    def check(self) -> None:
        """ValueError if there was no record; a warning about lines that were left out."""
        if not self._runs:
            raise ValueError(
                f"grain_ddp: {self.path} has no records. Expected one JSON object per line, as "
                "grain_ddp.sinks.jsonl writes them; give that file, or train at least one step "
                'with GrainState(on_step=jsonl("run.jsonl")).'
            )
        if self.broken:
            shown = ", ".join(map(str, self.broken[:10])) + (
                f" and {len(self.broken) - 10} more" if len(self.broken) > 10 else ""
            )
            where = "line" if len(self.broken) == 1 else "lines"
            warnings.warn(
                f"grain_ddp: {self.path}: left out {where} {shown}, which the run did not finish "
                "writing.",
                stacklevel=2,
            )


def read_jsonl(path: str | Path, run: int | None = None) -> list[StepRecord]:
    """The records of a file that `jsonl` wrote, in the order of their steps.

    Steps that were run again, by a run that was resumed, count once: the later ones. Lines that are
    incomplete, because the run was broken off while it wrote them, are left out with a warning.

    Args:
        path: the file.
        run: which run, counted from 1, where several wrote to the file: started anew, or at the
            same time. None: the last one, with a warning if there are others.

    Raises:
        OSError: there is no such file.
        ValueError: a line is something else than a record, or there is no record, or no such run.
    """
    log, runs = Log(path), list[list[StepRecord]]()
    for number, record in log.records():
        if number == len(runs):
            runs.append([])
        records = runs[number]
        while records and records[-1].step >= record.step:
            records.pop()
        records.append(record)
    log.check()
    return runs[chosen(path, len(runs), run)]


def chosen(path: str | Path, runs: int, run: int | None, how: str = "run=") -> int:
    """The index of the run that is asked for; a warning if the last one is taken of several."""
    if run is not None and not 1 <= run <= runs:
        raise ValueError(f"grain_ddp: {path} has the runs 1 to {runs}, but {run} was asked for.")
    if run is None and runs > 1:
        warnings.warn(
            f"grain_ddp: {runs} runs wrote to {path}. This is the one that started last; ask for "
            f"another by {how}1 to {how}{runs}.",
            stacklevel=3,
        )
    return (run or runs) - 1
