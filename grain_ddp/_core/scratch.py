"""Memory for what arrives, within a bound, and used again from step to step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_GRAIN = 128  # bytes: sizes are multiples of it, so that a view as any dtype is aligned


class Holder(Protocol):
    """Somebody who was lent memory, and can do without it."""

    def give_back(self) -> None:
        """Call `Scratch.take_back`, after whatever lets it."""


class Scratch:
    """Flat byte buffers, one for each holder. Those that nobody holds are kept for the next step.

    Where all of them would exceed the limit, the holder that has had its own the longest gives it
    back first.
    """

    def __init__(self) -> None:
        self._holders: dict[Holder, Tensor] = {}  # the oldest first
        self._kept: list[Tensor] = []  # the smallest first
        self._size = 0  # bytes of all buffers
        self.lent = 0  # bytes of those that somebody holds

    def lend(self, holder: Holder, count: int, device: torch.device, limit: int) -> Tensor:
        """At least that many bytes, flat."""
        while self._holders and self.lent + count > limit:
            next(iter(self._holders)).give_back()
        buffer = self._take(count, device, max(limit, count))
        self._holders[holder] = buffer
        self.lent += buffer.nbytes
        return buffer

    def take_back(self, holder: Holder) -> None:
        """Keep what that holder was lent, if it holds anything."""
        buffer = self._holders.pop(holder, None)
        if buffer is not None:
            self.lent -= buffer.nbytes
            self._kept.append(buffer)
            self._kept.sort(key=lambda one: one.nbytes)

    def _take(self, count: int, device: torch.device, limit: int) -> Tensor:
        self._shrink(limit)
        for i, buffer in enumerate(self._kept):
            if buffer.nbytes >= count and buffer.device == device:
                return self._kept.pop(i)
        size = -(-count // _GRAIN) * _GRAIN
        self._shrink(limit - size)
        self._size += size
        return torch.empty(size, dtype=torch.uint8, device=device)

    def _shrink(self, limit: int) -> None:
        while self._kept and self._size > limit:
            self._size -= self._kept.pop().nbytes
