"""Step time of monitor mode against plain DDP, as a Markdown table.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 docs/benchmarks/monitor.py
    python docs/benchmarks/monitor.py --smoke     # one rank, a few steps

All variants train the same model in the same processes and take turns in blocks of ten steps, so
that each block of record_every=10 holds one record. Times are medians over the blocks of a rank-0
clock; a ratio is the median of the ratios to plain DDP's block of the same round. Records go to a
JSONL file, as a user's would.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook
from grain_ddp.sinks import jsonl

STEPS = 10  # in a block
EVERY = {"plain DDP": None, "monitor, every step": 1, "monitor, every 10th step": 10}


def model(width: int, every: int | None, log: Path) -> DistributedDataParallel:
    torch.manual_seed(0)
    layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    net = DistributedDataParallel(nn.Sequential(*layers, nn.Linear(width, 10)))
    if every is not None:
        state = GrainState(weighting="mean", record_every=every, on_step=jsonl(log))
        net.register_comm_hook(state, grain_hook)
    return net


def block(net: DistributedDataParallel, x: torch.Tensor) -> float:
    """Seconds per step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    dist.barrier()
    return (time.perf_counter() - start) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768, 2400])
    parser.add_argument("--batch", type=int, default=8, help="examples per rank and step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.widths, options.rounds = [32], 1
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    say = print if dist.get_rank() == 0 else lambda *_, **__: None
    say(
        f"{dist.get_world_size()} ranks, batch {options.batch}, {options.rounds} rounds, "
        f"Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    say("| parameters | variant | ms per step | ratio | quartiles of the ratio |")
    say("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for width in options.widths:
            x = torch.randn(options.batch, width)
            nets = {
                name: model(width, every, Path(folder, f"{width}-{every}.jsonl"))
                for name, every in EVERY.items()
            }
            times: dict[str, list[float]] = {name: [] for name in nets}
            for round_ in range(options.rounds + 1):
                names = list(nets)[:: 1 if round_ % 2 else -1]  # nobody always goes first
                for name in names:
                    seconds = block(nets[name], x)
                    if round_:  # the first warms up
                        times[name].append(seconds)
            plain = np.array(times["plain DDP"])
            count = sum(p.numel() for p in nets["plain DDP"].parameters())
            for name, found in times.items():
                low, middle, high = np.percentile(np.array(found) / plain, [25, 50, 75])
                say(
                    f"| {count / 1e6:.2f} M | {name} | {1e3 * np.median(found):.1f} | "
                    f"{middle:.3f} | {low:.3f} to {high:.3f} |",
                    flush=True,
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
