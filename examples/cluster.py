"""Training that any launcher can start, and that goes on where it was broken off. Digits, DDP.

    torchrun --nproc_per_node=2 examples/cluster.py --checkpoint run.pt

Every script in `launch` starts this one. The launcher says which rank a process is: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment. The checkpoint lies where
every host can read it. With the same number of ranks, a run that was broken off, at any moment and
however often, ends with the same parameters, bit by bit, as one that was not.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook

TRAIN, BATCH = 1000, 8  # images; the other 797 are for testing. BATCH is per rank and step


@record  # torchrun then reports the error of the rank that failed first
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the whole run")
    parser.add_argument("--checkpoint", type=Path, help="a file to resume from and to save to")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a lost rank")
    options = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=options.timeout)
    )
    rank, ranks = dist.get_rank(), dist.get_world_size()

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(net)
    state = GrainState()
    model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = {"model": net, "optimizer": optimizer, "grain": state}

    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    if rank == 0:
        print(f"{ranks} ranks, from step {state.step} to {options.steps}", flush=True)

    for step in range(state.step, options.steps):
        draw = torch.Generator().manual_seed(step * ranks + rank)  # no loader to put back in place
        mine = train[torch.randint(TRAIN, (BATCH,), generator=draw)]
        optimizer.zero_grad()
        cross_entropy(model(x[mine].to(device)), y[mine].to(device)).backward()
        optimizer.step()
        if rank == 0 and options.checkpoint and (step + 1) % options.every == 0:
            new = options.checkpoint.with_suffix(".new")
            torch.save({name: part.state_dict() for name, part in parts.items()}, new)
            new.replace(options.checkpoint)  # at no moment is there half a file

    with torch.no_grad():
        right = (net(x[test].to(device)).argmax(1).cpu() == y[test]).float().mean().item()
    if rank == 0:
        print(f"{100 * right:.1f} % of the test images after {options.steps} steps", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
