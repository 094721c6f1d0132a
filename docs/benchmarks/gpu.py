"""What GRAIN costs on one GPU, as a Markdown record: the passes, the solve, and a step.

    python docs/benchmarks/gpu.py              # on a machine with a GPU
    python docs/benchmarks/gpu.py --smoke      # tiny sizes; without a GPU: in Triton's interpreter

Bandwidth of the two passes is bytes read and written over time, against that of a copy of as many
bytes. A step is that of `Aggregation` over a wire that ends in this GPU: the slices of the gradient
stand in for the other ranks' rows, and a message is a copy. Times are medians, by CUDA events.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from grain_ddp import GrainState
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._math import gramian
from grain_ddp._math.weighting import weigh_tensor
from grain_ddp._wire.wire import Transfer, Wire

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LocalWire(Wire):
    """Rank 0 of n ranks, alone: what it sends to rank j is what it receives from there."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)

    def exchange(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], what: object = ""
    ) -> Transfer:
        for j in range(1, self.size):
            receive[j].copy_(send[j]) if len(send[j]) == len(receive[j]) else receive[j].zero_()
        return Transfer()

    def sum(self, values: Tensor, what: object = "") -> tuple[Transfer, Tensor]:
        return Transfer(), values.expand(self.size, -1)

    def all_reduce(self, values: Tensor, what: object = "") -> Transfer:
        return Transfer()

    def gather_objects(self, value: Any, what: object = "") -> list[Any]:
        return [value] * self.size


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after two that warm up."""
    found = []
    for _ in range(repeats + 2):
        if DEVICE.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            function()
            found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found[2:])


def passes(sizes: Sequence[int], total: int, repeats: int) -> None:
    print("| dtype | n | copy, GB/s | Gramian, GB/s | of copy | weighted sum, GB/s | of copy |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        flat = torch.randn(total // dtype.itemsize, device=DEVICE).to(dtype)
        half, other = flat.chunk(2)
        copy = flat.nbytes / milliseconds(lambda a=half, b=other: a.copy_(b), repeats) / 1e6
        for n in sizes:
            rows = flat[: len(flat) // n * n].view(n, -1)
            weights = torch.full((n,), 1 / n, dtype=torch.float64, device=DEVICE)
            out = torch.empty_like(rows[0])
            read = rows.nbytes / milliseconds(lambda r=rows: gramian.gramian(r), repeats) / 1e6
            moved = rows.nbytes + out.nbytes
            took = milliseconds(
                lambda r=rows, w=weights, o=out: gramian.weighted_sum(r, w, o), repeats
            )
            summed = moved / took / 1e6
            print(
                f"| {str(dtype)[6:]} | {n} | {copy:.4g} | {read:.4g} | {read / copy:.2f} | "
                f"{summed:.4g} | {summed / copy:.2f} |",
                flush=True,
            )


def solves(sizes: Sequence[int], repeats: int) -> None:
    print("\n| n | gradients | solve, ms |\n|---|---|---|")
    for n in sizes:
        for name, common in (("independent", 0.0), ("correlated", 3.0)):
            rows = torch.randn(n, 4 * n, dtype=torch.float64, device=DEVICE) + common
            matrix = rows @ rows.T
            took = milliseconds(lambda m=matrix: weigh_tensor(m, "min_norm"), repeats)
            print(f"| {n} | {name} | {took:.3f} |", flush=True)


def steps(sizes: Sequence[int], bucket: int, repeats: int) -> None:
    print("\n| n | scope | step, ms | two copies of the gradient, ms |\n|---|---|---|---|")
    buckets = [torch.randn(bucket // 4, device=DEVICE) for _ in range(4)]
    others = [torch.empty_like(b) for b in buckets]

    def copies() -> None:
        for _ in range(2):
            for a, b in zip(others, buckets, strict=True):
                a.copy_(b)

    for n in sizes:
        for scope in ("global", "bucket"):
            aggregation = Aggregation(GrainState(scope=scope), LocalWire(n))

            def step(aggregation: Aggregation = aggregation) -> None:
                for buffer in others:
                    aggregation.push(buffer)
                aggregation.finish()

            copies()
            print(
                f"| {n} | {scope} | {milliseconds(step, repeats):.3f} | "
                f"{milliseconds(copies, repeats):.3f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--mib", type=int, default=512, help="of the rows, in each dtype")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    total, bucket = options.mib << 20, 25 << 20
    if options.smoke:
        options.sizes, options.repeats, total, bucket = [2, 5], 1, 1 << 14, 1 << 12
    if DEVICE.type == "cpu":
        print("There is no GPU here: these numbers say that the program runs, and nothing else.")
        if not options.smoke:
            raise SystemExit("Run it on a machine with a GPU, or with --smoke.")
        gramian.DEVICES.add("cpu")
    if not gramian.has_kernels(torch.empty(0, device=DEVICE)):
        print("Triton is not installed: this is what PyTorch's own operations do.")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    print(f"{name}, Python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"{total >> 20} MiB of rows, median of {options.repeats}\n")
    passes(options.sizes, total, options.repeats)
    solves(options.sizes, options.repeats)
    steps(options.sizes, bucket, options.repeats)


if __name__ == "__main__":
    main()
