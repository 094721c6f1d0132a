"""Gradients of several backward passes, kept until the last of them: the groups of a mini-batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from grain_ddp._core.views import cut

Parts = Sequence[tuple[Hashable, int]]
"""What lies in a bucket, in order: a name of each part, and its number of elements."""


Key = tuple[tuple[Hashable, int], ...]


class Passes:
    """The gradients of m passes, laid out as the transpose sends them.

    A bucket is kept as one block for each piece that `cut` gives: for each rank ``[m, c]``, so that
    all of its columns are together, and arrive as rows. Buckets may change between two passes, as
    DDP's do after its first.
    """

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self.drop()

    def drop(self) -> None:
        """Forget everything."""
        self.done = 0  # passes that are complete
        self._blocks: dict[Key, list[Tensor]] = {}
        self._apart: dict[Hashable, Tensor] = {}  # [m, length], of buckets that are no more

    def add(self, buffer: Tensor, parts: Parts, message: int) -> list[Tensor]:
        """Keep a bucket of this pass. The bucket's blocks, which hold its passes so far.

        `message` is as in `cut`: the same for all passes.
        """
        key, total = tuple(parts), sum(length for _, length in parts)
        if total != len(buffer):
            raise ValueError(
                f"grain_ddp: expected a bucket of {total} elements, but found one of "
                f"{len(buffer)}. All passes of a step need the same parameters."
            )
        if key not in self._blocks:
            self._take_apart({name for name, _ in key}, message)
            self._blocks[key] = [
                buffer.new_zeros(self.m * sum(slot.stop - slot.start for slot in slots))
                for slots in cut(len(buffer), self.n, message)
            ]
            earlier = [self._apart.pop(name, None) for name, _ in key]
            for i in range(self.done):
                row = [
                    buffer.new_zeros(length) if rows is None else rows[i]
                    for rows, (_, length) in zip(earlier, key, strict=True)
                ]
                self._row(key, i, torch.cat(row), message, write=True)
        self._row(key, self.done, buffer, message, write=True)
        return self._blocks[key]

    def mean(self, blocks: list[Tensor], out: Tensor, message: int) -> None:
        """The mean of a bucket's passes."""
        for columns, slot in self._slots(blocks, out, message):
            slot.copy_(columns.mean(0))

    def _take_apart(self, names: set[Hashable], message: int) -> None:
        """Split the buckets that hold some of these into their parts."""
        for key in [key for key in self._blocks if any(name in names for name, _ in key)]:
            lengths = [length for _, length in key]
            rows = self._blocks[key][0].new_zeros(self.m, sum(lengths))
            for i, row in enumerate(rows):
                self._row(key, i, row, message, write=False)
            del self._blocks[key]
            for (name, _), part in zip(key, rows.split_with_sizes(lengths, 1), strict=True):
                self._apart[name] = part

    def _row(self, key: Key, i: int, row: Tensor, message: int, *, write: bool) -> None:
        """Copy pass i of a bucket into its blocks, or out of them."""
        for columns, slot in self._slots(self._blocks[key], row, message):
            if write:
                columns[i] = slot
            else:
                slot.copy_(columns[i])

    def _slots(
        self, blocks: list[Tensor], buffer: Tensor, message: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every rank's columns in the blocks [m, c], and where they are in a bucket [c]."""
        for block, slots in zip(blocks, cut(len(buffer), self.n, message), strict=True):
            lengths = [slot.stop - slot.start for slot in slots]
            parts = block.split_with_sizes([self.m * length for length in lengths])
            for part, slot, length in zip(parts, slots, lengths, strict=True):
                yield part.view(self.m, length), buffer[slot]
