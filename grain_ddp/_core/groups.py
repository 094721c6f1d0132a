"""Groups of several ranks: which ranks form one, and the mean of their gradients.

Inside a group every rank comes to hold a slice of the group's mean gradient: a reduce-scatter. The
transpose-reduce then runs between the ranks that hold the same slice of their group's, so that a
link between groups of k ranks carries 1/k of the gradient. At the end the slices are gathered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from grain_ddp._core.scratch import Scratch
from grain_ddp._math.gramian import weighted_sum
from grain_ddp._wire.wire import Transfer, Wire, cut


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
        for rank, host in enumerate(wire.gather_objects(wire.host())):
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


class Slice:
    """A bucket inside of its group: ``own``, this rank's slice of it, and what is under way."""

    def __init__(self, buffer: Tensor, own: Tensor, narrow: torch.dtype | None) -> None:
        self.buffer, self.own, self.narrow = buffer, own, narrow
        # Columns, what arrives for them, its memory and messages.
        self.arriving: deque[tuple[Tensor, Tensor, Tensor, Transfer]] = deque()
        self.sending: list[Transfer] = []  # of what has arrived
        self.gathered: list[tuple[Tensor, Tensor]] = []  # columns, and what they are copied from
        self.transfer = Transfer()


class Inside:
    """The mean inside a group: `start`, `reduce`, and when the slice has its result, `gather`."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.drop()

    def drop(self) -> None:
        """Forget what is under way."""
        self._scratch = Scratch()
        self.sending: list[Transfer] = []  # of the last bucket that was reduced

    def start(self, buffer: Tensor, narrow: torch.dtype | None, message: int, limit: int) -> Slice:
        """Send this rank's gradient slice by slice, in messages of at most so many elements.

        `narrow` is the dtype of what travels, where it is not the buffer's. At most `limit` bytes
        of what arrives wait for `reduce`; what would be more is reduced here.
        """
        k, me, columns = self.wire.size, self.wire.rank, len(buffer) // self.wire.size
        stop = len(buffer) if me == k - 1 else columns * (me + 1)
        part = Slice(buffer, buffer[columns * me : stop], narrow)
        for slots in cut(len(buffer), k, message):
            send = [buffer[slot] for slot in slots]
            home = send[me]
            if narrow:
                send = [slot.to(narrow) for slot in send]
            size = k * home.numel() * send[me].itemsize
            while part.arriving and self._scratch.lent + size > limit:
                self._reduce(part)
            memory = self._scratch.lend(size, buffer.device, limit)
            rows = memory[:size].view(send[me].dtype).view(k, home.numel())
            rows[me].copy_(send[me])
            part.arriving.append((home, rows, memory, self.wire.exchange(send, rows.unbind())))
        return part

    def reduce(self, part: Slice) -> None:
        """The group's mean, in this rank's slice of the buffer."""
        while part.arriving:
            self._reduce(part)
        # A bucket later: nobody waits here until the slowest rank has come as far.
        self._sent()
        self.sending = part.sending

    def _reduce(self, part: Slice) -> None:
        (home, rows, memory, transfer), k = part.arriving.popleft(), self.wire.size
        transfer.arrive()
        part.sending.append(transfer)
        weights = torch.full((k,), 1 / k, dtype=torch.float64, device=home.device)
        weighted_sum(rows, weights, out=home)
        self._scratch.take_back(memory)

    def _sent(self) -> None:
        while self.sending:
            self.sending.pop().wait()

    def gather(self, part: Slice) -> None:
        """Start to send this rank's slice to the group, and to receive the others'."""
        self._sent()
        buffer, own, k = part.buffer, part.own, self.wire.size
        columns = len(buffer) // k
        last = len(buffer) - columns * (k - 1)
        slots = list(buffer.split_with_sizes([columns] * (k - 1) + [last]))
        if part.narrow:  # exact: the result was rounded on its way between the groups
            own = own.to(part.narrow)
            receive = [torch.empty_like(slot, dtype=part.narrow) for slot in slots]
            part.gathered = [(slots[j], receive[j]) for j in range(k) if j != self.wire.rank]
            slots = receive
        part.transfer = self.wire.gather(own, slots)

    def complete(self, part: Slice) -> None:
        """Wait until the whole buffer has its result."""
        part.transfer.wait()
        for slot, values in part.gathered:
            slot.copy_(values)
