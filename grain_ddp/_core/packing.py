"""Gradients come in all sizes; what travels is flat, and of a size worth a message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def packs(gradients: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, together up to `limit` bytes; a bigger one by itself."""
    pack: list[Tensor] = []
    kind, size = None, 0
    for gradient in gradients:
        found = gradient.dtype, gradient.device
        if pack and (found != kind or size + gradient.nbytes > limit):
            yield pack
            pack, size = [], 0
        pack.append(gradient)
        kind, size = found, size + gradient.nbytes
    if pack:
        yield pack


def flatten(pack: list[Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """A pack as one row [d], and what to call when its values belong back into the gradients.

    A gradient that is by itself and contiguous is not copied.
    """
    if len(pack) == 1 and pack[0].is_contiguous():
        return pack[0].view(-1), lambda: None
    flat = torch.cat([gradient.reshape(-1) for gradient in pack])

    def copy_back() -> None:
        parts = flat.split_with_sizes([gradient.numel() for gradient in pack])
        for gradient, part in zip(pack, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    return flat, copy_back
