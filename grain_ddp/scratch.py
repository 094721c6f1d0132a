"""Memory that is used again from step to step."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Scratch:
    """Flat byte buffers, lent and taken back; those not lent are kept for the next step."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
        self.lent = self._kept = 0  # bytes

    def lend(self, count: int, device: torch.device, limit: int) -> Tensor:
        free = self._free[device, count]
        fits = self.lent + self._kept <= limit
        self.lent += count
        if free and fits:
            self._kept -= count
            return free.pop()
        if self.lent + self._kept > limit:
            self._free.clear()
            self._kept = 0
        return torch.empty(count, dtype=torch.uint8, device=device)

    def take_back(self, buffer: Tensor) -> None:
        self.lent -= len(buffer)
        self._kept += len(buffer)
        self._free[buffer.device, len(buffer)].append(buffer)
