"""Digits with FSDP2 and GRAIN. On CPUs, or on the GPUs that are there.

    torchrun --standalone --nproc_per_node=4 examples/fsdp.py
    torchrun --standalone --nproc_per_node=4 examples/fsdp.py --weighting mean

Two lines below are grain_ddp's: the import and `fsdp.apply`.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from grain_ddp import GrainState, fsdp

TRAIN = 1000  # images; the other 797 are for testing
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--weighting", choices=["min_norm", "mean", "inverse_norm"])
    parser.set_defaults(weighting="min_norm")
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32, device=device)
    y = torch.tensor(labels, device=device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
        nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
        nn.Linear(64, 10),
    ).to(device)
    for block in (model[0], model[1], model):  # the last layer is the root's
        fully_shard(block)
    state = GrainState(scope="bucket", weighting=options.weighting)
    fsdp.apply(model, state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    draw = torch.Generator().manual_seed(1 + rank)
    opposed = [0, 0]  # workers that the mean would have opposed, and that the step opposed
    for _ in range(options.steps):
        mine = train[torch.randint(TRAIN, (BATCH,), generator=draw)]
        optimizer.zero_grad()
        cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()
        if state.last is not None:  # it is None on one rank, where nothing is reduced
            opposed[0] += state.last.conflicts_mean
            opposed[1] += state.last.conflicts_aggregate
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    if rank == 0:
        print(f"{100 * accuracy:.1f} % of the test images after {options.steps} steps")
        print(f"workers opposed: {opposed[1]} by these steps, {opposed[0]} by the mean")
        if state.last is not None:
            print("weights of the last step, one row per FSDP unit:")
            print(state.last.weights.round(3))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
