"""Step time of GRAIN and of monitor mode against plain DDP, as a Markdown table.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 docs/benchmarks/step_time.py
    python docs/benchmarks/step_time.py --smoke     # one rank, a few steps

All variants train the same model in the same processes and take turns in blocks of ten steps, so
that each block of record_every=10 holds one record. Times are medians over the blocks of a rank-0
clock; a ratio is the median of the ratios to plain DDP's block of the same round. The no-op hook
leaves out all communication. Monitor mode's records go to a JSONL file, as a user's would.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook, noop_hook
from grain_ddp.sinks import jsonl

STEPS = 10  # in a block
VARIANTS: dict[str, dict[str, Any] | None] = {  # options of GrainState; None: no hook of ours
    "plain DDP": None,
    "no-op hook": None,
    "GRAIN, global": {},
    "GRAIN, bucket": {"scope": "bucket"},
    "GRAIN, global, bf16 on the wire": {"wire_dtype": torch.bfloat16},
    "monitor, every step": {"weighting": "mean"},
    "monitor, every 10th step": {"weighting": "mean", "record_every": 10},
}


def model(name: str, width: int, log: Path) -> DistributedDataParallel:
    torch.manual_seed(0)
    layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    net = DistributedDataParallel(nn.Sequential(*layers, nn.Linear(width, 10)))
    options = VARIANTS[name]
    if name == "no-op hook":
        net.register_comm_hook(None, noop_hook)
    elif options is not None:
        sink = jsonl(log) if "weighting" in options else None
        net.register_comm_hook(GrainState(on_step=sink, **options), grain_hook)
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
                name: model(name, width, Path(folder, f"{width}-{k}.jsonl"))
                for k, name in enumerate(VARIANTS)
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
    dist.barrier()  # gloo's threads are done with the last all-reduce before Python exits
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
