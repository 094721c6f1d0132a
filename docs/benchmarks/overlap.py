"""A trace of one step: what the backward pass computes, and what the wire carries meanwhile.

    unshare -rn python docs/benchmarks/overlap.py [--ranks 2] [--rate 1gbit] [--out overlap.png]

`unshare -rn` gives the run a loopback interface of its own, which is limited to the rate (with
`tc`, if there is one) so that messages take as long as on a network. A process that computes
nothing reads the interface's counter every half millisecond; the ranks note when each layer's
backward pass ends. An MLP of square layers, each of them a bucket of DDP, on the CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common.loopback import sent
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook

LAYERS, STEPS = 8, 5
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain DDP": None,
    "GRAIN, global": {},
    "GRAIN, bucket": {"scope": "bucket"},
}
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "grain_ddp"])


def work(
    rank: int, n: int, folder: str, width: int, batch: int, variant: str, results: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(LAYERS)]
    # A cap below a layer's size: every layer is a bucket.
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=width * width * 4 / 2**20)
    options = VARIANTS[variant]
    if options is not None:
        model.register_comm_hook(GrainState(**options), grain_hook)
    marks: list[float] = []
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(lambda _: marks.append(time.monotonic()))
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(rank))
    for _ in range(STEPS):
        model.zero_grad()
        loss = model(x).square().mean()
        dist.barrier()
        marks[:] = [time.monotonic()]
        loss.backward()
        marks.append(time.monotonic())
    results.put((rank, marks))
    results.close()
    results.join_thread()  # what was put is on its way
    dist.barrier()
    os._exit(0)


def trace(n: int, width: int, batch: int, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """(marks of rank 0: start, each layer, end; samples [k, 2] of time and bytes), last step."""
    results, samples, stop = context.Queue(), [], threading.Event()

    def sample() -> None:
        while not stop.is_set():
            samples.append((time.monotonic(), sent()))
            time.sleep(5e-4)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                context.Process(target=work, args=(r, n, folder, width, batch, variant, results))
                for r in range(n)
            ]
            for process in ranks:
                process.start()
            marks = dict(results.get(timeout=300) for _ in ranks)[0]
            for process in ranks:
                process.join()
    finally:
        stop.set()
        sampler.join()
    return np.array(marks), np.array(samples)


def draw(traces: dict[str, tuple[np.ndarray, np.ndarray]], out: str, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(traces), 1, figsize=(9, 2.6 * len(traces)), sharex=True)
    for axis, (name, (marks, samples)) in zip(axes, traces.items(), strict=True):
        ms = 1e3 * (marks - marks[0])
        for i in range(LAYERS):
            shade = "0.78" if i % 2 else "0.88"
            axis.axvspan(ms[i], ms[i + 1], color=shade, label=None if i else "backward, by layer")
        axis.axvline(ms[-1], color="black", ls=":", label="backward() returns")
        when = 1e3 * (samples[:, 0] - marks[0])
        inside = (when > -10) & (when < ms[-1] + 10)
        count = samples[inside, 1] - np.interp(0, when, samples[:, 1])
        axis.plot(when[inside], count / 1e6, color="tab:blue", label="sent, all ranks")
        axis.set(ylabel="MB", title=name)
        axis.legend(loc="upper left")
    axes[-1].set_xlabel("ms from the start of the backward pass")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=512, help="examples per rank")
    parser.add_argument("--rate", default="1gbit", help="of the loopback interface, or none")
    parser.add_argument("--out", default="", help="where the picture goes")
    parser.add_argument("--smoke", action="store_true", help="small, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.width, options.batch, options.rate = 64, 8, "none"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if options.rate != "none":
        if len(Path("/proc/net/dev").read_text().splitlines()) > 3:  # two are the heading
            parser.error("start it with `unshare -rn`, or with --rate none")
        shape = f"tc qdisc add dev lo root tbf rate {options.rate} burst 256kb latency 400ms"
        for command in ("ip link set lo up", shape):
            subprocess.run(command.split(), check=True)
    print(
        f"{options.ranks} ranks, one thread each, {LAYERS} layers of {options.width} x "
        f"{options.width}, batch {options.batch}; loopback limited to {options.rate}; "
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores\n"
    )
    print("| | layers computed after ms | backward() returns after ms | sent by then | in all |")
    print("|---|---|---|---|---|")
    traces = {}
    for name in VARIANTS:
        marks, samples = traces[name] = trace(options.ranks, options.width, options.batch, name)
        at = np.interp([marks[0], marks[-2], marks[-1]], samples[:, 0], samples[:, 1])
        computed, returned = 1e3 * (marks[-2:] - marks[0])
        share = (at[1] - at[0]) / max(at[2] - at[0], 1)
        print(
            f"| {name} | {computed:.0f} | {returned:.0f} | {100 * share:.0f} % | "
            f"{(at[2] - at[0]) / 1e6:.1f} MB |",
            flush=True,
        )
    if options.out:
        draw(traces, options.out, f"{options.ranks} ranks, {options.rate}")


if __name__ == "__main__":
    main()
