"""What an aggregation needs of its ranks: one primitive, an all-to-all of views."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

import grain_ddp
from grain_ddp._wire import lost
from grain_ddp._wire.host import Marks, host

DEBUG = "GRAIN_DEBUG"
"""Environment variable: with 1 on every rank, each exchange is compared before it is made."""

# A Gramian is gathered whole up to this many ranks (n³/2 numbers in one round), and summed by an
# all-reduce (n² numbers, more rounds) beyond it.
_GATHER_LIMIT = 32

# Of the ranks whose values differ so many are told, and then the first of each value.
_TOLD = 8

Message = tuple[Callable[[], object], int | None]
"""What waits for a message, and which rank is at its other end, if it is one."""

_numbers = count(1)


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
        wire: Wire | None = None,
        what: object = "",
    ) -> None:
        self._receiving, self._sending, self._tensors = receiving, sending, tensors
        self._wire, self._what = wire, what

    def arrive(self) -> None:
        """Return when all has been received. Raises what `wait` does."""
        self._wait_for(self._receiving)
        self._receiving = ()

    def advance(self) -> bool:
        """If this has several stages, wait for one and start the next. Whether more are to come."""
        return False

    def wait(self) -> None:
        """RuntimeError, with the backend's own as its cause, if another rank is lost."""
        self.arrive()
        self._wait_for(self._sending)
        self._sending = self._tensors = ()

    def _wait_for(self, messages: Sequence[Message]) -> None:
        for wait, rank in messages:
            try:
                wait()
            except (RuntimeError, OSError) as error:
                assert self._wire is not None
                raise self._wire.lost(error, rank, self._what) from error


@dataclass
class Shared:
    """What wires have in common whose messages may meet."""

    models: int = 0
    """How many were begun over them, the same number on every rank; some may be gone."""


