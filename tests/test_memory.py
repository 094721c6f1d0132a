"""Under DDP GRAIN holds two buckets more than plain DDP does, at most."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook

BUCKET = 25 << 20  # bytes, as DDP has them; the model has three
SLACK = 2 << 20  # what an allocator does, and gloo's own buffers

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory"
)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def peak(options: dict[str, Any] | None) -> int:
    """By how much this rank's memory grows, at most, from a built model to several steps of it."""
    # What is freed goes back to the system at once: M_MMAP_THRESHOLD of 1 MiB.
    assert ctypes.CDLL(None).mallopt(-3, 1 << 20)
    x = torch.randn(2, int((BUCKET / 4) ** 0.5))
    grown = 0
    for width in (16, x.shape[1]):  # the first loads the libraries
        layers = (nn.Linear(width, width, bias=False) for _ in range(3))
        model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=BUCKET / 2**21)
        if options is not None:
            model.register_comm_hook(GrainState(**options), grain_hook)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident("VmRSS")
        for _ in range(4):
            model.zero_grad()
            model(x[:, :width]).square().mean().backward()
        grown = resident("VmHWM") - before
    return grown


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "bucket", "wire_dtype": torch.bfloat16},
    {"groups": 2},
    {"scope": "bucket"},
    {"wire_dtype": torch.bfloat16},
]


@pytest.mark.parametrize(("n", "options"), [(2, OPTIONS), (4, OPTIONS[:3])], ids=["2", "4"])
def test_extra_memory(n: int, options: list[dict[str, Any]]) -> None:
    plain = max(run(n, peak, None))
    for one in options:
        extra = max(run(n, peak, one)) - plain
        print(f"{n} ranks, {one}: {extra / BUCKET:+.2f} buckets")
        assert extra <= 2 * BUCKET + SLACK, one
