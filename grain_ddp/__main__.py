"""``grain-ddp`` and ``python -m grain_ddp``: what a user asks from the command line."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import sys
from collections.abc import Sequence

_PLAIN = {"µ": "u", "–": "-", "−": "-", "…": "...", "²": "2", "×": "x", "✓": "ok"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 if it failed, 2 if it was called the wrong way."""
    if sys.stdout is None:
        print(
            "grain_ddp: the standard output is closed: there is nowhere to write.", file=sys.stderr
        )
        return 1
    _write_anything()
    try:
        options = _parser().parse_args(arguments)
        status = int(options.command(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        status, said = 130, "grain_ddp: interrupted."  # 128 + SIGINT, as shells have it
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        status, said = 1, ""
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename else "the output cannot be written"
        status, said = 1, f"grain_ddp: {where}: {error.strerror or error}."
    except (ValueError, ImportError) as error:
        status, said = 1, str(error)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more when it ends, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if said:
        print(said, file=sys.stderr)
    return status


def _write_anything() -> None:
    """What an output's encoding lacks, or a file's name that is no text, is written otherwise."""

    def otherwise(error: UnicodeError) -> tuple[str | bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        found = error.object[error.start : error.end]
        said = "".join(_PLAIN.get(c) or ascii(c)[1:-1] for c in found)
        return said, error.end

    codecs.register_error("grain_ddp", otherwise)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="grain_ddp")


def _parser() -> argparse.ArgumentParser:
    from grain_ddp import __version__
    from grain_ddp._tools import bench, plan, report

    parser = argparse.ArgumentParser(
        prog="grain-ddp", description="Look at the gradients of data-parallel training."
    )
    parser.add_argument("--version", action="version", version=f"grain_ddp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    report.arguments(
        commands.add_parser(
            "report",
            help="what the records of a run say, in words and as a page",
            description="Read the records of a run, say what stands out, and show the evidence. "
            "A run writes them with "
            'GrainState(on_step=grain_ddp.sinks.jsonl("run.jsonl")); '
            'add weighting="mean" to watch plain averaging without changing it.',
        )
    )
    doctor = commands.add_parser(
        "doctor",
        help="what this machine and installation support, with a test on two ranks",
        description="Show versions, devices and backends, and train a small model with two "
        "processes on this machine. The exit status is 1 if that fails.",
    )
    from grain_ddp._tools.quantities import whole

    doctor.add_argument(
        "--timeout",
        type=whole(86400),
        default=120,
        metavar="SECONDS",
        help="how long each test may take (default: 120)",
    )
    doctor.set_defaults(command=_doctor)
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
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from grain_ddp._tools.doctor import examine

    return 0 if examine(options.timeout) else 1


if __name__ == "__main__":
    sys.exit(main())
