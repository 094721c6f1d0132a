"""What an aggregation needs of its ranks: one primitive, an all-to-all of views."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# A Gramian is gathered whole up to this many ranks (n³/2 numbers in one round), and summed by an
# all-reduce (n² numbers, more rounds) beyond it.
_GATHER_LIMIT = 32

Message = tuple[Callable[[], object], int | None]
"""What waits for a message, and which rank is at its other end, if it is one."""


class Transfer:
    """Messages under way. `wait` returns when all have been sent and received.

    On a CPU it blocks, at most for the process group's timeout; on a GPU it makes the current
    stream wait. The tensors are kept alive until then. What is sent must not change until then.
    """

    def __init__(
        self,
        receiving: Sequence[Message] = (),
        tensors: Sequence[Tensor] = (),
        sending: Sequence[Message] = (),
    ) -> None:
        self._receiving, self._sending, self._tensors = receiving, sending, tensors

    def arrive(self) -> None:
        """Return when all has been received. Raises what `wait` does."""
        _wait_for(self._receiving)
        self._receiving = ()

    def advance(self) -> bool:
        """If this has several stages, wait for one and start the next. Whether more are to come."""
        return False

    def wait(self) -> None:
        """RuntimeError, with the backend's own as its cause, if another rank is lost."""
        self.arrive()
        _wait_for(self._sending)
        self._sending = self._tensors = ()


def _wait_for(messages: Sequence[Message]) -> None:
    for wait, rank in messages:
        try:
            wait()
        except (RuntimeError, OSError) as error:
            lost = "another rank" if rank is None else f"rank {rank}"
            raise RuntimeError(
                f"grain_ddp: lost the connection to {lost}: it has died or hangs, or the "
                "network is cut. No parameter of this rank has changed in this step. Look for "
                "the first error of all ranks, and resume from a checkpoint. "
                f"The backend says: {error}"
            ) from error


class Ring(Transfer):
    """Parts of all ranks, each handed on from rank to rank.

    So a rank receives from one other at a time, and the link of a host with several ranks carries
    a part once.
    """

    def __init__(self, wire: Wire, own: Tensor, parts: Sequence[Tensor]) -> None:
        super().__init__()
        self._wire, self._own, self._parts = wire, own, parts
        self._hops: list[Transfer] = []
        self._hop()

    def _hop(self) -> None:
        wire, n, step = self._wire, self._wire.size, len(self._hops)
        nothing = self._own.new_empty(0)
        send, receive = [nothing] * n, [nothing] * n
        before = (wire.rank - 1) % n
        send[(wire.rank + 1) % n] = self._parts[wire.rank - step] if step else self._own
        receive[before] = self._parts[before - step]
        self._hops.append(wire.exchange(send, receive))

    def advance(self) -> bool:
        self._hops[-1].arrive()
        more = len(self._hops) < self._wire.size - 1
        if more:
            self._hop()
        return more

    def arrive(self) -> None:
        while self.advance():
            pass

    def wait(self) -> None:
        self.arrive()
        for hop in self._hops:
            hop.wait()


def cut(length: int, n: int, message: int) -> list[list[slice]]:
    """Where the slices of n ranks lie in a bucket of that length, in pieces.

    ``cut(...)[k][j]`` is piece k of rank j's slice, at most `message` elements long. The slices are
    equally long; what is left over, fewer than n elements, is in the last rank's last piece too.
    """
    columns = length // n
    count = max(-(-columns // message), 1)
    bounds = [columns * k // count for k in range(count + 1)]
    pieces = [
        [slice(j * columns + a, j * columns + b) for j in range(n)] for a, b in pairwise(bounds)
    ]
    pieces[-1][-1] = slice(pieces[-1][-1].start, length)
    return pieces


def extremes_of(value: str) -> list[int]:
    """Two numbers, whose maxima over the ranks add up to 0 if all ranks have the same text."""
    digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest(), "big")
    return [digest, -digest]


class Wire(ABC):
    """What an aggregation needs of its ranks: which one this is, of how many, and messages.

    An exchange is among ``ranks``, of which this one is number ``rank`` of ``size``: all of them,
    or those that `among` chose. Everything else is over the ``whole``.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.ranks: Sequence[int] = range(size)
        self.whole: Wire = self

    def among(self, ranks: Sequence[int], space: int) -> Wire:
        """The same wire, whose exchanges are among some of the ranks, this one included.

        Wires that share a pair of ranks need another `space` each: 1 or 2.
        """
        wire = copy.copy(self)
        wire.rank, wire.size, wire.ranks = ranks.index(self.rank), len(ranks), ranks
        return wire

    def host(self) -> tuple[str, ...]:
        """What tells this rank's host from others. A network namespace counts as one."""
        marks = [socket.gethostname()]
        with contextlib.suppress(OSError):  # not on Linux
            with open("/proc/sys/kernel/random/boot_id") as file:
                marks.append(file.read())
            marks.append(str(os.stat("/proc/self/ns/net").st_ino))
        return tuple(marks)

    def shares_memory(self, device: torch.device) -> bool:
        """Whether an exchange reads tensors on that device where the senders have them.

        Then that is faster than an all-reduce.
        """
        return False

    @abstractmethod
    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Transfer:
        """Send ``send[j]`` to rank j and receive ``receive[j]`` from it, asynchronously.

        All are contiguous, of one dtype, of any length; lengths agree pair by pair. Entries of
        this rank itself are ignored, empty ones are not sent.
        """

    def gather(self, own: Tensor, parts: Sequence[Tensor]) -> Transfer:
        """Send ``own`` to all ranks and receive ``parts[j]`` from rank j.

        ``len(parts[j])`` is the same on every rank, and ``parts[self.rank]`` is own. This is
        `exchange`, or faster, in several stages.
        """
        return self.exchange([own] * self.size, parts)

    @abstractmethod
    def all_reduce(self, values: Tensor) -> Transfer:
        """Start the backend's own sum over the ranks, in place."""

    @abstractmethod
    def same(self, value: str, device: torch.device) -> bool:
        """Whether all ranks pass the same text; the same answer on all of them."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""

    def sum(self, values: Tensor) -> tuple[Transfer, Tensor]:
        """Start summing ``values`` [m] over the ranks: a transfer, and what it fills: ``[k, m]``.

        The sum of its k rows is the same on every rank, bit by bit.
        """
        whole = self.whole
        if whole.size > _GATHER_LIMIT:
            return whole.all_reduce(values), values[None]
        rows = values.new_empty(whole.size, len(values))
        rows[whole.rank] = values
        return whole.exchange([values] * whole.size, list(rows)), rows

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raise a ValueError on every rank unless all ranks pass equal values."""
        every = self.gather_objects(dict(values))
        for name in sorted({name for ranks in every for name in ranks}):
            found = [ranks.get(name) for ranks in every]
            if any(value != found[0] for value in found):
                detail = ", ".join(f"rank {j}: {value!r}" for j, value in enumerate(found))
                raise ValueError(
                    f"grain_ddp: {name} must be the same on every rank, but it is {detail} "
                    f"(this is rank {self.whole.rank}). Make the ranks agree and start again."
                )
