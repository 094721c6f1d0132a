"""The wire over a torch process group: gloo or MPI on CPUs, NCCL and its like on GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from grain_ddp._wire import lost
from grain_ddp._wire.neighbours import Neighbours, Search
from grain_ddp._wire.ring import Ring
from grain_ddp._wire.wire import Message, Shared, Transfer, Wire

PADDED = 1.25
"""Parts are summed by one reduce-scatter if padding makes them no longer than so many times."""

RING_BYTES = 512 << 10
"""On CPUs of several hosts, parts of at least this size are gathered by a ring."""

# Tags of point-to-point messages, out of the way of a user's own small ones: some for each of the
# wire's spaces; one for objects, so that ranks meet who are at different places in the program.
_FIRST_TAG, _TAGS = 0x6000, 0x1000
_OBJECTS, _PROBE = 0x5FFE, 0x5FFF

_of_groups: WeakKeyDictionary[dist.ProcessGroup, Shared] = WeakKeyDictionary()


# The name since PyTorch 2.13, or the one before.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


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
        self._exchanging = group  # on GPUs: that of `ranks`
        self._order: Sequence[int] = range(self.size)  # of `ranks` in it
        self._tag = self._first_tag = _FIRST_TAG
        self._neighbours: Neighbours | None = None
        if group is not None:
            self._shared = _of_groups.setdefault(group, self._shared)

    @property
    def device(self) -> torch.device:
        kinds = [device.type for device in self.group._device_types] if self.group else ["cpu"]
        if "cpu" in kinds:
            return torch.device("cpu")
        return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())

    def meet(self, values: Mapping[str, Any]) -> None:
        self.close()
        gloo = self._gloo()
        if self.size == 1 or gloo is None:
            self._meet(values, None)
            return
        timeout = partial(_seconds, gloo)
        with Search(self.rank, self.host(), timeout) as search:
            offers = self._meet(values, search.offer)
            gather = partial(self.gather_objects, what="the search for ranks of the same host")
            self._neighbours = search.end(offers, gather)

    def _gloo(self) -> Any:
        """The group's backend for CPUs, if that is gloo."""
        if self.group is None or self.device.type != "cpu":
            return None
        backend = self.group._get_backend(torch.device("cpu"))
        return backend if backend.name() == "gloo" else None

    def close(self) -> None:
        if self._neighbours is not None:
            self._neighbours.close()
            self._neighbours = None

    def among(self, ranks: Sequence[int], space: int) -> Wire:
        wire = super().among(ranks, space)
        assert isinstance(wire, TorchWire)
        wire._tag = wire._first_tag = _FIRST_TAG + space * _TAGS
        if self.group is not None and _on_gpus(self.group):
            try:
                where = "inside of groups" if space == 1 else "between groups"
                wire._exchanging = new_group(self.group, ranks, f"exchange {where}")
            except (RuntimeError, ValueError) as error:
                raise self.lost(error, None, "the making of a group") from error
            wire._order = sorted(range(len(ranks)), key=ranks.__getitem__)
        return wire

    def exchange(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], what: object = "an exchange"
    ) -> Transfer:
        if self.size == 1:
            return Transfer()
        assert self.group is not None
        if self.checking:
            self._check("exchange", send, receive, what)
        if send[0].device.type == "cpu":
            self._tag = self._first_tag + (self._tag + 1 - self._first_tag) % _TAGS
            return self._pairwise(self.group, self._near(), self._tag, send, receive, what)
        empty = send[0].new_empty(0)
        try:
            work = dist.all_to_all(
                [empty if j == self.rank else receive[j] for j in self._order],
                [empty if j == self.rank else send[j] for j in self._order],
                group=self._exchanging,
                async_op=True,
            )
        except RuntimeError as error:
            raise self.lost(error, None, what) from error
        return Transfer([(work.wait, None)], [*send, *receive], (), self, what)

    def _pairwise(
        self,
        group: dist.ProcessGroup,
        near: Neighbours | None,
        tag: int,
        send: Sequence[Tensor],
        receive: Sequence[Tensor],
        what: object,
    ) -> Transfer:
        # On gloo, pairs of messages take half of the time of its own all_to_all and all_gather.
        # Starting with the next rank spreads the ranks over the links.
        peers = [(self.rank + k) % self.size for k in range(1, self.size)]
        receiving, sending = list[Message](), list[Message]()
        others = near.others if near else ()
        exchange = rank = None
        if near is not None:
            ranks = zip(self.ranks, send, strict=True)
            exchange = near.start(self.space, {j: t for j, t in ranks if j in others})
        try:
            for j in reversed(peers):
                rank = self.ranks[j]
                if exchange and rank in others:
                    receiving.append((partial(exchange.read, rank, receive[j]), rank))
                elif receive[j].numel():
                    receiving.append((group.recv([receive[j]], rank, tag).wait, rank))
            for j in peers:
                rank = self.ranks[j]
                if exchange and rank in others:
                    sending.append((partial(exchange.wait_for, rank), rank))
                elif send[j].numel():
                    sending.append((group.send([send[j]], rank, tag).wait, rank))
        except RuntimeError as error:  # the connection was lost before
            raise self.lost(error, rank, what) from error
        if exchange:
            receiving.append((exchange.all_read, None))
            sending.append((exchange.close, None))
        return Transfer(receiving, [*send, *receive], sending, self, what)

    def _near(self) -> Neighbours | None:
        """Ranks of this host that read each other's memory."""
        whole = self.whole
        assert isinstance(whole, TorchWire)
        return whole._neighbours

    def shares_memory(self, device: torch.device) -> bool:
        near = self._near() if device.type == "cpu" else None
        return near is not None and near.among(self.ranks)

    def gather(self, own: Tensor, parts: Sequence[Tensor], what: object = "a gather") -> Transfer:
        large = min(part.nbytes for part in parts) >= RING_BYTES
        if not large or self.size < 3 or own.device.type != "cpu" or self.shares_memory(own.device):
            return super().gather(own, parts, what)
        return Ring(self, own, parts, what)

    def all_reduce(self, values: Tensor, what: object = "a sum") -> Transfer:
        if self.whole.size == 1:
            return Transfer()
        if self.whole.checking:
            self.whole._check("sum", [values] * self.whole.size, [values] * self.whole.size, what)
        try:
            work = dist.all_reduce(values, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self.lost(error, None, what) from error
        return Transfer([(work.wait, None)], [values], (), self, what)

    def reduce_scatter(self, parts: Sequence[Tensor], what: object = "a sum") -> Tensor:
        """The backend's own sum over the ranks of what is this rank's: part number `rank`.

        Parts may differ in length; a part has the same on every rank. They are used up.
        """
        longest = max(map(len, parts))
        if self.whole.checking:
            self.whole._check("sum", parts, [parts[self.rank]] * self.size, what)
        works = []
        out = parts[self.rank]
        try:
            if self.size * longest <= PADDED * sum(map(len, parts)):
                rows = torch.stack([pad(part, (0, longest - len(part))) for part in parts])
                out = torch.empty_like(rows[0])
                works.append(_reduce_scatter(out, rows.view(-1), group=self.group, async_op=True))
            else:
                for j, part in enumerate(parts):
                    works.append(dist.reduce(part, group_dst=j, group=self.group, async_op=True))
        except RuntimeError as error:
            raise self.lost(error, None, what) from error
        Transfer([(work.wait, None) for work in works], [*parts, out], (), self, what).wait()
        return out[: len(parts[self.rank])]

    def _objects(self, value: Any, what: object) -> list[Any]:
        if self.device.type == "cpu" or self.size == 1:
            return super()._objects(value, what)
        every: list[Any] = [None] * self.size
        try:  # all of torch's own, which makes no connections from each to all
            dist.all_gather_object(every, value, group=self._exchanging)
        except RuntimeError as error:
            raise self.lost(error, None, what) from error
        return [every[self._order.index(j)] for j in range(self.size)]

    def _carry(self, send: Sequence[Tensor], receive: Sequence[Tensor], what: object) -> None:
        assert self.group is not None
        self._pairwise(self.group, None, _OBJECTS, send, receive, what).wait()

    def missing(self, ask: bool) -> dict[int, str]:
        near = self._near()
        found = near.lost() if near else {}
        if found or not ask or self._gloo() is None:
            return found
        assert self.group is not None
        for rank in self.ranks:
            if rank != self.rank:
                try:  # nothing is sent, as nobody receives it
                    self.group.send([torch.zeros(1)], rank, _PROBE)
                except RuntimeError as error:
                    if "timeout" not in str(error):  # or else gloo itself closed them all
                        found[rank] = lost.UNKNOWN
        return found if len(found) < self.size - 1 else {}


def _seconds(backend: Any) -> float:
    seconds: float = backend.options._timeout.total_seconds()
    return seconds


def _on_gpus(group: dist.ProcessGroup) -> bool:
    """Whether the group may carry other tensors than a CPU's."""
    kinds = {device.type for device in group._device_types} - {"cpu"}
    return any(torch.get_device_module(kind).is_available() for kind in kinds)


def new_group(
    parent: dist.ProcessGroup, ranks: Sequence[int], what: str = "exchange"
) -> dist.ProcessGroup:
    """Of some ranks of a group, with its backend, timeout and options. Collective among them.

    `what` it is for is what flight recorders show.
    Its ranks are in ascending order, whatever order is given.
    """
    kinds = sorted(parent._device_types, key=lambda device: device.type == "cpu")
    theirs: Any = parent._get_backend(kinds[0]).options
    options = None
    if hasattr(theirs, "is_high_priority_stream"):  # NCCL's: a group writes its name into them
        options = type(theirs)()
        options.config = theirs.config
        options.is_high_priority_stream = theirs.is_high_priority_stream
        options._timeout = theirs._timeout
    made: dist.ProcessGroup = dist.new_group(
        [dist.get_global_rank(parent, rank) for rank in ranks],
        timeout=theirs._timeout,
        backend=dist.get_backend_config(parent),
        pg_options=options,
        use_local_synchronization=True,
        group_desc=f"grain_ddp {what}",
    )
    return made
