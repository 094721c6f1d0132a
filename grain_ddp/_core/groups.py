"""Which ranks form a group, whose mean gradient is one row; and what that makes of a Gramian."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grain_ddp._wire.wire import Wire


def partition(groups: str | int | Sequence[Sequence[int]], wire: Wire) -> list[list[int]]:
    """The groups that the option of that name stands for: lists of ranks.

    Raises:
        ValueError: on every rank, if they do not name each rank once.
    """
    n, found = wire.size, [[rank] for rank in range(wire.size)]
    if isinstance(groups, int):
        found = [list(range(first, min(first + groups, n))) for first in range(0, n, groups)]
    elif groups == "node":
        hosts: dict[tuple[str, ...], list[int]] = {}
        for rank, host in enumerate(wire.gather_objects(wire.host(), "the search for hosts")):
            hosts.setdefault(host, []).append(rank)
        found = list(hosts.values())
    elif not isinstance(groups, str):
        found = [list(group) for group in groups]
        if sorted(rank for group in found for rank in group) != list(range(n)):
            raise ValueError(
                f"grain_ddp: groups must name each of the {n} ranks once, but it is {found} "
                f"(this is rank {wire.rank})."
            )
    return found


def levels(groups: Sequence[Sequence[int]], wire: Wire) -> tuple[Wire | None, Wire]:
    """Of groups of one size: the wire inside of the own one, if that is of several ranks, and the
    one across, among the ranks of the same position. Collective."""
    mine = next(group for group in groups if wire.rank in group)
    position = mine.index(wire.rank)
    inside = wire.among(mine, 1) if len(mine) > 1 else None
    if [group[0] for group in groups] == list(range(wire.size)):
        return inside, wire
    return inside, wire.among([group[position] for group in groups], 2)


class Grouping:
    """Groups of ranks as algebra: A G Aᵀ of the ranks' Gramian G, and Aᵀw of the groups' weights w.

    Row g of A has 1/k for each of the k ranks of group g. Of another group's ranks nothing enters,
    not even a NaN, and all sums have one order.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self.groups = [list(group) for group in groups]
        self.sizes = [len(group) for group in groups]
        # Whether each rank is a group, in order.
        self.trivial = self.groups == [[rank] for rank in range(len(groups))]
        # Of each group in the mean over all ranks; None: all alike.
        alike = len(set(self.sizes)) == 1
        self.shares = None if alike else np.array(self.sizes) / sum(self.sizes)
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def gramian(self, gramian: Tensor) -> Tensor:
        """Of the groups' mean gradients, [g, g], from that of the ranks' gradients [n, n]."""
        if self.trivial:
            return gramian
        members, _, sizes = self._on(gramian.device)
        padded = torch.nn.functional.pad(gramian, (0, 1, 0, 1))
        sums = padded[members].sum(1)[:, members].sum(2)
        return sums / sizes.outer(sizes)

    def spread(self, weights: Tensor) -> Tensor:
        """The ranks' weights [n] from the groups' [g]: each rank's is its share of the group's."""
        if self.trivial:
            return weights
        _, groups, sizes = self._on(weights.device)
        return (weights / sizes)[groups]

    def members(self, groups: Sequence[int]) -> list[int]:
        """The ranks of some groups."""
        return [rank for g in groups for rank in self.groups[g]]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Each group's ranks [g, k], padded with n; each rank's group [n]; the sizes [g]."""
        if device not in self._tables:
            n, most = sum(self.sizes), max(self.sizes)
            members = [group + [n] * (most - len(group)) for group in self.groups]
            place = [0] * n
            for g, group in enumerate(self.groups):
                for rank in group:
                    place[rank] = g
            self._tables[device] = (
                torch.tensor(members, device=device),
                torch.tensor(place, device=device),
                torch.tensor(self.sizes, dtype=torch.float64, device=device),
            )
        return self._tables[device]
