"""``grain-ddp`` and ``python -m grain_ddp``: what a user asks from the command line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 if it failed, 2 if it was called the wrong way."""
    parser = argparse.ArgumentParser(
        prog="grain-ddp", description="Look at the gradients of data-parallel training."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    report = commands.add_parser(
        "report",
        help="what the records of a run say, in words and as a picture",
        description="Read the records of a run, say what stands out, and draw them. "
        'A run writes them with GrainState(on_step=grain_ddp.sinks.jsonl("run.jsonl")); '
        'add weighting="mean" to watch plain averaging without changing it.',
    )
    report.add_argument("log", metavar="LOG", help="the file of records, such as run.jsonl")
    report.add_argument(
        "--out", metavar="FILE", help="where the picture goes (default: LOG with the ending .png)"
    )
    report.add_argument("--no-picture", action="store_true", help="words only")
    report.add_argument(
        "--batch",
        type=_positive,
        metavar="EXAMPLES",
        help="examples in one group's batch, to give the noise scale in examples",
    )
    report.set_defaults(run=_report)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine and installation support, with a test on two ranks",
        description="Show versions, devices and backends, and train a small model with two "
        "processes on this machine. The exit status is 1 if that fails.",
    )
    doctor.add_argument(
        "--timeout",
        type=_positive,
        default=120,
        metavar="SECONDS",
        help="how long each test may take (default: 120)",
    )
    doctor.set_defaults(run=_doctor)

    from grain_ddp._tools import bench, plan

    bench.arguments(
        commands.add_parser(
            "bench",
            help="what every scope costs on these machines, against plain DDP (under torchrun)",
            description="Train a small model with plain DDP, with a no-op hook and with each way "
            "to aggregate, in turns; print step times, and ratios to plain DDP.",
        )
    )
    plan.arguments(
        commands.add_parser(
            "plan",
            help="what aggregation will cost on a cluster, and which scope and groups to take",
            description="Time, bytes and memory of a training step by a model of latency and "
            "bandwidth, for a cluster's figures, a preset's, or those that bench measured.",
        )
    )

    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"grain_ddp: {error.filename}: {error.strerror}.", file=sys.stderr)
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
    return 1


def _report(options: argparse.Namespace) -> int:
    from grain_ddp._tools.report import Run, summary
    from grain_ddp.sinks import read_jsonl

    if not Path(options.log).exists():
        raise ValueError(
            f"grain_ddp: {options.log}: there is no such file. Give the one that "
            "GrainState(on_step=grain_ddp.sinks.jsonl(...)) writes, on the host of rank 0."
        )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = Run.of(read_jsonl(options.log))
    for warning in said:
        print(warning.message, file=sys.stderr)
    print(summary(run, options.batch))
    if options.no_picture:
        return 0
    from grain_ddp._tools.picture import draw

    out = Path(options.out or Path(options.log).with_suffix(".png"))
    draw(run, out, f"{options.log}: {len(run.finite)} records, {run.n} groups")
    print(f"\nPicture: {out}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from grain_ddp._tools.doctor import examine

    return 0 if examine(options.timeout) else 1


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, but found {text!r}"
        )
    return value


if __name__ == "__main__":
    sys.exit(main())