class Wire(ABC):
    """What an aggregation needs of its ranks: which one this is, of how many, and messages.

    An exchange is among ``ranks``, of which this one is number ``rank`` of ``size``: all of them,
    or those that `among` chose. Everything else is over the ``whole``.

    Where a method takes `what`, that names the exchange, if it fails: a text, or something whose
    ``str`` is one.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.ranks: Sequence[int] = range(size)
        self.space = 0
        self._whole: Wire | None = None  # not itself, so that a wire ends when it is dropped
        self._shared = Shared()
        self.checking = False  # as DEBUG asks for
        self.number = self._exchanges = 0  # by which ranks recognise a model, and its exchange

    @property
    def whole(self) -> Wire:
        return self if self._whole is None else self._whole

    @property
    def device(self) -> torch.device:
        """Where tensors must be that travel for the wire's own purposes."""
        return torch.device("cpu")

    def meet(self, values: Mapping[str, Any]) -> None:
        """Begin: compare what must be equal on all ranks, and find what they have in common.

        Collective, once, before any exchange; nothing else that is collective happens unseen.

        Raises:
            ValueError: on every rank: the ranks' values differ, or their versions of grain_ddp.
        """
        self._meet(values, None)

    def _meet(self, values: Mapping[str, Any], offer: object) -> list[Any]:
        """Every rank's offer."""
        assert self.whole is self
        debug = os.environ.get(DEBUG) == "1"
        mine = {"the version of grain_ddp": grain_ddp.__version__, DEBUG: debug, **values}
        shared = self._shared
        shared.models += 1
        every = self.gather_objects(
            (mine, next(_numbers), shared.models, offer), "the comparison of options"
        )
        self._compare([one[0] for one in every])
        self.checking, self.number = debug, every[0][1]
        shared.models = max(one[2] for one in every)
        return [one[3] for one in every]

    def come_to(self, number: int, model: str) -> None:
        """See that all ranks have come to the same model, where several share this wire's ranks.

        Before the first exchange of a pass, which another model's might meet. (On GPUs nothing is
        compared: that would wait.)

        Raises:
            ValueError: on every rank: they have not.
        """
        whole, what = self.whole, "the start of a pass"
        if whole.size == 1 or self._shared.models < 2 or whole.device.type != "cpu":
            return
        mine, every = torch.tensor([number]), torch.zeros(whole.size, 1, dtype=torch.int64)
        every[whole.rank] = number
        whole._carry([mine] * whole.size, list(every), what)
        if (every != number).any():
            whole.agree({"the model": f"model {number}, {model}"}, what)

    def close(self) -> None:  # noqa: B027
        """End: the other ranks know from now on that this one takes part no more."""

    def among(self, ranks: Sequence[int], space: int) -> Wire:
        """The same wire, whose exchanges are among some of the ranks, this one included.

        Wires that share a pair of ranks need another `space` each: 1 or 2. Collective among these
        ranks.
        """
        wire = copy.copy(self)
        wire._whole = self.whole
        wire.rank, wire.size, wire.ranks = ranks.index(self.rank), len(ranks), ranks
        wire.space, wire._exchanges = space, 0
        return wire

    def host(self) -> Marks:
        """What tells this rank's host from others."""
        return host()

    def shares_memory(self, device: torch.device) -> bool:
        """Whether an exchange reads tensors on that device where the senders have them.

        Then that is faster than an all-reduce.
        """
        return False

    @abstractmethod
    def exchange(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], what: object = "an exchange"
    ) -> Transfer:
        """Send ``send[j]`` to rank j and receive ``receive[j]`` from it, asynchronously.

        All are contiguous, of one dtype, of any length; lengths agree pair by pair. Entries of
        this rank itself are ignored, empty ones are not sent.
        """

    def gather(self, own: Tensor, parts: Sequence[Tensor], what: object = "a gather") -> Transfer:
        """Send ``own`` to all ranks and receive ``parts[j]`` from rank j.

        ``len(parts[j])`` is the same on every rank, and ``parts[self.rank]`` is own. This is
        `exchange`, or faster, in several stages.
        """
        return self.exchange([own] * self.size, parts, what)

    @abstractmethod
    def all_reduce(self, values: Tensor, what: object = "a sum") -> Transfer:
        """Start the backend's own sum over the ranks, in place."""

    def sum(self, values: Tensor, what: object = "the Gramian") -> tuple[Transfer, Tensor]:
        """Start summing ``values`` [m] over the ranks: a transfer, and what it fills: ``[k, m]``.

        The sum of its k rows is the same on every rank, bit by bit.
        """
        whole = self.whole
        if whole.size > _GATHER_LIMIT:
            return whole.all_reduce(values, what), values[None]
        rows = values.new_empty(whole.size, len(values))
        rows[whole.rank] = values
        return whole.exchange([values] * whole.size, list(rows), what), rows

    def share(self, values: Tensor, what: object) -> tuple[Transfer, Tensor]:
        """Start giving ``values`` [m] to every rank: a transfer, and what it fills: ``[n, m]``.

        Row j is rank j's, the same on every rank, bit by bit.
        """
        whole = self.whole
        if whole.size > _GATHER_LIMIT:  # fewer messages
            rows = values.new_zeros(whole.size, len(values))
            rows[whole.rank] = values
            return whole.all_reduce(rows, what), rows
        rows = values.new_empty(whole.size, len(values))
        rows[whole.rank] = values
        return whole.exchange([values] * whole.size, list(rows), what), rows

    def same(
        self, value: str, device: torch.device | None = None, what: object = "a comparison"
    ) -> bool:
        """Whether all ranks pass the same text; the same answer on all of them.

        `device` is where it is compared, if that matters.
        """
        digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
        parts = [int.from_bytes(digest[k : k + 2], "big") for k in range(0, 8, 2)]
        # n Σ x² = (Σ x)² only where all x are equal; exact for up to 2¹⁵ ranks.
        mine = torch.tensor([*parts, *(x * x for x in parts)], device=device or self.device)
        transfer, rows = self.sum(mine, what)
        transfer.wait()
        total, squares = rows.sum(0).view(2, -1)
        return bool((self.whole.size * squares == total * total).all())

    def gather_objects(self, value: Any, what: object = "an exchange of objects") -> list[Any]:
        """Every rank's value, in rank order.

        Raises:
            ValueError: on every rank: `what` differs, so that they are not at the same place.
        """
        every = self.whole._objects((str(what), value), what)
        places = [place for place, _ in every]
        self._compare([{"the place in the program": place} for place in places])
        return [theirs for _, theirs in every]

    def _objects(self, value: Any, what: object) -> list[Any]:
        """Every one's of `ranks`."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self.device)
        lengths = torch.full((self.size, 1), len(mine), device=self.device)
        self._carry(list(lengths.clone()), list(lengths), what)
        parts = [mine.new_empty(length) for length in lengths.view(-1).tolist()]
        parts[self.rank] = mine
        self._carry([mine] * self.size, parts, what)
        return [pickle.loads(part.cpu().numpy().tobytes()) for part in parts]

    def _carry(self, send: Sequence[Tensor], receive: Sequence[Tensor], what: object) -> None:
        """An exchange for objects, which no `_check` precedes."""
        checking, self.checking = self.checking, False
        try:
            self.exchange(send, receive, what).wait()
        finally:
            self.checking = checking

    def agree(self, values: Mapping[str, Any], what: object = "a comparison of options") -> None:
        """Raise a ValueError on every rank unless all ranks pass equal values."""
        self._compare(self.gather_objects(dict(values), what))

    def _compare(self, every: Sequence[Mapping[str, Any]]) -> None:
        """Raise a ValueError, of the first difference, unless all ranks' values are equal."""
        for name in dict.fromkeys(name for values in every for name in values):
            found = [values.get(name) for values in every]
            if any(value != found[0] for value in found):
                told = list(enumerate(found))
                if len(told) > _TOLD:
                    told = [(j, value) for j, value in told if found.index(value) == j]
                detail = ", ".join(f"rank {j}: {value!r}" for j, value in told)
                raise ValueError(
                    f"grain_ddp: {name} must be the same on every rank, but it is {detail} "
                    f"(this is rank {self.whole.rank}). Make the ranks agree and start again."
                )

    def _check(
        self, kind: str, send: Sequence[Tensor], receive: Sequence[Tensor], what: object
    ) -> None:
        """Compare an exchange, before it is made, with what the other ranks are about to do.

        ValueError on all of them, of the first difference.
        """
        self._exchanges += 1
        place = f"{kind} {self._exchanges} of model {self.number}, {what}"
        here = f"{place}, {send[0].dtype}"
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (send, receive)]
        every = self._objects((here, shapes), f"what {DEBUG} compares before {what}")
        ranks = self.ranks
        self._compare([{f"({DEBUG}) the next exchange": theirs[0]} for theirs in every])
        for i, (_, (sent, _)) in enumerate(every):
            for j, (_, (_, received)) in enumerate(every):
                if i != j and sent[j] != received[i]:
                    raise ValueError(
                        f"grain_ddp: ({DEBUG}) rank {ranks[i]} sends rank {ranks[j]} a tensor of "
                        f"shape {sent[j]}, but that expects {received[i]}, in {here} (this is "
                        f"rank {self.whole.rank}). Do the ranks train the same model?"
                    )

    def lost(self, error: Exception, rank: int | None, what: object) -> RuntimeError:
        """The sentences for a failed exchange. `rank`: at its other end, if that is known."""
        me, how = self.whole.rank, lost.UNKNOWN
        ranks = [] if rank is None else [rank]
        if isinstance(error, lost.Gone):
            ranks, how = [error.rank], error.how
        elif rank is None and self.whole.size == 2:
            ranks = [1 - me]
        vague = not ranks or how == lost.GAVE_UP  # whoever gives up may have lost another
        found = self.whole.missing(ask=vague)
        died = [one for one, theirs in found.items() if theirs == lost.DIED]
        others = [one for one in found if one not in ranks]
        if died:  # whoever else is late waits for these
            ranks, how = died, lost.DIED
        elif vague and others:
            ranks, how = others, found[others[0]]
        elif how == lost.UNKNOWN and ranks:
            how = found.get(ranks[0], how)
        return RuntimeError(lost.lost(me, what, ranks, how, error))

    def missing(self, ask: bool) -> dict[int, str]:
        """The ranks that are known to be lost, and how. `ask`: try the network too."""
        return {}
