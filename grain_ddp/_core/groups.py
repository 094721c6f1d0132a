"""Which ranks form a group, whose mean gradient is one row."""

from __future__ import annotations

from collections.abc import Sequence

from grain_ddp._wire.wire import Wire


def partition(groups: str | int | Sequence[Sequence[int]], wire: Wire) -> list[list[int]]:
    """The groups that the option of that name stands for: lists of ranks, equally long.

    Raises:
        ValueError: on every rank, if they do not divide the ranks equally.
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
    if len({len(group) for group in found}) > 1:
        raise ValueError(
            f"grain_ddp: groups must be equally large, but groups={groups!r} gives {found} "
            f"(this is rank {wire.rank}). Start the same number of ranks on every host, or name "
            "groups of one size."
        )
    return found
