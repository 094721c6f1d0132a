"""What moves: one primitive, an all-to-all of views, over a torch process group."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grain_ddp.neighbours import Neighbours, find

# A Gramian is gathered whole up to this many ranks (n³/2 numbers in one round), and summed by an
# all-reduce (n² numbers, more rounds) beyond it.
_GATHER_LIMIT = 32

RING_BYTES = 512 << 10
"""On CPUs of several hosts, parts of at least this size are gathered by a ring."""

# Tags of point-to-point messages, out of the way of a user's own small ones.
_FIRST_TAG, _TAGS = 0x6000, 0x1000


def default_group() -> dist.ProcessGroup:
    """The group of all ranks. RuntimeError if there is none yet."""
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError(
            "grain_ddp: torch.distributed is not initialised. Start with torchrun, and call "
            "torch.distributed.init_process_group() first."
        )
    return group


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


class _Ring(Transfer):
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


class TorchWire(Wire):
    """The ranks of a torch process group: gloo or MPI on CPUs, NCCL and its like on GPUs."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Without a group: this process alone, without torch.distributed."""
        super().__init__(*((group.rank(), group.size()) if group else (0, 1)))
        self.group = group
        self._exchanging: dist.ProcessGroup | None = group  # None: to be made, on GPUs
        self._tag = self._first_tag = _FIRST_TAG
        self._space = 0
        self._neighbours: Neighbours | None = None
        self._searched = False

    def among(self, ranks: Sequence[int], space: int) -> Wire:
        wire = super().among(ranks, space)
        assert isinstance(wire, TorchWire)
        wire._exchanging = None
        wire._space = space
        wire._tag = wire._first_tag = _FIRST_TAG + space * _TAGS
        return wire

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Transfer:
        self._tag = self._first_tag + (self._tag + 1 - self._first_tag) % _TAGS
        tensors = [*send, *receive]
        if self.size == 1:
            return Transfer()
        assert self.group is not None
        if tensors[0].device.type == "cpu":
            return self._pairwise(self.group, send, receive)
        if self._exchanging is None:
            members = [dist.get_global_rank(self.group, rank) for rank in self.ranks]
            self._exchanging = dist.new_group(members, use_local_synchronization=True)
        empty = tensors[0].new_empty(0)
        work = dist.all_to_all(
            [empty if j == self.rank else t for j, t in enumerate(receive)],
            [empty if j == self.rank else t for j, t in enumerate(send)],
            group=self._exchanging,
            async_op=True,
        )
        return Transfer([(work.wait, None)], tensors)

    def _pairwise(
        self, group: dist.ProcessGroup, send: Sequence[Tensor], receive: Sequence[Tensor]
    ) -> Transfer:
        # On gloo, pairs of messages take half of the time of its own all_to_all and all_gather.
        # Starting with the next rank spreads the ranks over the links.
        peers = [(self.rank + k) % self.size for k in range(1, self.size)]
        near, receiving, sending = self._near(), list[Message](), list[Message]()
        others = near.others if near else ()
        exchange = None
        if near is not None:
            ranks = zip(self.ranks, send, strict=True)
            exchange = near.start(self._space, {j: t for j, t in ranks if j in others})
        for j in reversed(peers):
            rank = self.ranks[j]
            if exchange and rank in others:
                receiving.append((partial(exchange.read, rank, receive[j]), rank))
            elif receive[j].numel():
                receiving.append((group.recv([receive[j]], rank, self._tag).wait, rank))
        for j in peers:
            rank = self.ranks[j]
            if exchange and rank in others:
                sending.append((partial(exchange.wait_for, rank), rank))
            elif send[j].numel():
                sending.append((group.send([send[j]], rank, self._tag).wait, rank))
        if exchange:
            receiving.append((exchange.all_read, None))
            sending.append((exchange.close, None))
        return Transfer(receiving, [*send, *receive], sending)

    def _near(self) -> Neighbours | None:
        """Ranks of this host that read each other's memory. Collective, the first time."""
        whole = self.whole
        assert isinstance(whole, TorchWire)
        if not whole._searched:
            assert whole.group is not None
            gloo = whole.group._get_backend(torch.device("cpu"))
            if gloo.name() == "gloo":
                whole._neighbours = find(
                    whole.rank,
                    whole.host(),
                    whole.gather_objects,
                    lambda: gloo.options._timeout.total_seconds(),
                )
            whole._searched = True
        return whole._neighbours

    def shares_memory(self, device: torch.device) -> bool:
        near = self._near() if device.type == "cpu" and self.whole.size > 1 else None
        return near is not None and near.among(self.ranks)

    def gather(self, own: Tensor, parts: Sequence[Tensor]) -> Transfer:
        large = min(part.nbytes for part in parts) >= RING_BYTES
        if not large or self.size < 3 or own.device.type != "cpu" or self.shares_memory(own.device):
            return super().gather(own, parts)
        return _Ring(self, own, parts)

    def all_reduce(self, values: Tensor) -> Transfer:
        if self.whole.size == 1:
            return Transfer()
        work = dist.all_reduce(values, group=self.group, async_op=True)
        return Transfer([(work.wait, None)], [values])

    def same(self, value: str, device: torch.device) -> bool:
        if self.whole.size == 1:
            return True
        extremes = torch.tensor(extremes_of(value), device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
        largest, smallest = extremes.tolist()
        return bool(largest == -smallest)

    def gather_objects(self, value: Any) -> list[Any]:
        if self.whole.size == 1:
            return [value]
        every: list[Any] = [None] * self.whole.size
        dist.all_gather_object(every, value, group=self.group)
        return every
