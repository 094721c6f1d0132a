"""Memory that is used again from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

_GRAIN = 64  # bytes: sizes are multiples of it, so that a view as any dtype is aligned


class Scratch:
    """Flat byte buffers, lent and taken back; those not lent are kept for the next step."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []  # the smallest first
        self._held = 0  # bytes lent or kept
        self.lent = 0  # bytes

    def lend(self, count: int, device: torch.device, limit: int) -> Tensor:
        """At least that many bytes. What is kept makes room, so that all is within the limit."""
        self._shrink(limit)
        for i, buffer in enumerate(self._kept):
            if buffer.nbytes >= count and buffer.device == device:
                self.lent += buffer.nbytes
                return self._kept.pop(i)
        size = -(-count // _GRAIN) * _GRAIN
        self._shrink(limit - size)
        self._held += size
        self.lent += size
        return torch.empty(size, dtype=torch.uint8, device=device)

    def take_back(self, buffer: Tensor) -> None:
        """Keep a buffer that was lent."""
        self.lent -= buffer.nbytes
        self._kept.append(buffer)
        self._kept.sort(key=lambda one: one.nbytes)

    def _shrink(self, limit: int) -> None:
        while self._kept and self._held > limit:
            self._held -= self._kept.pop().nbytes
