"""What every way to aggregate costs on these machines, against plain DDP: `grain-ddp bench`.

All variants train the same model in the same processes and take turns in rounds, each round in the
other order, a block of steps at a time. A ratio compares blocks of one round, so that what else the
machine does hits both. Small measurements of links, memory and solver follow, for `grain-ddp plan`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import math
import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from grain_ddp._core.state import GrainState
from grain_ddp._math.gramian import gramian, weighted_sum
from grain_ddp._math.weighting import weigh
from grain_ddp._tools.cost import Cluster, Link
from grain_ddp._tools.picture import canvas
from grain_ddp._tools.plan import count
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp.ddp import grain_hook
from grain_ddp.sinks import jsonl

PLAIN, NOOP = "plain DDP", "no-op hook"
HOW = "torchrun --nproc_per_node=4 -m grain_ddp bench"

Options = Mapping[str, Any]
"""Of a `GrainState`."""

_WIRES = {"own": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")  # what Open MPI, MPICH and their kin set
_ROUNDS, _STEPS = {False: 15, True: 2}, {False: 10, True: 2}  # True: --quick


def variants(
    scopes: Sequence[str],
    groups: Sequence[str | int],
    wires: Sequence[str],
    monitor: Sequence[int],
) -> dict[str, Options | None]:
    """What is compared, by name; None: no `GrainState`."""
    found: dict[str, Options | None] = {PLAIN: None, NOOP: None}
    for group in groups:
        for scope in scopes:
            for wire in wires:
                name = f"GRAIN, {scope}" + ("" if group == "rank" else f", groups of {group}")
                name += "" if wire == "own" else f", {wire} on the wire"
                found[name] = {"scope": scope, "groups": group, "wire_dtype": _WIRES[wire]}
    for every in monitor:
        name = "monitor, every step" if every == 1 else f"monitor, every {every} steps"
        found[name] = {"weighting": "mean", "record_every": every}
    return found


def network(parameters: float, layers: int) -> nn.Sequential:
    """Square layers with about that many parameters in all, the same on every rank."""
    torch.manual_seed(0)
    width = max(round(math.sqrt(parameters / layers)), 1)
    return nn.Sequential(
        *(
            module
            for k in range(layers)
            for module in ([nn.ReLU()] if k else []) + [nn.Linear(width, width)]
        )
    )


class Trial:
    """One variant of training: its model, and the times of its blocks."""

    def __init__(
        self, name: str, options: Options | None, net: nn.Module, log: Path, device: torch.device
    ) -> None:
        self.name, self.options, self.times = name, options, list[float]()
        self.model = DistributedDataParallel(net.to(device))
        # So slow that the gradients stay as they are: products of vanishing ones would be
        # subnormal numbers, for which a CPU takes ten times as long.
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-9)
        self.state: GrainState | None = None
        if name == NOOP:
            self.model.register_comm_hook(None, noop_hook)
        elif options is not None:
            sink = jsonl(log) if "weighting" in options else None  # as one who watches would
            self.state = GrainState(on_step=sink, **options)
            self.model.register_comm_hook(self.state, grain_hook)

    def block(self, x: Tensor, y: Tensor, steps: int) -> float:
        """Seconds per step."""

        def train() -> None:
            for _ in range(steps):
                self.optimizer.zero_grad()
                (self.model(x) - y).square().mean().backward()
                self.optimizer.step()
            _all_ready(x.device)

        return clock(train, x.device) / steps


def clock(function: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of a call, the mean over that many in a row; all ranks start together."""
    _all_ready(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


def _all_ready(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def compare(
    parameters: float,
    layers: int,
    batch: int,
    rounds: int,
    steps: int,
    contest: Mapping[str, Options | None],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Step times of the variants with a model of that size, as rows for a table and for JSON."""
    with tempfile.TemporaryDirectory() as folder:
        trials = [
            Trial(name, options, network(parameters, layers), Path(folder, f"{k}.jsonl"), device)
            for k, (name, options) in enumerate(contest.items())
        ]
        width = next(trials[0].model.parameters()).shape[1]
        torch.manual_seed(dist.get_rank())  # equal gradients would be another problem to solve
        x, y = torch.randn(2, batch, width, device=device)
        for k in range(rounds + 1):
            for trial in trials[:: 1 if k % 2 else -1]:  # nobody always goes first
                seconds = trial.block(x, y, steps if k else 3)  # DDP makes its buckets in the first
                if k:
                    trial.times.append(seconds)
        size = sum(p.numel() for p in trials[0].model.parameters())
        buckets = next(
            (
                len(t.state.last.weights)
                for t in trials
                if t.state and t.state.scope == "bucket" and t.state.last
            ),
            None,
        )
    plain = np.array(trials[0].times)
    rows = []
    for trial in trials:
        low, ratio, high = np.percentile(np.array(trial.times) / plain, [25, 50, 75])
        options = dict(trial.options or {})
        if "wire_dtype" in options:
            options["wire_dtype"] = next(n for n, d in _WIRES.items() if d == options["wire_dtype"])
        rows.append(
            {
                "parameters": size,
                "buckets": buckets,
                "variant": trial.name,
                "options": options,
                "seconds": float(np.median(trial.times)),
                "ratio": float(ratio),
                "quartiles": [float(low), float(high)],
            }
        )
    return rows


# What `grain-ddp plan` needs.


def hosts() -> list[list[int]]:
    """The ranks of each host, in order."""
    mine = socket.gethostname(), os.environ.get("GROUP_RANK")  # torchrun's name for a host
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return [[r for r, host in enumerate(every) if host == one] for one in dict.fromkeys(every)]


def measure_cluster(device: torch.device) -> Cluster:
    """Links, memory and solver, all ranks at work at the same time as they are in training.

    ValueError if the hosts have different numbers of ranks.
    """
    ranks, places = dist.get_rank(), hosts()
    size = len(places[0])
    if any(len(place) != size for place in places):
        raise ValueError(
            f"grain_ddp: expected as many ranks on every host, but found {[*map(len, places)]}."
        )
    links: dict[str, Link | None] = {}
    across = [[place[i] for place in places] for i in range(size)]
    for name, teams in (("near", places), ("far", across)):
        links[name] = links[f"{name}_reduce"] = None
        if len(teams[0]) < 2:
            continue
        every = [dist.new_group(team) for team in teams]  # all ranks make all groups
        mine = next(g for g, team in zip(every, teams, strict=True) if ranks in team)
        share = 1 if name == "near" else size  # of one link between hosts
        wire = TorchWire(mine)
        wire.meet({})
        links[name] = _exchange_link(wire, device, share)
        links[f"{name}_reduce"] = _reduce_link(wire, device, share)
    gpu = device.type == "cuda"
    rows, columns = dist.get_world_size(), (1 << (26 if gpu else 21))
    matrix = torch.randn(rows, columns // rows, device=device)
    out = torch.empty_like(matrix[0])
    weights = torch.full((rows,), 1 / rows, device=device)
    twin = torch.empty_like(matrix)
    tall = torch.randn(256, columns // 256, device=device)

    def speed(function: Callable[[], object], amount: float) -> float:
        return amount / _median(lambda: clock(function, device, 5))

    flops = 2 * 256 * tall.numel()
    return Cluster(
        size,
        **links,
        gramian=speed(lambda: gramian(matrix), matrix.nbytes),
        weighted_sum=speed(lambda: weighted_sum(matrix, weights, out), matrix.nbytes),
        copy=speed(lambda: twin.copy_(matrix), matrix.nbytes),
        flops=speed(lambda: gramian(tall), flops),
        gpu=gpu,
        solver=tuple(_solver(device)),
    )


def _median(measure: Callable[[], float], times: int = 5) -> float:
    """Of some calls after a first, and over the ranks: the same on all of them."""
    measure()
    found = float(np.median([measure() for _ in range(times)]))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return float(np.median(every))


def _volume(device: torch.device) -> int:
    """Numbers of fp32 that a rank sends to measure bandwidth."""
    return 1 << (26 if device.type == "cuda" else 22)


def _exchange_link(wire: TorchWire, device: torch.device, share: int) -> Link:
    """Of messages between pairs: t = (n−1)·(α + s/β)."""
    others, pieces = wire.size - 1, 4  # some are under way while others are worked on

    def exchange(length: int, count: int) -> float:
        buffers = [
            [torch.ones(wire.size, length, device=device).unbind() for _ in range(2)]
            for _ in range(count)
        ]

        def call() -> None:
            for transfer in [wire.exchange(send, receive) for send, receive in buffers]:
                transfer.wait()

        return _median(lambda: clock(call, device, 20 if length == 16 else 1))

    length = _volume(device) // others // pieces
    tiny, large = exchange(16, 1), exchange(length, pieces)
    return Link(tiny / others, share * 4 * length * others * pieces / max(large - tiny, large / 2))


def _reduce_link(wire: TorchWire, device: torch.device, share: int) -> Link:
    """Of the backend's all-reduce: t = 2(n−1)·α + 2(n−1)/n · D/β, or 2 log₂ n · α on GPUs."""
    n = wire.size

    def reduce(length: int) -> float:
        values = torch.ones(length, device=device)
        call = lambda: wire.all_reduce(values).wait()  # noqa: E731
        return _median(lambda: clock(call, device, 20 if length == 16 else 1))

    tiny, large = reduce(16), reduce(_volume(device))
    steps = 2 * (math.log2(n) if device.type == "cuda" else n - 1)
    sent = 2 * (n - 1) / n * 4 * _volume(device)
    return Link(tiny / steps, share * sent / max(large - tiny, large / 2))


def _solver(device: torch.device) -> Iterator[tuple[int, float]]:
    """Seconds for gradients around a common mean, as in docs/benchmarks/solver.md."""
    generator = np.random.default_rng(0)
    for n in (2, 8, 64, 256):
        rows = 0.3 * generator.normal(size=(n, 2 * n)) + generator.normal(size=2 * n)
        matrix = rows @ rows.T
        solve = lambda matrix=matrix: weigh(matrix, "min_norm")  # noqa: E731
        yield n, _median(lambda solve=solve: clock(solve, device, 3), 3)  # type: ignore[misc]


# The command.


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
    what.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    what.add_argument("--batch", type=int, default=8, help="examples per rank (default 8)")
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
        choices=_WIRES,
        default=["own", "bf16"],
        help="dtype of what travels (default: own bf16)",
    )
    which.add_argument(
        "--record-every",
        nargs="*",
        type=int,
        default=[1, 10],
        metavar="STEPS",
        help="monitor mode, with a record every so many steps (default: 1 10)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, help="in which all take turns (default 15)")
    how.add_argument("--steps", type=int, help="per turn (default 10)")
    how.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    how.add_argument("--backend", choices=("gloo", "nccl", "mpi"), help="default: nccl on GPUs")
    how.add_argument("--json", metavar="FILE", help="all figures, also what `plan --from` reads")
    how.add_argument("--out", metavar="FILE", help="draw the ratios: a .png or .svg")
    parser.set_defaults(run=run)


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
    for name in ("layers", "batch", "rounds", "steps", "record_every"):
        value = getattr(options, name)
        if min([value] if isinstance(value, int) else value, default=1) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"grain_ddp: --{option} must be at least 1, but it is {value}.")
    if options.out:
        canvas(options.out, (1, 1))  # an error about it now, not after the measurements
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
    if dist.get_rank() == 0:
        for path in filter(None, (options.json, options.out)):
            Path(path).touch()  # the same
    places = hosts()
    usual = [1e7, 1e8] if device.type == "cuda" else [1e6, 1e7]
    sizes = options.parameters or ([2e4] if options.quick else usual)
    groups = options.groups or ["rank", *(["node"] if len(places) > 1 and _has_nodes() else [])]
    contest = variants(options.scope, groups, options.wire, options.record_every)
    facts = {
        "grain_ddp": importlib.import_module("grain_ddp").__version__,
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
        f"{facts['python']}, grain_ddp {facts['grain_ddp']}; {options.layers} layers, batch "
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
    cluster = measure_cluster(device)
    say(f"\n{_primitives(cluster)}")
    if dist.get_rank() == 0:
        if options.json:
            found = {**facts, "cluster": asdict(cluster), "steps": steps}
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
        if options.out:
            draw(steps, options.out)
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


def draw(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw ratios with their quartiles, a panel for each size of model.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the file's ending is not that of a picture.
    """
    sizes = list(dict.fromkeys(row["parameters"] for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = canvas(path, (4 + 4 * len(sizes), 1 + 0.4 * len(names)))
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
    figure.savefig(path, dpi=100)
