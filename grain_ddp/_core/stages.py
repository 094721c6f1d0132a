"""A bucket of a step, and the stages that it goes through.

enter → cross → arrive → reduce → complete

The Gramian comes of the rows themselves (`transposed`) or of a sketch of them (`sketched`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from grain_ddp._core.agreement import GramianSum, Marks
from grain_ddp._core.columns import Columns
from grain_ddp._core.guard import Numbers
from grain_ddp._core.options import Kind
from grain_ddp._core.passes import Passes
from grain_ddp._core.state import GrainState
from grain_ddp._wire.wire import Transfer, Wire


class Bucket:
    """One buffer of a step, and how far it has come."""

    def __init__(self, buffer: Tensor, done: Callable[[], object] | None) -> None:
        self.buffer, self.done = buffer, done
        self.own = buffer  # what the groups exchange: in a group of several ranks a slice
        self.blocks: list[Tensor] = []  # of several passes
        self.inside: list[Columns] = []  # exchanged inside of the group
        self.columns: list[Columns] = []  # exchanged between the groups
        self.exchange: Exchange | None = None  # of its sketch; of the step's in the last one
        self.crossed = self.arrived = self.weighed = self.reduced = False
        self.numbers: Numbers | None = None  # by which its ranks are judged
        self.gramian: Tensor | None = None
        self.sum: GramianSum | None = None  # of its Gramian; or the step's
        self.transfer = Transfer()  # of the whole buffer, where the backend averages it

    @property
    def transfers(self) -> list[Transfer]:
        """Everything that may be under way."""
        own = [self.transfer] if self.sum is None else [self.transfer, self.sum.transfer]
        sketched = [] if self.exchange is None else self.exchange.transfers
        return own + sketched + [columns.transfer for columns in self.inside + self.columns]


class Exchange(Protocol):
    """Something beside the bucket that is under way for it, and makes its Gramian."""

    @property
    def transfers(self) -> list[Transfer]: ...

    def sum(self) -> GramianSum: ...

    def end(self) -> None: ...


class Stages(ABC):
    """What is done with a bucket in each stage. Alike on every rank, in the same order."""

    wire: Wire
    """Of the ranks that exchange rows."""

    rows: int
    """Of the Gramian that the weights are found for: the number of groups."""

    passes: Passes

    inside = False
    """Whether groups average inside of them, before the weights are found."""

    lag = 0
    """How many stages come before the rows are exchanged."""

    kind = Kind.PLAIN_MEAN

    def __init__(self, state: GrainState, marks: Marks) -> None:
        self.state, self.options, self.marks = state, state.options, marks

    def begin(self, kind: Kind) -> None:
        """A step of that kind starts."""
        self.kind = kind

    @abstractmethod
    def drop(self) -> None:
        """Forget what is under way."""

    @abstractmethod
    def message(self, buffer: Tensor) -> int:
        """The most elements of one row of such a buffer that travel together."""

    @abstractmethod
    def advance(self) -> None:
        """Take what has stages of its own one on, before a bucket enters."""

    @abstractmethod
    def enter(self, bucket: Bucket) -> None:
        """Start what comes first."""

    @abstractmethod
    def cross(self, bucket: Bucket) -> None:
        """Start what is between the groups; before it, complete what is inside of the own one."""

    @abstractmethod
    def arrive(self, bucket: Bucket) -> None:
        """Complete the exchange of rows; start to sum the Gramian, if it is the bucket's own."""

    @abstractmethod
    def sum(self, buckets: Sequence[Bucket]) -> None:
        """Start to sum the Gramian of buckets that share their weights."""

    @abstractmethod
    def reduce(self, bucket: Bucket) -> None:
        """Wait for the weights, and start on the result."""

    @abstractmethod
    def complete(self, buckets: Sequence[Bucket]) -> None:
        """The result is in every bucket."""
