"""What every way to aggregate costs on these machines, against plain DDP: `grain-ddp bench`.

First the step times of `trial`, then the links, memory and solver of `measure`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import grain_ddp
from grain_ddp._core.state import GrainState
from grain_ddp._tools import output
from grain_ddp._tools.measure import hosts, measure_cluster
from grain_ddp._tools.network import Cluster
from grain_ddp._tools.quantities import count, whole
from grain_ddp._tools.trial import WIRES, compare, variants
from grain_ddp.sinks._services import writes

HOW = "torchrun --nproc_per_node=4 -m grain_ddp bench"

_LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")  # what Open MPI, MPICH and their kin set
_ROUNDS, _STEPS = {False: 15, True: 2}, {False: 10, True: 2}  # True: --quick


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = f"Start it with a launcher: {HOW} --json bench.json"
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--parameters",
        type=count,
        nargs="+",
        metavar="N",
        help="sizes of the model, such as 1M 10M (default; on GPUs 10M 100M). Each variant has a "
        "model of its own",
    )
    what.add_argument("--layers", type=whole(10**4), default=4, help="of the model (default 4)")
    what.add_argument("--batch", type=whole(), default=8, help="examples per rank (default 8)")
    which = parser.add_argument_group("what is compared with plain DDP and a no-op hook")
    which.add_argument(
        "--scope",
        nargs="*",
        choices=("global", "bucket"),
        default=["global", "bucket"],
        help="(default: both)",
    )
    which.add_argument(
        "--groups",
        nargs="+",
        type=_group,
        metavar="GROUPS",
        help="rank, node, or a number of ranks (default: rank; on several hosts node too)",
    )
    which.add_argument(
        "--wire",
        nargs="+",
        choices=WIRES,
        default=["own", "bf16"],
        help="dtype of what travels (default: own bf16)",
    )
    which.add_argument(
        "--sketch",
        nargs="*",
        type=whole(),
        default=[2**20],
        metavar="K",
        help="numbers in a sketch of the gradient (default: 1048576)",
    )
    which.add_argument(
        "--record-every",
        nargs="*",
        type=whole(),
        default=[1, 10],
        metavar="STEPS",
        help="monitor mode, with a record every so many steps (default: 1 10)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=whole(), help="in which all take turns (default 15)")
    how.add_argument("--steps", type=whole(), help="per turn (default 10)")
    how.add_argument(
        "--quick", action="store_true", help="to see that it runs: its ratios mean nothing"
    )
    how.add_argument("--backend", choices=("gloo", "nccl", "mpi"), help="default: nccl on GPUs")
    how.add_argument("--json", metavar="FILE", help="all figures, also what `plan --from` reads")
    how.add_argument("--out", metavar="FILE", help="draw the ratios: a .png or .svg")
    how.add_argument("--force", action="store_true", help="replace files of others")
    parser.set_defaults(command=run)


def _group(text: str) -> str | int:
    if text in ("rank", "node"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected rank, node or a number, but found {text!r}")


def run(options: argparse.Namespace) -> int:
    """The command, on each rank."""
    options.rounds = _ROUNDS[options.quick] if options.rounds is None else options.rounds
    options.steps = _STEPS[options.quick] if options.steps is None else options.steps
    for path in filter(None, (options.json, options.out)):
        if writes():  # on the others' hosts the folder may be missing
            output.check(path, options.force)
    if options.out:
        output.canvas(options.out, (1, 1))  # an error about it now, not after the measurements
    device = _start(options.backend)
    try:
        _measure(options, device)
        dist.barrier()  # gloo's threads are done with the last all-reduce before Python exits
    finally:
        dist.destroy_process_group()
    return 0


def _start(backend: str | None) -> torch.device:
    """Join the other processes; this one's device."""
    _keep_freed_memory()
    gpus = torch.cuda.device_count() if backend in (None, "nccl") else 0
    backend = backend or ("nccl" if gpus and dist.is_nccl_available() else "gloo")
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if backend == "nccl" and local >= gpus:
            raise ValueError(
                f"grain_ddp: local rank {local} has no GPU of its own: there are {gpus}. Start "
                "fewer processes, or add --backend gloo to measure on CPUs."
            )
        dist.init_process_group(backend)
    elif any(name in os.environ for name in _LAUNCHERS):
        importlib.import_module("grain_ddp.mpi").init_process_group(backend)
    else:
        raise ValueError(
            "grain_ddp: bench measures several processes together, and this is one alone. Start "
            f"it with a launcher: {HOW}, or mpiexec -n 4 python -m grain_ddp bench."
        )
    if backend != "nccl":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _keep_freed_memory() -> None:
    """What a step frees, the next one has at once: for every variant alike.

    By default glibc returns it to the system, or not, by thresholds that move with what was freed
    before, so that a variant would pay page faults, up to a fifth of its step, for another's past.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**31 - 1)


def _measure(options: argparse.Namespace, device: torch.device) -> None:
    say = print if dist.get_rank() == 0 else lambda *_, **__: None
    places = hosts()
    usual = [1e7, 1e8] if device.type == "cuda" else [1e6, 1e7]
    sizes = options.parameters or ([2e4] if options.quick else usual)
    groups = options.groups or ["rank", *(["node"] if len(places) > 1 and _has_nodes() else [])]
    contest = variants(options.scope, groups, options.wire, options.record_every, options.sketch)
    facts = {
        output.MARK: grain_ddp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": _machine(device),
        "backend": dist.get_backend(),
        "ranks": dist.get_world_size(),
        "hosts": len(places),
        **{name: getattr(options, name) for name in ("layers", "batch", "rounds", "steps")},
    }
    say(
        f"{facts['ranks']} ranks on {facts['hosts']} host{'s' * (len(places) > 1)}, "
        f"{facts['machine']}, {facts['backend']}, torch {facts['torch']}, Python "
        f"{facts['python']}, grain_ddp {facts[output.MARK]}; {options.layers} layers, batch "
        f"{options.batch}, {options.rounds} rounds of {options.steps} steps\n"
    )
    say("| parameters | variant | ms per step | ratio | quartiles of the ratio |")
    say("|---|---|---|---|---|")
    steps = []
    for size in sizes:
        rows = compare(
            size, options.layers, options.batch, options.rounds, options.steps, contest, device
        )
        steps += rows
        for row in rows:
            low, high = row["quartiles"]
            say(
                f"| {row['parameters'] / 1e6:.2f} M | {row['variant']} | "
                f"{1e3 * row['seconds']:.1f} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} |",
                flush=True,
            )
    if options.quick:
        say("\nA quick run shows that it runs. Its ratios mean nothing: run without --quick.")
    cluster = measure_cluster(device)
    say(f"\n{_primitives(cluster)}")
    if dist.get_rank() == 0:
        if options.json:
            found = {**facts, "cluster": asdict(cluster), "steps": steps}
            output.write(Path(options.json), json.dumps(found, indent=1) + "\n")
        if options.out:
            draw(steps, Path(options.out))
            print(f"\nPicture: {options.out}")


def _has_nodes() -> bool:
    try:
        GrainState(groups="node")
    except ValueError:
        return False
    return True


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} with {os.cpu_count()} cores, {torch.get_num_threads()} per rank"


def _primitives(cluster: Cluster) -> str:
    lines = []
    for name, where in (("near", "Inside a host"), ("far", "Between hosts")):
        for way, what in (("", "messages between pairs"), ("_reduce", "all-reduce")):
            link = getattr(cluster, name + way)
            if link is not None:
                whose = "rank" if name == "near" else "host"
                lines.append(
                    f"{where}, {what}: {1e6 * link.latency:.0f} µs a message, "
                    f"{link.bandwidth / 1e9:.3g} GB/s a {whose}."
                )
    lines.append(
        f"A rank's memory: Gramian {cluster.gramian / 1e9:.3g} GB/s, weighted sum "
        f"{cluster.weighted_sum / 1e9:.3g} GB/s, copy {cluster.copy / 1e9:.3g} GB/s "
        f"({cluster.gramian / cluster.copy:.2f} and {cluster.weighted_sum / cluster.copy:.2f} of a "
        f"copy's speed); {cluster.flops / 1e9:.3g} GFLOP/s for the Gramian of many rows."
    )
    solves = ", ".join(f"{1e3 * seconds:.2g} ms for {n}" for n, seconds in cluster.solver)
    return "\n".join([*lines, f"Solver: {solves} rows."])


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw ratios with their quartiles, a panel for each size of model.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the file's ending is not that of a picture.
    """
    sizes = list(dict.fromkeys(row["parameters"] for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = output.canvas(path, (4 + 4 * len(sizes), 1 + 0.4 * len(names)))
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axis, size in zip(panels, sizes, strict=True):
        mine = [row for row in rows if row["parameters"] == size]
        ratios = np.array([row["ratio"] for row in mine])
        bounds = np.array([row["quartiles"] for row in mine]).T
        at = np.arange(len(mine))
        axis.barh(
            at,
            ratios,
            xerr=np.abs(bounds - ratios),
            color=["tab:blue" if n.startswith("GRAIN") else "tab:gray" for n in names],
        )
        axis.axvline(1, color="black", lw=0.8)
        axis.set_yticks(at, names)
        axis.set(xlabel="step time / plain DDP", title=f"{size / 1e6:.2f} M parameters")
    panels[0].invert_yaxis()
    output.save(figure, path)
