"""Gradients of several backward passes, kept until the last of them: the groups of a mini-batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from grain_ddp._core.views import cut

Parts = Sequence[tuple[Hashable, int]]
"""What lies in a bucket, in order: a name of each part, and its number of elements."""


class Passes:
    """The gradients of m passes on n ranks, part by part: buckets may change between two passes.

    In the last pass a bucket becomes blocks, as the transpose sends them: one for each piece that
    `cut` gives, and in it for each rank ``[m, c]``, so that all of its columns arrive as rows.
    """

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self.drop()

    def drop(self) -> None:
        """Forget everything."""
        self.done = 0  # passes that are complete
        self._kept: dict[Hashable, Tensor] = {}  # [m, length] of each part

    def add(self, buffer: Tensor, parts: Parts, message: int) -> list[Tensor]:
        """Keep a bucket of this pass. In the last one, the blocks of all passes of it.

        `message` is as in `cut`.
        """
        total = sum(length for _, length in parts)
        if total != len(buffer):
            raise ValueError(
                f"grain_ddp: expected a bucket of {total} elements, but found one of "
                f"{len(buffer)}. All passes of a step need the same parameters."
            )
        lengths = [length for _, length in parts]
        for (name, length), values in zip(parts, buffer.split_with_sizes(lengths), strict=True):
            if name not in self._kept:  # a part that earlier passes lack was zero in them
                self._kept[name] = buffer.new_zeros(self.m, length)
            self._kept[name][self.done] = values
        if self.done < self.m - 1:
            return []
        rows = torch.cat([self._kept.pop(name) for name, _ in parts], 1)
        return [
            torch.cat([rows[:, slot].reshape(-1) for slot in slots])
            for slots in cut(len(buffer), self.n, message)
        ]

    def mean(self, blocks: Sequence[Tensor], out: Tensor, message: int) -> None:
        """The mean of a bucket's passes."""
        for block, slots in zip(blocks, cut(len(out), self.n, message), strict=True):
            start = 0
            for slot in slots:
                stop = start + self.m * (slot.stop - slot.start)
                out[slot] = block[start:stop].view(self.m, -1).mean(0)
                start = stop
