"""A cell of the study through DDP and the real hook, against the simulated one.

    torchrun --nproc_per_node=4 examples/study/through_ddp.py --setting "wrong labels"

Each rank is a worker. Seeds, splits, batches, initial weights and learning rate are those that
study.py used for the same cell; results/through_ddp.json keeps what came out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from study import FINAL, STEPS, Cell, Network, draw, rounded, train
from tasks import split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook

RESULTS = Path(__file__).parent / "results"
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {"weighting": "mean"},
    "min_norm": {},
    "cap 2": {"cap": 2},
    "normalize": {"normalize": True},
    "upgrad": {"weighting": "upgrad"},
}


def real(cell: Cell, seed: tuple[int, int], rate: float, steps: int = STEPS) -> dict[str, Any]:
    """One training of this rank as a worker: accuracy on the test part, and Gramians by step."""
    data = split(cell.task, cell.setting, seed[0], cell.workers)
    inputs, outputs = data.x.shape[1], int(data.y.max()) + 1
    w1, b1, w2, b2 = (p[0] for p in Network([seed], inputs, outputs).parts())
    net = nn.Sequential(nn.Linear(*w1.shape), nn.ReLU(), nn.Linear(*w2.shape))
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (w1.T, b1[0], w2.T, b2[0]), strict=True):
            parameter.copy_(value)
    model = DistributedDataParallel(net)
    state = GrainState(**OPTIONS[cell.method])
    model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    gramians = []
    for rows in draw(data, seed, cell)[:steps, dist.get_rank()]:
        optimizer.zero_grad()
        cross_entropy(model(data.x[rows]), data.y[rows]).backward()
        optimizer.step()
        decay.step()
        assert state.last is not None
        gramians.append(state.last.gramian)
    with torch.no_grad():
        right = net(data.x[data.test]).argmax(1) == data.y[data.test]
    return {"test": right.float().mean().item(), "gramians": np.stack(gramians)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", default="wrong labels")
    parser.add_argument("--seeds", type=int, default=len(FINAL))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    text = (RESULTS / "digits.jsonl").read_text().splitlines()
    rates = {Cell(**line["cell"]): line["rate"] for line in map(json.loads, text)}
    seeds, found = FINAL[: arguments.seeds], []
    for method in OPTIONS:
        cell = Cell("digits", arguments.setting, dist.get_world_size(), 4, "sgd", method)
        test = [real(cell, seed, rates[cell])["test"] for seed in seeds]
        if dist.get_rank() == 0:
            simulated = train(cell, seeds, [rates[cell]] * len(seeds))["test"]
            entry = {"cell": asdict(cell), "through ddp": rounded(np.array(test))}
            found.append({**entry, "simulated": rounded(simulated)})
            print(f"{method}: {np.mean(test):.4f}, simulated {simulated.mean():.4f}", flush=True)
    if dist.get_rank() == 0:
        lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in found)
        (RESULTS / "through_ddp.json").write_text(f"[\n{lines}\n]\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
