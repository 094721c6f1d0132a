"""Bytes, memory and time of a training step, plain DeepSpeed against GRAIN, as a Markdown table.

    unshare -rn python docs/benchmarks/zero.py [--ranks 4] [--width 1024] [--steps 10]

An MLP of 8 square layers, fp32, SGD, on the CPU. Bytes are counted on the loopback interface, and
are those of the whole step, the gathers of parameters included, divided by the ranks. `unshare -rn`
gives the run a loopback interface of its own, so that nobody else's bytes are counted. Memory is
the most that a rank's resident memory grows in a step, over what it holds when DeepSpeed is ready.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from common.loopback import loopback_up, measure, sent
from torch import nn

LAYERS = 8
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # a freed tensor's memory is the system's again
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["deepspeed", "torch._inductor.compile_fx"])


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024


def work(rank, n, folder, width, steps, stage, grain, bucket, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    store = dist.FileStore(str(Path(folder, "store")), n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
    import deepspeed

    import grain_ddp.deepspeed  # noqa: F401

    # Compiled at the first use, and only for inference.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(LAYERS)])
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket * width * (width + 1)},
    }
    if grain:
        settings["grain"] = {"enabled": True, **grain}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(rank))
    times, grown, count = [], [], []
    rest = memory("VmRSS")
    for step in range(steps + 2):
        dist.barrier()
        time.sleep(0.05)  # the barrier's own bytes arrive
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before, start = sent(), time.perf_counter()
        dist.barrier()
        engine.backward(engine(x).square().mean())
        engine.step()
        dist.barrier()
        spent, after = time.perf_counter() - start, sent()
        if step >= 2:
            times.append(spent)
            grown.append(memory("VmHWM") - rest)
            count.append(after - before)
    results.put((statistics.median(times), max(grown), statistics.median(count) / n))
    results.close()
    results.join_thread()  # or os._exit, below, may come before it is sent
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bucket", type=int, default=2, help="layers per reduction bucket")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    options = parser.parse_args()
    if options.smoke:
        options.ranks, options.width, options.steps = 2, 64, 2
    loopback_up()
    size = LAYERS * options.width * (options.width + 1) * 4 / 2**20
    print(
        f"{options.ranks} ranks, {size:.1f} MiB of gradients, {options.bucket} of {LAYERS} layers "
        f"per bucket, {platform.machine()} with {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, DeepSpeed "
        f"{version('deepspeed')}\n"
    )
    print("| stage | gradients | MiB sent per rank | peak MiB | ms per step | time / plain |")
    print("|---|---|---|---|---|---|")
    for stage in [2] if options.smoke else range(4):
        plain = 0.0
        for name, grain in {
            "plain": None,
            "bucket": {"scope": "bucket"},
            "global": {"scope": "global"},
        }.items():
            arguments = options.width, options.steps, stage, grain, options.bucket
            seconds, peak, wire = measure(context, work, options.ranks, *arguments)
            plain = plain or seconds
            print(
                f"| {stage} | {name} | {wire / 2**20:.2f} | {peak / 2**20:.1f} "
                f"| {1000 * seconds:.0f} | {seconds / plain:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
