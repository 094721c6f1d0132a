"""What grows in many steps of a tiny model, in every integration, as a Markdown table.

    python docs/benchmarks/soak.py [--steps 10000] [--only ddp mpi]

Two ranks. What a rank holds is counted after a tenth of the steps, and at the end: resident memory,
file descriptors, threads, futures, tensors, and all Python objects. The row is that of the rank
whose memory has grown more. It fails where anything but memory has grown, or memory by a MiB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from grain_ddp import GrainState, grain_hook, reduce_gradients

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "mpiexec.sh"
NAMES = ("ddp", "loop", "fsdp", "zero0", "zero1", "zero2", "zero3")
OBJECTS = 50
"""So many more Python objects are no growth: caches hold a few."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(11, 47), nn.Tanh(), nn.Linear(47, 3))


def loss(net: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    return net(torch.randn(6, 11, generator=generator)).square().mean()


def made(name: str) -> tuple[nn.Module, Callable[[int], None]]:
    """A model under an integration, and its training step."""
    net: Any = model()
    if name.startswith("zero"):
        import deepspeed

        import grain_ddp.deepspeed

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # for inference, compiled
        settings = {
            "train_micro_batch_size_per_gpu": 6,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": int(name[-1]), "reduce_bucket_size": 1000},
            "grain": {"enabled": True},
        }
        engine = deepspeed.initialize(
            model=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=1e-3),
            config=settings,
            dist_init_required=False,
        )[0]

        def zero_step(step: int) -> None:
            engine.backward(loss(engine, step))
            engine.step()

        return net, zero_step
    state = GrainState(scope="bucket" if name == "fsdp" else "global")
    if name == "ddp":
        net = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.001)
        net.register_comm_hook(state, grain_hook)
    elif name == "fsdp":
        from torch.distributed.fsdp import fully_shard

        import grain_ddp.fsdp

        for part in (net[0], net):
            fully_shard(part)
        grain_ddp.fsdp.apply(net, state)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step(number: int) -> None:
        optimizer.zero_grad()
        loss(net, number).backward()
        if name == "loop":
            reduce_gradients(net.parameters(), state)
        optimizer.step()

    return net, step


def held() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "futures": sum(issubclass(type(one), torch.futures.Future) for one in objects),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in objects),
        "objects": len(objects),
    }


def soak(step: Callable[[int], None], steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """What is held after a tenth of the steps, and after all."""
    for number in range(steps // 10):
        step(number)
    before = held()
    for number in range(steps // 10, steps):
        step(number)
    return before, held()


def grown(before: dict[str, float], after: dict[str, float], mib: float = 1.0) -> list[str]:
    """What has grown, in words."""
    # A thread of the backend may hold a message's tensor a moment longer.
    bounds = {"MiB": mib, "objects": OBJECTS, "tensors": 2, "futures": 2}
    return [
        f"{name} from {before[name]:g} to {after[name]:g}"
        for name in before
        if after[name] > before[name] + bounds.get(name, 0)
    ]


def _rank(rank: int, name: str, steps: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    store = dist.FileStore(str(Path(folder, "store")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    start = time.perf_counter()
    found = soak(made(name)[1], steps)
    results.put((*found, time.perf_counter() - start))
    results.close()
    results.join_thread()
    dist.barrier()
    os._exit(0)


def _mpi(steps: int) -> None:
    from mpi4py import MPI

    from grain_ddp.mpi import reduce_gradient

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD

    def step(number: int) -> None:
        generator = np.random.default_rng(2 * number + comm.rank)
        reduce_gradient(generator.standard_normal(708, np.float32), comm)

    start = time.perf_counter()
    every = comm.gather((*soak(step, steps), time.perf_counter() - start))
    if every:
        _row("mpi", every)


def _row(name: str, every: list[tuple[dict[str, float], dict[str, float], float]]) -> None:
    before, after, seconds = max(every, key=lambda one: one[1]["MiB"] - one[0]["MiB"])
    pairs = [f"{before[key]:.4g} → {after[key]:.4g}" for key in list(before)[:-1]]
    objects = after["objects"] - before["objects"]
    print(f"| {name} | {' | '.join(pairs)} | {objects:+g} | {seconds:.0f} |", flush=True)
    for one in every:
        if growth := grown(*one[:2]):
            sys.exit(f"{name}: {', '.join(growth)}")


def mpiexec() -> str:
    beside = Path(sys.executable).with_name("mpiexec")
    return os.environ.get("MPIEXEC") or (str(beside) if beside.exists() else "mpiexec")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=[*NAMES, "mpi"], default=[*NAMES, "mpi"])
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    parser.add_argument("--started", action="store_true", help=argparse.SUPPRESS)  # by mpiexec
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.only = 100, ["ddp", "mpi"]
    if options.started:
        _mpi(options.steps)
        return
    print(
        f"{options.steps:,} steps, 2 ranks, {platform.machine()} with {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    print("| integration | MiB | descriptors | threads | futures | tensors | objects | s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    for name in options.only:
        if name == "mpi":
            command = ["bash", LAUNCHER, sys.executable, __file__, "--started"]
            environment = {**os.environ, "PER_HOST": "2", "MPIEXEC": mpiexec()}
            subprocess.run([*command, "--steps", str(options.steps)], check=True, env=environment)
            continue
        results = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = name, options.steps, folder, results
            ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in (0, 1)]
            for process in ranks:
                process.start()
            every = [results.get(timeout=3600) for _ in ranks]
            for process in ranks:
                process.join(60)
        _row(name, every)


if __name__ == "__main__":
    main()
