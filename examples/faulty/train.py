"""A worker whose gradients get a flipped bit now and then, under torchrun.

    torchrun --standalone --nproc_per_node=4 examples/faulty/train.py --guard drop
    torchrun --standalone --nproc_per_node=4 examples/faulty/train.py --guard none

Rank 1 is the faulty one. Where it is suspect, every rank asks `replay`: the machine or the batch?
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.distributed as dist
from inject import Flip, faulty
from tasks import Batch, characters
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook, replay

FAULTY = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--guard", choices=["none", "warn", "drop"], default="drop")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--first", type=int, default=100, help="the first step with a fault")
    parser.add_argument("--sound", action="store_true", help="without faults")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, rng = dist.get_rank(), np.random.default_rng(0)
    task = characters(0)
    model = DistributedDataParallel(task.model)
    guard = None if options.guard == "none" else options.guard
    state = GrainState(weighting="mean", guard=guard, record_every=100, check_replicas=50)
    model.register_comm_hook(state, grain_hook)

    def backward(batch: Batch) -> float:
        loss = task.loss(model(batch[0]), batch[1])
        loss.backward()
        return float(loss)

    losses = []
    for step in range(options.steps):
        flip = Flip("backward", rng.random(), rng.random(), 30)  # on every rank the same draws
        broken = step >= options.first and step % 10 == 0 and not options.sound
        for group in task.optimizer.param_groups:
            group["lr"] = task.rate(step)
        task.optimizer.zero_grad()
        batch = task.batch(step, rank)
        if broken and rank == FAULTY:
            with faulty(model.module, flip):
                losses.append(backward(batch))
        else:
            losses.append(backward(batch))
        if state.last is not None and state.last.step == step and state.last.suspects:
            found = replay(backward, batch, state)
            if rank == 0:
                print(f"step {step}: {found}")
        task.optimizer.step()
    mean = torch.tensor(np.mean(losses[-20:]))
    dist.all_reduce(mean)
    if rank == 0:
        print(f"guard {options.guard}: loss {mean / dist.get_world_size():.3f} at the end")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
