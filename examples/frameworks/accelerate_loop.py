"""Digits with Accelerate: two lines after `prepare`.

torchrun --nproc_per_node=2 examples/frameworks/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/frameworks/accelerate_loop.py
"""

from __future__ import annotations

import argparse
import itertools

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grain_ddp import GrainState, grain_hook


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, optimizer, loader = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), lr=0.3), DataLoader(data, 8, shuffle=True)
    )
    state = GrainState()
    model.register_comm_hook(state, grain_hook)

    opposed = [0, 0]  # workers that the mean would have opposed, and that the step opposed
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    while state.step < options.steps:
        for x, y in itertools.islice(batches, 2):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        opposed[0] += state.last.conflicts_mean
        opposed[1] += state.last.conflicts_aggregate
    with torch.no_grad():
        inputs, classes = (tensor.to(accelerator.device) for tensor in data.tensors)
        right = (net(inputs).argmax(1) == classes).float().mean()
    accelerator.print(
        f"{100 * right:.1f} % of the training images after {state.step} steps; workers opposed: "
        f"{opposed[1]} by GRAIN's steps, {opposed[0]} by the mean of the same gradients"
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
