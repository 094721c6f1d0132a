"""What aggregation will cost on a cluster, and what to choose there: `grain-ddp plan`."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grain_ddp._tools.cost import (
    SCOPES,
    Choice,
    Cluster,
    Job,
    Link,
    choices,
    cost,
    overhead,
    uniform,
)
from grain_ddp._tools.picture import canvas

GROWTH = tuple(2**k for k in range(1, 15))
"""Numbers of ranks in tables and pictures: up to 16,384."""

# Round numbers, about 90 % of the data sheets; and training flops per second that are often seen.
PRESETS = {
    "h100": (uniform(8, 400e9, 360e9, 3e12, 50e12), 400e12),
    "a100": (uniform(8, 270e9, 180e9, 1.4e12, 15e12), 150e12),
    "cloud": (uniform(8, 20e9, 11e9, 0.5e12, 25e12, gap=10e-6), 60e12),
    "ethernet": (uniform(1, 20e9, 1.1e9, 0.5e12, 25e12, gap=20e-6), 60e12),
}
_ABOUT = """presets: h100: 8 GPUs per host with NVLink, 8 x 400 Gbit/s; a100: the same with half of
it; cloud: 8 GPUs per host on PCIe, one link of 100 Gbit/s; ethernet: one GPU per host, 10 Gbit/s"""


def recommend(cluster: Cluster, job: Job, ranks: int, budget: float) -> str:
    """A sentence or two: the finest groups and the first scope within the budget of overhead."""
    options = list(choices(cluster, job, ranks))
    if not options:
        return "Alone: there is nothing to aggregate, and nothing to pay."
    found = {choice: overhead(cluster, job, ranks, choice) for choice in options}
    own = [choice for choice in options if choice.itemsize is None]
    within = [choice for choice in own if found[choice] <= budget]
    within = within or [choice for choice in options if found[choice] <= budget]
    best = within[0] if within else min(options, key=lambda choice: found[choice])
    parts = [f'scope="{best.scope}"', f"groups={_groups(best, cluster)}"]
    if best.itemsize:
        parts.append("wire_dtype=torch.bfloat16")
    said = f"Take {', '.join(parts)}: {_percent(found[best])} over plain averaging, "
    said += "within" if within else "the least there is, and more than"
    said += f" the {100 * budget:g} % allowed."
    if job.sharded and best.scope == "global":
        said += ' FSDP2 has scope="bucket" only.'
    if best != own[0]:
        said += (
            f' scope="global" with groups="rank", the paper\'s method, would cost '
            f"{_percent(found[own[0]])}."
        )
        if best.group > 1:
            here, there = (cost(cluster, job, ranks, choice) for choice in (own[0], best))
            rows = ranks // best.group
            said += (
                f" Groups of {best.group} make {rows} rows out of {ranks}: as many messages per "
                f"bucket, and {_seconds(cluster.solve(rows))} to solve instead of "
                f"{_seconds(cluster.solve(ranks))}"
            )
            if here.out > 1.01 * there.out:
                said += f"; {_bytes(there.out)} leave a host per step instead of {_bytes(here.out)}"
            said += "."
    narrow = replace(best, itemsize=2)
    if narrow in found and found[narrow] < found[best] - 0.01:
        said += f" With wire_dtype=torch.bfloat16 it would be {_percent(found[narrow])}."
    return said


def _ranks(cluster: Cluster) -> str:
    return "GPUs" if cluster.gpu else "ranks"


def _groups(choice: Choice, cluster: Cluster) -> str:
    if choice.group == 1:
        return '"rank"'
    return '"node"' if choice.group == cluster.per_host else str(choice.group)


def report(cluster: Cluster, job: Job, ranks: int, budget: float) -> str:
    """Tables and a recommendation, as Markdown."""
    plain = cost(cluster, job, ranks)
    half = "reduce-scatter" if job.sharded else "all-reduce"
    hosts = -(-ranks // cluster.per_host)
    lines = [
        f"{_short(job.parameters)} parameters, {ranks} {_ranks(cluster)} on {hosts} host"
        f"{'s' if hosts > 1 else ''}, {'ZeRO or FSDP' if job.sharded else 'DDP'}, "
        f"{job.buckets} buckets of {_bytes(job.size / job.buckets)}, "
        f"{_seconds(job.compute)} of computing per step.",
        "",
        "| scope, groups | step | overhead | sent per rank | out of a host | memory | solve |",
        "|---|---|---|---|---|---|---|",
        f"| plain {half} | {_seconds(plain.seconds)} | | {_bytes(plain.sent)} | "
        f"{_bytes(plain.out)} | | |",
    ]
    for choice in choices(cluster, job, ranks):
        found = cost(cluster, job, ranks, choice)
        lines.append(
            f"| {choice.name(cluster.per_host)} | {_seconds(found.seconds)} | "
            f"{_percent(found.seconds / plain.seconds - 1)} | {_bytes(found.sent)} | "
            f"{_bytes(found.out)} | {_bytes(found.memory)} | {_seconds(found.solve)} |"
        )
    curves = growth(cluster, job, ranks)
    sizes = sorted({n for curve in curves.values() for n in curve})
    if sizes:
        lines += [
            "",
            "Overhead as the cluster grows:",
            "",
            f"| {_ranks(cluster)} | {' | '.join(curves)} |",
        ]
        lines += ["|---" * (len(curves) + 1) + "|"]
        for n in sizes:
            cells = (_percent(curve[n]) if n in curve else "" for curve in curves.values())
            lines.append(f"| {n} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", recommend(cluster, job, ranks, budget)])


def growth(cluster: Cluster, job: Job, ranks: int) -> dict[str, dict[int, float]]:
    """Overhead by number of GPUs for the groupings that matter, up to 16,384 or that many ranks.

    Sizes that do not fill hosts, and links that were not measured, are left out.
    """
    k = cluster.per_host
    kinds = [Choice(scope, size) for size in sorted({1, k, 16 * k}) for scope in SCOPES]
    curves: dict[str, dict[int, float]] = {}
    for choice in kinds:
        for n in sorted({*GROWTH, ranks}):
            if n > k and (cluster.far is None or n % k):
                continue
            if n >= 2 * choice.group and n % choice.group == 0:
                name = choice.name(k)
                curves.setdefault(name, {})[n] = overhead(cluster, job, n, choice)
    return curves


def draw(cluster: Cluster, job: Job, ranks: int, path: str | Path) -> None:
    """Draw the overhead against the number of GPUs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the file's ending is not that of a picture.
    """
    figure = canvas(path, (8, 5))
    axis = figure.subplots()
    colors = ("tab:red", "tab:blue", "tab:green")
    for i, (name, curve) in enumerate(growth(cluster, job, ranks).items()):
        axis.plot(
            list(curve),
            [100 * max(value, 1e-3) for value in curve.values()],
            color=colors[i // 2],
            ls="--" if i % 2 else "-",
            marker="o",
            ms=4,
            label=name,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(1, 1000)  # what is off the top is out of the question
    axis.set(xlabel=_ranks(cluster), ylabel="% longer than plain averaging")
    axis.set_title(
        f"{_short(job.parameters)} parameters, {'ZeRO or FSDP' if job.sharded else 'DDP'}, "
        f"{cluster.per_host} {_ranks(cluster)} per host"
    )
    axis.grid(alpha=0.3)
    axis.legend(title="scope, groups")
    figure.savefig(path, dpi=100)


# What users type and read.

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_RATES = {
    **{
        f"{p}B/s": f
        for p, f in zip(("", "k", "M", "G", "T"), (1, 1e3, 1e6, 1e9, 1e12), strict=True)
    },
    **{
        f"{p}bit/s": f / 8 for p, f in zip(("k", "M", "G", "T"), (1e3, 1e6, 1e9, 1e12), strict=True)
    },
}
_FLOPS = {"GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15}


class Quantity:
    """An option's type: a positive number with a unit, such as 200Gbit/s."""

    def __init__(self, units: Mapping[str, float], example: str) -> None:
        self.units, self.example = units, example

    def __call__(self, text: str) -> float:
        match = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?)\s*(\D*)", text.strip())
        if not match or match[2] not in self.units or float(match[1]) <= 0:
            raise argparse.ArgumentTypeError(
                f"expected a positive number with a unit, such as {self.example} "
                f"({', '.join(unit for unit in self.units if unit)}), but found {text!r}"
            )
        return float(match[1]) * self.units[match[2]]


