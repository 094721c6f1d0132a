"""What the guard costs: steps in pairs with plain DDP's, 10 million parameters.

torchrun --standalone --nproc_per_node=2 examples/faulty/cost.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook

NEVER = 10**9
SETTINGS = {
    "plain DDP": None,
    "mean": GrainState(weighting="mean", record_every=NEVER),
    "mean, warn": GrainState(weighting="mean", guard="warn", record_every=NEVER),
    "mean, drop": GrainState(weighting="mean", guard="drop", record_every=NEVER),
}


def wrapped(state: GrainState | None) -> DistributedDataParallel:
    torch.manual_seed(0)
    layers = [layer for _ in range(10) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    model = DistributedDataParallel(nn.Sequential(*layers))
    if state is not None:
        model.register_comm_hook(state, grain_hook)
    return model


def step(model: DistributedDataParallel, x: torch.Tensor) -> tuple[float, float]:
    """Seconds, and seconds of this process's CPU time."""
    model.zero_grad()
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    model(x).square().mean().backward()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    models = {name: wrapped(state) for name, state in SETTINGS.items()}
    x, times = torch.randn(options.batch, 1024), {name: [] for name in models}
    for k in range(options.pairs + 3):
        for name in list(models)[:: 1 if k % 2 else -1]:
            times[name].append(step(models[name], x))
    if dist.get_rank() == 0:
        plain = times["plain DDP"][3:]
        for name, every in times.items():
            pairs = list(zip(every[3:], plain, strict=True))
            ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
            cpu = sum(ours[1] for ours, _ in pairs) / sum(theirs[1] for _, theirs in pairs)
            print(f"{name}: {ratio:.3f} x the time of plain DDP, {cpu:.3f} x its CPU time")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
