"""What the records of a run say: `grain-ddp report`."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from grain_ddp._tools import output
from grain_ddp._tools.findings import findings, summary, verdict
from grain_ddp._tools.gather import Gathering
from grain_ddp._tools.history import Run
from grain_ddp._tools.page import page
from grain_ddp._tools.quantities import whole
from grain_ddp.sinks._files import Log, chosen

PAUSE = 5
"""Seconds between two looks at a log that grows."""

LONG = 20_000_000
"""Bytes of a log from which on progress is shown."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "logs", nargs="+", metavar="LOG", help="the file of records, such as run.jsonl; or two"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page (.html) or picture (.png, .svg, .pdf) to write (default: LOG with the "
        "ending .html, and .png if matplotlib is installed)",
    )
    parser.add_argument("--no-picture", action="store_true", help="words only: write no file")
    parser.add_argument(
        "--batch",
        type=whole(),
        metavar="EXAMPLES",
        help="examples in one group's batch, to give the noise scale in examples",
    )
    parser.add_argument(
        "--run",
        type=whole(),
        metavar="N",
        help="which run, from 1, if several wrote to the file (default: the last)",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="keep the page current while the run goes on; open it once, and end with Ctrl-C",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an output that grain_ddp did not make"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """The command."""
    if len(options.logs) > 2:
        raise ValueError(
            f"grain_ddp: report takes one log, or two to compare, but found {len(options.logs)}."
        )
    for log in options.logs:
        if not Path(log).exists():
            raise ValueError(
                f"grain_ddp: {log}: there is no such file. Give the one that "
                "GrainState(on_step=grain_ddp.sinks.jsonl(...)) writes, on the host of rank 0."
            )
        if Path(log).is_dir():
            raise ValueError(
                f"grain_ddp: {log}: expected a log, but found a folder. Give its file."
            )
    outputs = [output.check(p, options.force, tuple(options.logs)) for p in _outputs(options)]
    readers = [Reader(log) for log in options.logs]
    if options.follow:
        return _follow(options, readers, outputs)
    runs: dict[str, Run] = {}
    for reader in readers:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reader.read()
            runs[_name(reader, runs)] = reader.run(options.run)
        for warning in said:
            print(warning.message, file=sys.stderr)
    for name, found in runs.items():
        print(
            f"{name}\n" * (len(runs) > 1) + summary(found, options.batch) + "\n" * (len(runs) > 1)
        )
    if not options.out and not all(len(found.steps) for found in runs.values()):
        outputs = [path for path in outputs if _kind(path) == "Page"]  # there is nothing to draw
    _write(options, runs, outputs)
    for path in outputs:
        print(f"\n{_kind(path)}: {path}", end="")
    print("\n" * bool(outputs), end="")
    return 0


class Reader:
    """A log and the runs in it, as far as they are written."""

    def __init__(self, path: str) -> None:
        self.path, self.log = path, Log(path)
        self.runs: list[Gathering] = []

    def read(self, growing: bool = False) -> None:
        with _progress(self.path) as progress:
            for number, record in self.log.records(growing, progress):
                if number == len(self.runs):
                    self.runs.append(Gathering())
                self.runs[number].add(record)

    def run(self, number: int | None) -> Run:
        self.log.check()
        return self.runs[chosen(self.path, len(self.runs), number, "--run ")].run()


@contextmanager
def _progress(path: str) -> Iterator[Callable[[int], object] | None]:
    """Of reading a long file, on a terminal."""
    size, shown = os.path.getsize(path), LONG // 10
    if size < LONG or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return

    def show(read: int) -> None:
        nonlocal shown
        if read >= shown:
            shown = read + size // 100
            said = f"\rReading {path}: {100 * read / size:.0f} %"
            print(said, end="", file=sys.stderr, flush=True)

    yield show
    print("\r\033[K", end="", file=sys.stderr, flush=True)


def _outputs(options: argparse.Namespace) -> list[Path]:
    if options.no_picture:
        return []
    if options.out:
        path = Path(options.out)
        if path.suffix.lower() not in (".html", ".htm"):
            output.canvas(path, (1, 1))  # an error now, and not after the work
            if len(options.logs) > 1 or options.follow:
                raise ValueError(
                    f"grain_ddp: {path}: a comparison and --follow need a page, ending in .html."
                )
        return [path]
    log = Path(options.logs[0])
    pages = [log.with_suffix(".html")]
    if len(options.logs) == 1 and not options.follow:
        try:
            output.canvas("run.png", (1, 1))
            pages.append(log.with_suffix(".png"))
        except ModuleNotFoundError:
            print(
                "grain_ddp: no .png, which needs matplotlib: pip install 'grain-ddp[plot]'.",
                file=sys.stderr,
            )
    return pages


def _kind(path: Path) -> str:
    return "Page" if path.suffix.lower() in (".html", ".htm") else "Picture"


def _write(
    options: argparse.Namespace,
    runs: dict[str, Run],
    outputs: list[Path],
    refresh: int | None = None,
) -> None:
    for path in outputs:
        if _kind(path) == "Page":
            output.write(path, page(runs, options.batch, refresh))
        else:
            from grain_ddp._tools.picture import draw

            ((name, found),) = runs.items()
            draw(found, path, f"{name}: {len(found.steps)} records, {found.n} groups")


def _name(reader: Reader, others: dict[str, Run]) -> str:
    """What the run is called: the file's name, with its folder if another one has the same."""
    name = Path(reader.path).name
    return name if name not in others else str(reader.path) + " " * (reader.path in others)


def _follow(options: argparse.Namespace, readers: list[Reader], outputs: list[Path]) -> int:
    """Words and page at every change, until Ctrl-C."""
    print("Following. Ctrl-C ends it.", flush=True)
    runs: dict[str, Run] = {}
    try:
        while True:
            before = [reader.log.read for reader in readers]
            for reader in readers:
                reader.read(growing=True)
            if all(r.runs for r in readers) and before != [r.log.read for r in readers]:
                runs = {}
                for reader in readers:
                    which = options.run or len(reader.runs)
                    runs[_name(reader, runs)] = reader.run(which)
                _write(options, runs, outputs, PAUSE)
                for name, found in runs.items():
                    words = verdict(found, list(findings(found, options.batch)))[1]
                    print(f"{name}, step {found.last}: {words}.", flush=True)
                for path in outputs * (not any(before)):
                    print(f"Page: {path}", flush=True)
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        if runs:
            _write(options, runs, outputs)  # which the browser need not ask for again
        print()
        return 0
