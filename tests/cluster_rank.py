"""What a rank of tests/test_cluster.py runs: `cluster_rank.py FUNCTION FOLDER`, then its options.

The rank's findings go to FOLDER/RANK.json; an error that is expected is a finding.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle import min_norm_point
from ranks import flat, local_gradients, loss, network, relative_error, same_everywhere
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook
from grain_ddp._wire import torch_wire

HOST = int(os.environ["NODE_RANK"])
torch_wire.RING_BYTES = 1 << 10  # gathers by a ring, though gradients are small


def wrap(net: nn.Module, state: GrainState | None, bucket: float = 0.001) -> Any:
    model = DistributedDataParallel(net, bucket_cap_mb=bucket)
    if state is not None:
        model.register_comm_hook(state, grain_hook)
    return model


def sent() -> int:
    """Bytes that this host has sent on its link."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            return int(counts.split()[8])
    raise AssertionError("no eth0")


def step_bytes(state: GrainState | None) -> int:
    """What this host sends in one step with 4 MB of gradients, and in what belongs to it.

    The least of several steps: now and then TCP sends something twice.
    """
    net = nn.Sequential(nn.Linear(1000, 500), nn.Tanh(), nn.Linear(500, 1000))
    model = wrap(net, state, bucket=1)
    counts = []
    for _ in range(6):
        dist.barrier()
        before = sent()
        dist.barrier()
        model(torch.randn(2, 1000)).square().mean().backward()
        dist.barrier()
        counts.append(sent() - before)
    return min(counts[1:])  # the first step builds the buckets, and compares the options


def training(_: Path) -> dict[str, Any]:
    """Errors against the reference and plain DDP; bytes; the error where options differ."""
    state = GrainState()
    others = GrainState(weighting="mean"), None, GrainState(groups="node")
    model, mean, plain, nodes = (wrap(network(), s) for s in (state, *others))
    per_host = int(os.environ["PER_HOST"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    worst = worst_mean = worst_nodes = 0.0
    same = True
    for step in range(4):
        rows = local_gradients(model.module, step)
        for twin in (mean, plain, nodes):
            twin.module.load_state_dict(model.module.state_dict())
        for one in (model, mean, plain, nodes):
            one.zero_grad()
            loss(one, step).backward()
        found, averaged, expected, between = (
            flat(p.grad for p in one.parameters()) for one in (model, mean, plain, nodes)
        )
        exact = torch.from_numpy(min_norm_point(rows.view(-1, per_host, rows.shape[1]).mean(1)))
        worst_nodes = max(worst_nodes, relative_error(between, exact))
        same &= same_everywhere(between)
        worst = max(worst, relative_error(found, torch.from_numpy(min_norm_point(rows))))
        worst_mean = max(worst_mean, relative_error(averaged, expected))
        optimizer.step()
        assert state.last is not None
        same &= same_everywhere(flat(model.parameters()))
        same &= same_everywhere(torch.from_numpy(state.last.weights))
    sizes = {"plain": step_bytes(None), "grain": step_bytes(GrainState())}
    sizes["nodes"] = step_bytes(GrainState(groups="node"))
    sizes["sketch"] = step_bytes(GrainState(sketch=1 << 13))
    unequal = wrap(network(), GrainState(cap=2.0 if HOST == 1 else None))
    try:
        loss(unequal, 0).backward()
        error = "none"
    except ValueError as raised:
        error = str(raised)
    return {
        "error": worst,
        "mean": worst_mean,
        "nodes": worst_nodes,
        "same": same,
        "bytes": sizes,
        "options": error,
    }


def losing(folder: Path, fault: str, lost: int, at: int = 5, steps: int = 20) -> dict[str, Any]:
    """Train until rank `lost` is lost in the middle of step `at`; how the rank got to know."""
    state = GrainState()
    model = wrap(network(), state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    now = -1

    def strike(_: torch.Tensor) -> None:
        """In the backward pass, when the gradients of the last layers have been sent."""
        if now == at and dist.get_rank() == lost:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / "ready").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)

    model.module[0].weight.register_hook(strike)
    complete = flat(model.parameters()).clone()
    for step in range(steps):
        now = step
        begin = time.monotonic()
        try:
            optimizer.zero_grad()
            loss(model, step).backward()
        except RuntimeError as error:
            found = flat(model.parameters())
            return {
                "seconds": time.monotonic() - begin,
                "error": str(error),
                "cause": str(error.__cause__),
                "step": state.step,
                "whole": torch.equal(found, complete),
                "pending": state.owner.aggregation.pending,
                "parameters": hashlib.sha256(found.numpy().tobytes()).hexdigest(),
            }
        optimizer.step()
        complete = flat(model.parameters()).clone()
    return {"step": state.step, "same": same_everywhere(complete)}


def main() -> None:
    function, folder, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(os.environ["TIMEOUT"])))
    torch.manual_seed(dist.get_rank())
    options = [int(a) if a.isdigit() else a for a in arguments]
    result = {"training": training, "losing": losing}[function](Path(folder), *options)
    done = Path(folder, f"{dist.get_rank()}.new")
    done.write_text(json.dumps({"host": HOST, **result}))
    done.rename(done.with_suffix(".json"))
    expected = dist.get_world_size() - (arguments[:1] == ["kill"])
    until = time.monotonic() + 20
    # Nobody leaves while another still talks to it, and would find this rank lost.
    while len(list(Path(folder).glob("*.json"))) < expected and time.monotonic() < until:
        time.sleep(0.02)
    os._exit(0)  # not waiting for gloo's threads, which may wait for a lost rank


if __name__ == "__main__":
    main()
