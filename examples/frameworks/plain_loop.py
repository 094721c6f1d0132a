"""Digits with a loop of its own, without DDP: `reduce_gradients` before the optimizer's step.

torchrun --nproc_per_node=2 examples/frameworks/plain_loop.py
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from grain_ddp import GrainState, reduce_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    dist.init_process_group("gloo")

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)  # the same model on every rank
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    draw = torch.Generator().manual_seed(dist.get_rank())
    state = GrainState()
    for _ in range(options.steps):
        mine = torch.randint(len(x), (16,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[mine]), y[mine]).backward()
        reduce_gradients(net.parameters(), state)
        optimizer.step()
    with torch.no_grad():
        right = (net(x).argmax(1) == y).float().mean()
    if dist.get_rank() == 0:
        print(f"{100 * right:.1f} % of the images after {state.step} steps")
        print(f"the weights of the last step: {state.last.weights.round(3)}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
