"""Digits with DeepSpeed. The config decides: the stage of ZeRO, and the mean or GRAIN.

    bash examples/zero/run.sh                   # sets up what it needs; stages 0 to 3, 2 workers
    torchrun --nproc_per_node=2 examples/zero/train.py --deepspeed_config examples/zero/stage2.json
    deepspeed --num_gpus 2 examples/zero/train.py --deepspeed_config examples/zero/stage2.json

Without the import below the same script runs as
`torchrun --nproc_per_node=2 -m grain_ddp.deepspeed examples/zero/train.py ...`.
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import grain_ddp.deepspeed  # noqa: F401  makes DeepSpeed look at the "grain" section

TRAIN = 1000  # images; the other 797 are for testing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--deepspeed_config", required=True, help="one of the stage*.json")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    options = parser.parse_args()
    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    engine, *_ = deepspeed.initialize(
        model=net, model_parameters=list(net.parameters()), config=options.deepspeed_config
    )
    size = engine.train_micro_batch_size_per_gpu()
    draw = torch.Generator().manual_seed(rank)
    opposed = [0, 0]  # workers that the mean would have opposed, and that the step opposed
    for _ in range(options.steps):
        for _ in range(engine.gradient_accumulation_steps()):
            mine = train[torch.randint(TRAIN, (size,), generator=draw)]
            engine.backward(cross_entropy(engine(x[mine]), y[mine]))
            engine.step()
        if engine.grain is not None:
            opposed[0] += engine.grain.last.conflicts_mean
            opposed[1] += engine.grain.last.conflicts_aggregate
    with torch.no_grad():
        accuracy = (engine(x[test]).argmax(1) == y[test]).float().mean().item()
    if rank == 0:
        stage = engine.zero_optimization_stage()
        print(
            f"stage {stage}: {100 * accuracy:.1f} % of the test images after {options.steps} steps"
        )
        if engine.grain is not None:
            print(
                f"workers opposed: {opposed[1]} by GRAIN's steps, {opposed[0]} by the mean of the "
                f"same gradients; weights of the last step {engine.grain.last.weights.round(3)}"
            )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
