"""Digits with Lightning: a callback beside the DDP strategy.

python examples/frameworks/lightning_module.py --workers 2     # Lightning starts them
torchrun --nproc_per_node=2 examples/frameworks/lightning_module.py --workers 2
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from grain_ddp import GrainState
from grain_ddp.lightning import GrainCallback


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    pl.seed_everything(0)
    state, module = GrainState(), Digits()
    trainer = pl.Trainer(
        strategy="ddp",
        devices=options.workers,
        max_steps=options.steps,
        accumulate_grad_batches=2,
        callbacks=[GrainCallback(state)],
        logger=False,  # with one, the records are in its metrics, as grain/gap and so on
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    with torch.no_grad():
        right = (module.net(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
    if trainer.is_global_zero:
        print(f"{100 * right:.1f} % of the training images after {state.step} steps")
        print(f"the weights of the last step: {state.last.weights.round(3)}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
