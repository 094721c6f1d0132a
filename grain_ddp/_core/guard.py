"""Which rank's gradient or model stands out: a few numbers of every tensor, once a step."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from grain_ddp._core.digest import bits, numbers
from grain_ddp._core.options import Options
from grain_ddp._core.passes import Parts
from grain_ddp._math.host import Later
from grain_ddp._math.suspect import FaultyWorker, Suspect
from grain_ddp._math.suspicion import Finding, History, minority
from grain_ddp._wire.wire import Transfer, Wire

logger = logging.getLogger("grain_ddp")

ABSENT = -1.0
"""In place of the numbers of a batch without samples, whose gradient may be anything."""

HISTORIES = 64
"""Of so many sets of tensors the past is kept: those of a step, or with "drop" of each bucket."""


class Numbers(NamedTuple):
    """Numbers of some tensors, by name, on their way to every rank."""

    step: int
    names: tuple[str, ...]
    transfer: Transfer
    rows: Tensor


class Replicated(Protocol):
    """An owner whose model is the same on every rank."""

    def replica(self) -> Sequence[tuple[str, Tensor]]:
        """What must be the same, by name, in the same order on every rank."""


class Guard:
    """The numbers of a step's gradients, and what they say of the ranks.

    An aggregation calls `push` for each bucket, `begin` when a set of buckets is complete, and
    `judge` where the weights are decided or the step ends: all ranks in the same order. The
    decision comes from the same numbers on every rank, in float64, and so is the same.
    """

    def __init__(self, options: Options, wire: Wire, owner: object) -> None:
        self._action, self._every = options.guard, options.check_replicas
        self._wire, self._passes = wire, options.microbatches
        self._owner = owner
        self._histories: dict[tuple[str, ...], History] = {}
        self._strikes: Counter[int] = Counter()
        self._queue: list[tuple[int, tuple[str, ...], Later]] = []
        self._compared = torch.empty(0)  # the digests of the model, the last time
        self.found: list[Suspect] = []  # since the last record
        self.places = [("", "")] * wire.size
        if self._action or self._every:
            self.places = wire.gather_objects(place(wire), "the names of the hosts")
        self.drop()

    # The step's gradients.

    def drop(self) -> None:
        """Forget the step under way."""
        self._pushed: list[Tensor] = []  # [2, tensors] of each bucket
        self._names: list[str] = []
        self._earlier: list[dict[str, Tensor]] = []  # of the passes before this one
        self.left_out: set[int] = set()  # rows, from their detection on
        self._sent: list[Transfer] = []  # in this step

    def push(self, buffer: Tensor, parts: Parts) -> None:
        """Note the numbers of a flat bucket, of which `parts` are the tensors, in order."""
        if self._action is not None:
            views = buffer.split_with_sizes([length for _, length in parts])
            self.note([(str(name), view) for (name, _), view in zip(parts, views, strict=True)])

    def note(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Note the numbers of tensors, by name."""
        tensors = [(name, tensor) for name, tensor in tensors if tensor.numel()]
        if self._action is not None and tensors:
            self._names += [name for name, _ in tensors]
            self._pushed.append(numbers([tensor for _, tensor in tensors]))

    def end_pass(self) -> None:
        """A pass ends that is not the step's last."""
        if self._pushed:
            columns = torch.cat(self._pushed, 1).unbind(1)
            self._earlier.append(dict(zip(self._names, columns, strict=True)))
            self._pushed, self._names = [], []

    def begin(self, step: int, empty: Sequence[int] = ()) -> Numbers | None:
        """Start to exchange what was noted since the last time; `empty`: passes without samples."""
        if not self._pushed:
            return None
        names = tuple(self._names)
        passes = [torch.stack([one[name] for name in names], 1) for one in self._earlier]
        own = torch.stack([*passes, torch.cat(self._pushed, 1)])
        own[list(empty)] = ABSENT
        self._pushed, self._names = [], []
        transfer, rows = self._wire.share(own.view(-1), "the numbers of the gradients")
        self._sent.append(transfer)
        return Numbers(step, names, transfer, rows)

    def complete(self) -> None:
        """Wait until others have received what was sent in this step.

        Not before its end: until then a rank may wait, for memory, for this one to read its rows.
        """
        for transfer in self._sent:
            transfer.wait()
        self._sent = []

    def judge(self, begun: Numbers | None, groups: Sequence[Sequence[int]]) -> list[int]:
        """Decide on what was begun. With "warn" on a GPU: on what has reached the host since.

        Returns:
            Which of the groups of rows are left out of the step, as one of their rows is.
        """
        if begun is not None:
            begun.transfer.arrive()
            self._queue.append((begun.step, begun.names, Later(begun.rows)))
        while self._queue and (self._action in ("drop", "raise") or self._queue[0][2].ready):
            self._decide(*self._queue.pop(0))
        return [g for g, rows in enumerate(groups) if not self.left_out.isdisjoint(rows)]

    def _decide(self, step: int, names: tuple[str, ...], rows: Later) -> None:
        values = rows.read().view(-1, 2, len(names)).numpy().copy()
        absent = (values == ABSENT).all((1, 2))
        if absent.all():
            return
        values[absent] = np.median(values[~absent], axis=0)  # so that they do not stand out
        history = self._histories.pop(names, None) or History(len(values), len(names))
        self._histories[names] = history  # the latest last
        if len(self._histories) > HISTORIES:
            del self._histories[next(iter(self._histories))]
        found = history.look(values[:, 0], values[:, 1])
        if self._action == "drop" and 2 * len(found) <= len(values):
            self.left_out |= {one.row for one in found}
        self._tell(step, names, found)

    def _tell(self, step: int, names: Sequence[str], found: Sequence[Finding]) -> None:
        """Name the ranks: in the log of rank 0, and in the next record or error."""
        suspects = []
        for one in found:
            rank = one.row // self._passes
            self._strikes[rank] += 1
            tensor = None if one.tensor is None else names[one.tensor]
            strikes, place = self._strikes[rank], self.places[rank]
            suspects.append(Suspect(step, rank, *place, one.kind, tensor, one.score, strikes))
            if self._wire.rank == 0:
                out = one.row in self.left_out
                logger.warning("%s%s", suspects[-1], " Its gradient is left out." * out)
        self.found += suspects

    def take(self) -> tuple[Suspect, ...]:
        """The suspects since the last record.

        Raises:
            FaultyWorker: on every rank, if there are any, with ``guard="raise"``.
        """
        found, self.found = tuple(self.found), []
        if self._action == "raise" and found:
            raise FaultyWorker(found)
        return found

    # The replicas.

    def compare_replicas(self, step: int) -> None:
        """If it is time to, compare the model with those of the other ranks.

        A buffer that has changed since the last time is not compared: batch norm's statistics are
        each rank's own. (One that was damaged is, the next time.)
        """
        if not self._every or step % self._every or not hasattr(self._owner, "replica"):
            return
        model = self._owner.replica()
        if not model:
            return
        names = [name for name, _ in model]
        sums = bits([tensor for _, tensor in model])
        known = self._compared if len(self._compared) == len(sums) else sums + 1
        constant = torch.tensor([isinstance(tensor, Parameter) for _, tensor in model])
        own = torch.cat([sums, ((sums != known) & ~constant.to(sums.device)).to(sums)])
        self._compared = sums
        transfer, rows = self._wire.share(own, "the comparison of the models")
        transfer.wait()
        digests, flags = rows.cpu().view(self._wire.size, 2, -1).numpy().swapaxes(0, 1)
        found = minority(digests, flags.sum(0) == 0)
        found = [Finding(one.row * self._passes, one.kind, one.tensor, one.score) for one in found]
        self._tell(step, names, found)


def place(wire: Wire) -> tuple[str, str]:
    """The name of this host, and of the device that computes, with its serial number."""
    host = socket.gethostname()
    if wire.device.type != "cuda":
        return host, "cpu"
    index = torch.cuda.current_device()
    serial = getattr(torch.cuda.get_device_properties(index), "uuid", "of unknown UUID")
    return host, f"cuda:{index} ({serial})"
