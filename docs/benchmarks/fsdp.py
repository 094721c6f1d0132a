"""Bytes, memory and time of a training step, plain FSDP2 against GRAIN, as a Markdown table.

    unshare -rn python docs/benchmarks/fsdp.py [--ranks 4] [--width 1024] [--steps 10]

An MLP of 8 square layers, each an FSDP unit, fp32, SGD, on the CPU. Bytes are counted on the
loopback interface, and are those of the whole step, the gathers of parameters included, divided by
the ranks. `unshare -rn` gives the run a loopback interface of its own, so that nobody else's bytes
are counted. Memory is that of tensors, as PyTorch's profiler counts it.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common.loopback import loopback_up, measure, sent
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from grain_ddp import GrainState, fsdp

LAYERS = 8
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["grain_ddp.fsdp", "torch._dynamo"])


def memory(step) -> int:
    """The most bytes of tensors that are held at once during a step, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def work(rank, n, folder, width, steps, options, results) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(LAYERS)])
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    if options is not None:
        fsdp.apply(model, GrainState(scope="bucket", **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(rank))

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    times, count = [], []
    for k in range(steps + 2):
        dist.barrier()
        time.sleep(0.05)  # the barrier's own bytes arrive
        before, start = sent(), time.perf_counter()
        dist.barrier()
        step()
        dist.barrier()
        spent, after = time.perf_counter() - start, sent()
        if k >= 2:
            times.append(spent)
            count.append(after - before)
    results.put((statistics.median(times), memory(step), statistics.median(count) / n))
    results.close()
    results.join_thread()  # sent, before the process ends in haste
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    options = parser.parse_args()
    if options.smoke:
        options.ranks, options.width, options.steps = 2, 64, 2
    loopback_up()
    size = LAYERS * options.width * (options.width + 1) * 4 / 2**20
    print(
        f"{options.ranks} ranks, {size:.1f} MiB of gradients in {LAYERS} units, "
        f"{platform.machine()} with {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}\n"
    )
    part = (options.ranks - 1) / options.ranks
    print(
        f"Computed, MiB sent per rank: {2 * size * part:.2f} by the gathers of the parameters for "
        f"the forward and the backward pass, {size * part:.2f} by a reduce-scatter\n"
    )
    print("| gradients | MiB sent per rank | peak MiB | ms per step | time / plain |")
    print("|---|---|---|---|---|")
    plain = 0.0
    for name, state in {
        "plain": None,
        "min-norm": {},
        "monitor mode": {"weighting": "mean"},
        "min-norm, bf16 on the wire": {"wire_dtype": torch.bfloat16},
    }.items():
        seconds, peak, wire = measure(
            context, work, options.ranks, options.width, options.steps, state
        )
        plain = plain or seconds
        print(
            f"| {name} | {wire / 2**20:.2f} | {peak / 2**20:.1f} "
            f"| {1000 * seconds:.0f} | {seconds / plain:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
