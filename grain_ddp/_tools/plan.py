"""What aggregation will cost on a cluster, and what to choose there: `grain-ddp plan`."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import grain_ddp
from grain_ddp._tools import output
from grain_ddp._tools.advice import choices, draw, growth, report
from grain_ddp._tools.cost import Job, cost
from grain_ddp._tools.network import Cluster, Link, uniform
from grain_ddp._tools.quantities import (
    LEAST,
    MOST,
    count,
    duration,
    flops,
    rate,
    share,
    size,
    whole,
)

# Round numbers, about 90 % of the data sheets; and training flops per second that are often seen.
PRESETS = {
    "h100": (uniform(8, 400e9, 360e9, 3e12, 50e12, 80e9), 400e12),
    "a100": (uniform(8, 270e9, 180e9, 1.4e12, 15e12, 80e9), 150e12),
    "cloud": (uniform(8, 20e9, 11e9, 0.5e12, 25e12, 24e9, gap=10e-6), 60e12),
    "ethernet": (uniform(1, 20e9, 1.1e9, 0.5e12, 25e12, 24e9, gap=20e-6), 60e12),
}
_ABOUT = """presets: h100: 8 GPUs of 80 GB per host with NVLink, 8 x 400 Gbit/s; a100: the same with
half of it; cloud: 8 GPUs of 24 GB per host on PCIe, one link of 100 Gbit/s; ethernet: one GPU of 24
GB per host, 10 Gbit/s"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = _ABOUT
    job = parser.add_argument_group("what is trained")
    job.add_argument(
        "--parameters", type=count, metavar="N", help="such as 350M or 7B (default 1B)"
    )
    job.add_argument(
        "--gpus",
        type=whole(10**6),
        metavar="N",
        help="in all (default 64; the bench's ranks)",
    )
    kind = job.add_mutually_exclusive_group()
    kind.add_argument("--ddp", action="store_true", help="DDP or the loop without it (default)")
    kind.add_argument("--fsdp", action="store_true", help="FSDP2")
    kind.add_argument("--zero", type=int, choices=(1, 2, 3), help="DeepSpeed's ZeRO, by its stage")
    job.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of gradients (default fp32)"
    )
    job.add_argument(
        "--bucket",
        type=size,
        metavar="SIZE",
        help="of gradients that travel together (default 25MiB, as DDP; sharded 500M numbers)",
    )
    job.add_argument(
        "--compute",
        type=duration,
        metavar="TIME",
        help="of a step without communication, such as 300ms (default: 6 flops per parameter and "
        "token at the preset's speed; with --from, the no-op hook's step)",
    )
    job.add_argument("--tokens", type=whole(), default=8192, help="per GPU and step (default 8192)")
    machine = parser.add_argument_group("what it runs on", "a preset or a bench, and what differs")
    source = machine.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=PRESETS, help="default: h100")
    source.add_argument(
        "--from", dest="source", metavar="FILE", help="what `grain-ddp bench --json FILE` measured"
    )
    machine.add_argument(
        "--gpus-per-host", type=whole(10**4), metavar="N", help="(default: the preset's)"
    )
    machine.add_argument("--gpu-memory", type=size, metavar="SIZE", help="of a GPU, such as 80GB")
    machine.add_argument("--link", type=rate, metavar="RATE", help="all of a host's, to others")
    machine.add_argument("--nvlink", type=rate, metavar="RATE", help="of a GPU, inside a host")
    machine.add_argument("--latency", type=duration, metavar="TIME", help="of each message out")
    machine.add_argument("--near-latency", type=duration, metavar="TIME", help="inside a host")
    machine.add_argument("--memory", type=rate, metavar="RATE", help="of that memory")
    machine.add_argument("--flops", type=flops, metavar="SPEED", help="achieved in training")
    parser.add_argument(
        "--budget",
        type=share,
        default=0.05,
        metavar="PERCENT",
        help="how much longer a step may take (default 5%%)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--out", metavar="FILE", help="draw overhead against GPUs: a .png or .svg")
    parser.add_argument("--force", action="store_true", help="replace files of others")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """The command."""
    reads = (options.source,) if options.source else ()
    outputs = [
        path and output.check(path, options.force, reads) for path in (options.json, options.out)
    ]
    if options.out:
        output.canvas(options.out, (1, 1))  # an error about it now
    cluster, job, ranks = _asked(options)
    print(report(cluster, job, ranks, options.budget))
    if outputs[0]:
        found = {
            output.MARK: grain_ddp.__version__,
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
        output.write(outputs[0], json.dumps(found, indent=1) + "\n")
    if outputs[1]:
        draw(cluster, job, ranks, outputs[1])
        print(f"\nPicture: {options.out}")
    return 0


def load(path: str | Path) -> tuple[Cluster, dict[str, Any]]:
    """What `grain-ddp bench --json` wrote: the cluster, and all of it.

    Raises:
        ValueError: it is not that.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        found: dict[str, Any] = json.loads(text, parse_constant=_no_number)
        cluster = Cluster.of(found["cluster"])
        _check(cluster)
        for step in found["steps"]:
            if not (0 < float(step["seconds"]) < MOST and 0 < float(step["parameters"]) < MOST):
                raise ValueError
            if not isinstance(step["variant"], str):
                raise TypeError
        found["steps"][0]
        if not 1 <= int(found["ranks"]) <= 10**6:
            raise ValueError
    except (
        *(ValueError, KeyError, TypeError, IndexError, AttributeError),
        *(OverflowError, RecursionError),
    ) as error:
        raise ValueError(
            f"grain_ddp: {path}: expected what `grain-ddp bench --json {path}` writes, but found "
            "something else."
        ) from error
    return cluster, found


def _no_number(name: str) -> float:
    raise ValueError(name)


def _check(cluster: Cluster) -> None:
    """ValueError or TypeError for what no machine has."""
    links = [cluster.near, cluster.far, cluster.near_reduce, cluster.far_reduce]
    speeds = [cluster.gramian, cluster.weighted_sum, cluster.copy, cluster.flops, cluster.per_host]
    speeds += [value for link in links if link for value in (link.latency, link.bandwidth)]
    speeds += [value for pair in cluster.solver for value in pair]
    if cluster.capacity is not None:
        speeds.append(cluster.capacity)
    if not cluster.solver or not all(LEAST <= float(value) <= MOST for value in speeds):
        raise ValueError
    if cluster.per_host != int(cluster.per_host):
        raise ValueError


def _asked(options: argparse.Namespace) -> tuple[Cluster, Job, int]:
    """The cluster, the job and the number of ranks that the options describe."""
    kind = f"zero{options.zero}" if options.zero else "fsdp" if options.fsdp else "ddp"
    itemsize = 4 if options.dtype == "fp32" else 2
    parameters, ranks = options.parameters, options.gpus
    if options.source:
        cluster, measured = load(options.source)
        steps = [step for step in measured["steps"] if step["variant"] == "no-op hook"]
        if not steps and options.compute is None:
            raise ValueError(
                f"grain_ddp: {options.source} has no step with the no-op hook: give --compute."
            )
        parameters = parameters or measured["steps"][-1]["parameters"]
        compute = options.compute or steps[-1]["seconds"] / steps[-1]["parameters"] * parameters
        ranks = ranks or measured["ranks"]
    else:
        cluster, speed = PRESETS[options.preset or "h100"]
        parameters, ranks = parameters or 1e9, ranks or 64
        compute = options.compute or 6 * parameters * options.tokens / (options.flops or speed)
    for name, latency, bandwidth in (
        ("near", options.near_latency, options.nvlink),
        ("far", options.latency, options.link),
    ):
        messages = _link(getattr(cluster, name), latency, bandwidth)
        rings = _link(getattr(cluster, f"{name}_reduce"), None, bandwidth) or messages
        links: dict[str, Any] = {name: messages, f"{name}_reduce": rings}
        cluster = replace(cluster, **links)
    if options.memory:
        own = options.memory
        cluster = replace(cluster, gramian=own, weighted_sum=own, copy=own / 2)
    if options.gpus_per_host:
        cluster = replace(cluster, per_host=options.gpus_per_host)
    if options.gpu_memory:
        cluster = replace(cluster, capacity=options.gpu_memory)
    # DeepSpeed's default; a layer of 1/32 of the model, as FSDP units are; DDP's default.
    usual = {"ddp": 25 * 2**20, "fsdp": parameters * itemsize / 32}.get(kind, 5e8 * itemsize)
    buckets = math.ceil(parameters * itemsize / (options.bucket or usual))
    if buckets > 10**6:
        raise ValueError(
            f"grain_ddp: --bucket makes {buckets:.0e} buckets of the model: expected 1 to 1e6."
        )
    return cluster, Job(int(parameters), itemsize, buckets, compute, kind), ranks


def _link(known: Link | None, latency: float | None, bandwidth: float | None) -> Link | None:
    """The link with what was given in place of what was known."""
    if known is None:
        return Link(latency or 1e-5, bandwidth) if bandwidth else None
    return Link(latency or known.latency, bandwidth or known.bandwidth)
