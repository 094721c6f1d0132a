"""Which ranks form a group, whose mean gradient is one row; and what that makes of a Gramian."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grain_ddp._core.state import GrainState
from grain_ddp._math.record import Array
from grain_ddp._math.weighting import SHORT
from grain_ddp._wire.wire import Wire


def partition(groups: str | int | Sequence[Sequence[int]], wire: Wire) -> list[list[int]]:
    """The groups that the option of that name stands for: lists of ranks.

    Raises:
        ValueError: on every rank, if they do not name each rank once.
    """
    n, found = wire.size, [[rank] for rank in range(wire.size)]  # "label": what ranks say later
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


def in_levels(groups: Sequence[Sequence[int]], state: GrainState) -> bool:
    """Whether the means of the groups can be formed inside of them first: all are of one size.

    Not if that is one rank, and they are in another order than the ranks.
    """
    sizes, first = set(map(len, groups)), [group[0] for group in groups]
    shuffled = sizes == {1} and first != sorted(first)
    return len(sizes) == 1 and not shuffled and "samples" not in state.batches.told


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
    """Groups of rows as algebra: A G Aᵀ of the rows' Gramian G, and Aᵀw of the groups' weights w.

    A group's gradient is the mean of its rows', weighed by their `counts` [n] of samples (None: all
    alike): row g of A has cᵢ/Σc for each row i of group g. Nothing enters of other groups' rows, or
    of rows of 0 samples, not even a NaN; and all sums have one order. A group may be empty.

    Attributes:
        shares: of each group in the mean over all samples, [g]; None: all alike.
        unused: the rows of 0 samples.
    """

    def __init__(self, groups: Sequence[Sequence[int]], counts: Array | None = None) -> None:
        self.groups = [list(group) for group in groups]
        n = sum(map(len, self.groups))
        # Whether each row is a group, in order, and counts.
        self.trivial = self.groups == [[row] for row in range(n)]
        self._counts = np.ones(n) if counts is None else counts
        self.unused = np.flatnonzero(self._counts == 0).tolist()
        self.trivial &= not self.unused
        totals = np.array([self._counts[group].sum() for group in self.groups])
        self._totals = np.where(totals == 0, 1, totals)
        alike = len(set(totals.tolist())) == 1
        self.shares = None if alike else totals / totals.sum()
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def gramian(self, gramian: Tensor) -> Tensor:
        """Of the groups' mean gradients, [g, g], from that of the rows [n, n]."""
        if self.trivial:
            return gramian
        members, _, scale = self._on(gramian.device)
        used = scale > 0
        zero = torch.zeros((), dtype=gramian.dtype, device=gramian.device)
        scaled = torch.where(used & used[:, None], gramian * scale * scale[:, None], zero)
        padded = torch.nn.functional.pad(scaled, (0, 1, 0, 1))
        found = padded[members].sum(1)[:, members].sum(2)
        found.diagonal().clamp_(min=0)  # squares, also where a group's rows cancel to rounding
        return found

    def cancels(self, gramian: Tensor) -> bool:
        """Whether a group's mean is so short beside its rows that their rounding errors show.

        Those of products in fp32: see `grain_ddp._math.weighting.SHORT`. (On a GPU nobody asks.)
        """
        if self.trivial or gramian.device.type != "cpu":
            return False
        members, _, share = self._on(gramian.device)
        terms = torch.nn.functional.pad(share * gramian.diagonal().sqrt(), (0, 1))[members].sum(1)
        return bool((self.gramian(gramian).diagonal() < (SHORT * terms) ** 2).any())

    def spread(self, weights: Tensor) -> Tensor:
        """The rows' weights [n] from the groups' [g]: each row's is its share of its group's."""
        if self.trivial:
            return weights
        _, groups, scale = self._on(weights.device)
        return weights[groups] * scale

    def members(self, groups: Sequence[int]) -> list[int]:
        """The rows of some groups, and those that are in none."""
        rows = {row for g in groups for row in self.groups[g]}
        return sorted(rows.union(self.unused))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Each group's rows [g, k], padded with n; each row's group [n]; its share of it [n]."""
        if device not in self._tables:
            n, most = len(self._counts), max(map(len, self.groups))
            members = [group + [n] * (most - len(group)) for group in self.groups]
            place = np.zeros(n, dtype=np.int64)
            for g, group in enumerate(self.groups):
                place[group] = g
            share = self._counts / self._totals[place]
            self._tables[device] = (
                torch.tensor(members, device=device),
                torch.tensor(place, device=device),
                torch.tensor(share, dtype=torch.float64, device=device),
            )
        return self._tables[device]
