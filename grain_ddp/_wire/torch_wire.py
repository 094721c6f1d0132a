"""The wire over a torch process group: gloo or MPI on CPUs, NCCL and its like on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grain_ddp._wire.neighbours import Neighbours, find
from grain_ddp._wire.wire import Message, Ring, Transfer, Wire, extremes_of

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
        return Ring(self, own, parts)

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