count = Quantity(_COUNTS, "7B")
"""Of parameters: "350M", "7B"."""

_duration, _size = Quantity(_SECONDS, "300ms"), Quantity(_BYTES, "25MiB")
_rate, _flops = Quantity(_RATES, "200Gbit/s"), Quantity(_FLOPS, "400TFLOP/s")


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    for unit, factor in units:
        if value >= factor or (unit, factor) == units[-1]:
            number = value / factor
            digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
            return f"{number:.{digits}f}{unit}"
    raise AssertionError


def _seconds(value: float) -> str:
    return _scaled(value, ((" s", 1.0), (" ms", 1e-3), (" µs", 1e-6)))


def _bytes(value: float) -> str:
    return (
        _scaled(value, ((" TB", 1e12), (" GB", 1e9), (" MB", 1e6), (" kB", 1e3))) if value else "0"
    )


def _short(value: float) -> str:
    return _scaled(value, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)))


def _percent(value: float) -> str:
    if value >= 10:
        return f"{value + 1:,.0f} times"
    return f"{100 * value:.1f} %" if abs(value) >= 5e-4 else "0 %"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = _ABOUT
    job = parser.add_argument_group("what is trained")
    job.add_argument(
        "--parameters", type=count, metavar="N", help="such as 350M or 7B (default 1B)"
    )
    job.add_argument("--gpus", type=int, metavar="N", help="in all (default 64; the bench's ranks)")
    job.add_argument("--sharded", action="store_true", help="ZeRO or FSDP instead of DDP")
    job.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of gradients (default fp32)"
    )
    job.add_argument(
        "--bucket",
        type=_size,
        metavar="SIZE",
        help="of gradients that travel together (default 25MiB, as DDP; sharded 500M numbers)",
    )
    job.add_argument(
        "--compute",
        type=_duration,
        metavar="TIME",
        help="of a step without communication, such as 300ms (default: 6 flops per parameter and "
        "token at the preset's speed; with --from, the no-op hook's step)",
    )
    job.add_argument("--tokens", type=int, default=8192, help="per GPU and step (default 8192)")
    machine = parser.add_argument_group("what it runs on", "a preset or a bench, and what differs")
    source = machine.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=PRESETS, default="h100", help="default: h100")
    source.add_argument(
        "--from", dest="source", metavar="FILE", help="what `grain-ddp bench --json FILE` measured"
    )
    machine.add_argument("--gpus-per-host", type=int, metavar="N", help="(default: the preset's)")
    machine.add_argument("--link", type=_rate, metavar="RATE", help="all of a host's, to others")
    machine.add_argument("--nvlink", type=_rate, metavar="RATE", help="of a GPU, inside a host")
    machine.add_argument("--latency", type=_duration, metavar="TIME", help="of each message out")
    machine.add_argument("--near-latency", type=_duration, metavar="TIME", help="inside a host")
    machine.add_argument("--memory", type=_rate, metavar="RATE", help="of a GPU's own memory")
    machine.add_argument("--flops", type=_flops, metavar="SPEED", help="achieved in training")
    parser.add_argument(
        "--budget",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="how much longer a step may take (default 5)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--out", metavar="FILE", help="draw overhead against GPUs: a .png or .svg")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command."""
    cluster, job, ranks = _asked(options)
    print(report(cluster, job, ranks, options.budget / 100))
    if options.json:
        found = {
            "cluster": asdict(cluster),
            "job": asdict(job),
            "gpus": ranks,
            "plain": asdict(cost(cluster, job, ranks)),
            "choices": [
                {**asdict(choice), **asdict(cost(cluster, job, ranks, choice))}
                for choice in choices(cluster, job, ranks)
            ],
            "overhead": growth(cluster, job, ranks),
        }
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.out:
        draw(cluster, job, ranks, options.out)
        print(f"\nPicture: {options.out}")
    return 0


def load(path: str | Path) -> dict[str, Any]:
    """What `grain-ddp bench --json` wrote.

    Raises:
        ValueError: it is not that.
    """
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text())
        Cluster.of(found["cluster"])
        found["steps"][0]["parameters"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"grain_ddp: {path}: expected what `grain-ddp bench --json {path}` writes, but found "
            "something else."
        ) from error
    return found


def _asked(options: argparse.Namespace) -> tuple[Cluster, Job, int]:
    """The cluster, the job and the number of ranks that the options describe."""
    for name in ("gpus", "gpus_per_host", "tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"grain_ddp: --{flag} must be at least 1, but it is {value}.")
    parameters, ranks, itemsize = (
        options.parameters,
        options.gpus,
        4 if options.dtype == "fp32" else 2,
    )
    if options.source:
        measured = load(options.source)
        cluster = Cluster.of(measured["cluster"])
        steps = [step for step in measured["steps"] if step["variant"] == "no-op hook"]
        if not steps and options.compute is None:
            raise ValueError(
                f"grain_ddp: {options.source} has no step with the no-op hook: give --compute."
            )
        parameters = parameters or measured["steps"][-1]["parameters"]
        compute = options.compute or steps[-1]["seconds"] / steps[-1]["parameters"] * parameters
        ranks = ranks or measured["ranks"]
    else:
        cluster, flops = PRESETS[options.preset]
        parameters, ranks = parameters or 1e9, ranks or 64
        compute = options.compute or 6 * parameters * options.tokens / (options.flops or flops)
    for name, latency, rate in (
        ("near", options.near_latency, options.nvlink),
        ("far", options.latency, options.link),
    ):
        messages = _link(getattr(cluster, name), latency, rate)
        rings = _link(getattr(cluster, f"{name}_reduce"), None, rate) or messages
        links: dict[str, Any] = {name: messages, f"{name}_reduce": rings}
        cluster = replace(cluster, **links)
    if options.memory:
        speed = options.memory
        cluster = replace(cluster, gramian=speed, weighted_sum=speed, copy=speed / 2)
    if options.gpus_per_host:
        cluster = replace(cluster, per_host=options.gpus_per_host)
    bucket = options.bucket or (5e8 * itemsize if options.sharded else 25 * 2**20)
    buckets = math.ceil(parameters * itemsize / bucket)
    return cluster, Job(int(parameters), itemsize, buckets, compute, options.sharded), ranks


def _link(known: Link | None, latency: float | None, bandwidth: float | None) -> Link | None:
    """The link with what was given in place of what was known."""
    if known is None:
        return Link(latency or 1e-5, bandwidth) if bandwidth else None
    return Link(latency or known.latency, bandwidth or known.bandwidth)
