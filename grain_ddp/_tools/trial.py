"""Step times of every way to aggregate, in the same processes.

All variants train the same model and take turns in rounds, each round in the other order, a block
of steps at a time. A ratio compares blocks of one round, so that what else the machine does hits
both.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from grain_ddp._core.state import GrainState
from grain_ddp.ddp import grain_hook
from grain_ddp.sinks import jsonl

PLAIN, NOOP = "plain DDP", "no-op hook"


Options = Mapping[str, Any]
"""Of a `GrainState`."""

WIRES = {"own": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def variants(
    scopes: Sequence[str],
    groups: Sequence[str | int],
    wires: Sequence[str],
    monitor: Sequence[int],
    sketches: Sequence[int] = (),
) -> dict[str, Options | None]:
    """What is compared, by name; None: no `GrainState`."""
    found: dict[str, Options | None] = {PLAIN: None, NOOP: None}
    for group in groups:
        for scope in scopes:
            for wire in wires:
                name = f"GRAIN, {scope}" + ("" if group == "rank" else f", groups of {group}")
                name += "" if wire == "own" else f", {wire} on the wire"
                found[name] = {"scope": scope, "groups": group, "wire_dtype": WIRES[wire]}
        for k in sketches:
            for scope in scopes:
                name = f"GRAIN, {scope}" + ("" if group == "rank" else f", groups of {group}")
                found[f"{name}, sketch of {k}"] = {"scope": scope, "groups": group, "sketch": k}
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
            options["wire_dtype"] = next(n for n, d in WIRES.items() if d == options["wire_dtype"])
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
