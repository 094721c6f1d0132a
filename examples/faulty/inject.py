"""Faults of one worker: flipped bits in products, weights and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tasks import Batch, Task
from torch import Tensor, nn

PLACES = ("backward", "forward", "weight")


@dataclass(frozen=True)
class Flip:
    """One bit of one number: of a module's output, of the gradient there, or of a weight.

    `module` and `entry` are shares of how many there are.
    """

    place: str
    module: float
    entry: float
    bit: int


def flip_(values: Tensor, flip: Flip) -> None:
    """Flip the bit, in place."""
    number = int(flip.entry * values.numel())
    integers = torch.int32 if values.itemsize == 4 else torch.int16
    flat = values.detach().view(-1).view(integers)
    mask = -(1 << flip.bit) if flip.bit == 8 * values.itemsize - 1 else 1 << flip.bit
    flat[number] ^= mask


@contextmanager
def faulty(model: nn.Module, flip: Flip) -> Iterator[None]:
    """One forward and backward pass with the flip."""
    if flip.place == "weight":
        weights = [p for p in model.parameters() if p.ndim > 1]
        weight = weights[int(flip.module * len(weights))]
        before = weight.detach().clone()
        flip_(weight, flip)
        try:
            yield
        finally:
            weight.data.copy_(before)
        return
    modules = [m for m in model.modules() if not list(m.children())]
    module = modules[int(flip.module * len(modules))]

    def spoiled(gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        flip_(gradient, flip)
        return gradient

    def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if flip.place == "backward":
            if out.requires_grad:
                out.register_hook(spoiled)
            return out
        wrong = out.detach().clone(memory_format=torch.contiguous_format)
        flip_(wrong, flip)
        return wrong + (out - out.detach())  # its gradient is that of out

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def gradients(task: Task, batch: Batch, flip: Flip) -> list[Tensor]:
    """A worker's gradients, with the flip."""
    with faulty(task.model, flip):
        return task.gradients(batch)
