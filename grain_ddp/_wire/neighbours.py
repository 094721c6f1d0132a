"""Ranks of one host read each other's memory: one copy, where a socket takes two and the protocol.

By Linux's cross-memory attach (process_vm_readv), as MPI libraries do. What a rank has to be read,
and what it has read, it shows on a small board in shared memory; the others wait by futex.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary, finalize

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grain_ddp._wire import memory
from grain_ddp._wire.host import Marks, viewpoint
from grain_ddp._wire.lost import DIED, ELSEWHERE, ENDED, FAILED, GAVE_UP, Gone, OutOfStep

SWITCH = "GRAIN_DDP_CMA"
"""Environment variable: with 0 on a rank, it reads from no other rank, and none from it."""

SPACES = 3
"""Kinds of exchanges, each of which is counted on its own."""

SLOTS = 4096
"""The most exchanges of a kind that may be under way at once."""

_SLICE = 500_000_000  # ns between two looks whether the ranks that are waited for are still there

_LEFT = {1: ENDED, 2: FAILED}  # what a board says of a rank that is not there any more


class _Board:
    """What one rank shows of its exchanges, each of which has a slot, used again lap by lap.

    ``messages[slot, k]`` is where its message to the host's k-th rank lies, and how many bytes it
    has. `posted` and `read` hold the lap in which these were written, and in which the rank had
    read all that was for itself; a lap with a minus sign was given up. ``left[0]`` says that the
    rank takes part no more.
    """

    def __init__(self, mapped: Any, ranks: int) -> None:
        slots = SPACES * SLOTS
        self.left = np.frombuffer(mapped, np.int64, 1)
        self.posted = np.frombuffer(mapped, np.int32, slots, 8)
        self.read = np.frombuffer(mapped, np.int32, slots, 8 + 4 * slots)
        messages = np.frombuffer(mapped, np.int64, slots * ranks * 2, 8 + 8 * slots)
        self.messages = messages.reshape(slots, ranks, 2)

    @staticmethod
    def size(ranks: int) -> int:
        """Of its file, in bytes. Only what has been written takes memory."""
        return 8 + SPACES * SLOTS * (8 + 16 * ranks)


class _Neighbour(NamedTuple):
    process: int
    board: _Board
    address: int  # of its mark
    mark: int

    def lost(self) -> str | None:
        """How it was lost, if it was."""
        if self.board.left[0]:
            return _LEFT[int(self.board.left[0])]
        try:
            memory.check_mark(self.process, self.address, self.mark)
        except OSError:
            return DIED
        return None


class Neighbours:
    """Other ranks of this host: this one reads from them, and they from it. `Search` finds them.

    All of them start the same exchanges in the same order, in each of the `SPACES`. ``reading[j]``
    is whom rank j can read from. From `close` on, and when this is dropped or the program ends,
    the others know that this rank has left.
    """

    def __init__(
        self,
        rank: int,
        board: _Board,
        places: Mapping[int, int],
        others: Mapping[int, _Neighbour],
        reading: Sequence[Collection[int]],
        timeout: Callable[[], float],
        leaving: Callable[[], None],
    ) -> None:
        self.rank, self.board, self.places, self.others = rank, board, places, others
        self.reading, self.timeout = reading, timeout
        # By slot. Weak, so that what is dropped after an error does not keep its slot.
        self.under_way: WeakValueDictionary[int, Exchange] = WeakValueDictionary()
        self._started = [0] * SPACES
        self.close = finalize(self, leaving)

    def among(self, ranks: Iterable[int]) -> bool:
        """Whether each of these ranks reads from all of the others; the same answer on all."""
        return all({*ranks} <= {rank, *self.reading[rank]} for rank in ranks)

    def lost(self) -> dict[int, str]:
        """The ranks that are lost, and how."""
        every = {rank: other.lost() for rank, other in self.others.items()}
        return {rank: how for rank, how in every.items() if how}

    def start(self, space: int, messages: Mapping[int, Tensor]) -> Exchange:
        """Show some ranks the messages for them. RuntimeError if too many are under way."""
        lap, place = divmod(self._started[space], SLOTS)
        slot = space * SLOTS + place
        if slot in self.under_way:
            raise RuntimeError(
                f"grain_ddp: more than {SLOTS} messages to a rank of this host are under way. "
                f"Set {SWITCH}=0 on every rank, for the network in place of shared memory."
            )
        self._started[space] += 1
        for rank, message in messages.items():
            self.board.messages[slot, self.places[rank]] = message.data_ptr(), message.nbytes
        _show(self.board.posted, slot, lap + 1)
        self.under_way[slot] = exchange = Exchange(self, slot, lap + 1, messages)
        return exchange


class Exchange:
    """What was started with neighbours. OSError in any method: a rank is lost, or out of step.

    If this is dropped before it is closed, the others know that what it showed is void.
    """

    def __init__(
        self, near: Neighbours, slot: int, lap: int, messages: Mapping[int, Tensor]
    ) -> None:
        self._near, self._slot, self._lap, self._messages = near, slot, lap, messages
        self._closed = False

    def read(self, rank: int, out: Tensor) -> None:
        """Wait for the message of that rank, and copy it."""
        other = self._near.others[rank]
        self._wait(rank, other.board.posted)
        place = self._near.places[self._near.rank]
        address, length = other.board.messages[self._slot, place].tolist()
        if length != out.nbytes:
            raise OutOfStep(f"expected {out.nbytes} bytes from rank {rank}, but found {length}")
        try:
            memory.copy(other.process, address, out.data_ptr(), length)
        except OSError as error:
            raise Gone(rank, other.lost() or GAVE_UP, str(error)) from error
        if other.board.posted[self._slot] != self._lap:  # given up: it may not be what was shown
            raise Gone(rank, GAVE_UP)

    def all_read(self) -> None:
        """Tell the others that this rank has read what it wants to."""
        _show(self._near.board.read, self._slot, self._lap)

    def wait_for(self, rank: int) -> None:
        """Wait until that rank has read what it wants to."""
        self._wait(rank, self._near.others[rank].board.read)

    def close(self) -> None:
        """Give the slot back: everything has been waited for."""
        self._closed = True
        self._near.under_way.pop(self._slot, None)

    def __del__(self) -> None:
        if not self._closed and not sys.is_finalizing():
            board = self._near.board
            for words in (board.posted, board.read):
                _show(words, self._slot, -self._lap)

    def _wait(self, rank: int, words: NDArray[np.int32]) -> None:
        slot, lap = self._slot, self._lap
        start, left = time.monotonic(), False
        # Below −lap: a later one was given up, before this rank had seen that this one was not.
        while (found := int(words[slot])) != lap and found >= -lap:
            if found == -lap:
                raise Gone(rank, GAVE_UP)
            memory.futex(words, slot, memory.WAIT, found, _SLICE)
            if words[slot] == found:
                left = self._look(rank, left)
                if time.monotonic() - start > self._near.timeout():
                    raise Gone(rank, ELSEWHERE, f"nothing for {self._near.timeout():g} seconds")

    def _look(self, rank: int, left: bool) -> bool:
        """Gone if a rank of this exchange is lost. Whether the one that is waited for has left."""
        for one in self._messages:
            how = self._near.others[one].lost()
            # Who has left may have shown everything just before: another look at that.
            if how == DIED or (one == rank and how and left):
                raise Gone(one, how)
            left |= one == rank and how is not None
        return left


def _show(words: NDArray[np.int32], slot: int, lap: int) -> None:
    # A memory barrier: whoever sees the lap sees what was before.
    memory.futex(words, slot, memory.WAKE, memory.ALL, _SLICE)
    words[slot] = lap
    memory.futex(words, slot, memory.WAKE, memory.ALL, _SLICE)


class Offer(NamedTuple):
    """What a rank tells all others, so that those of its host find it."""

    host: Marks
    viewpoint: Marks
    process: int
    file: int
    address: int
    mark: int
    yama: bool


class Search:
    """The search for the other ranks of this host. Collective: all ranks make one and `end` it.

    ``offer`` is for all the others. Nothing is taken for granted: each rank reads a random number
    out of every other's memory. `timeout` is in seconds.
    """

    def __init__(self, rank: int, host: Marks, timeout: Callable[[], float]) -> None:
        self._rank, self._timeout = rank, timeout
        self._files = contextlib.ExitStack()
        self.offer: Offer | None = None
        seen = viewpoint()
        able = sys.platform == "linux" and memory.known_machine() and seen is not None
        if able and os.environ.get(SWITCH) != "0":
            assert seen is not None
            with contextlib.suppress(OSError):
                self._mark = mark = memory.Mark()
                self._file = file = memory.create(mark.value)
                self._files.callback(os.close, file)
                yama = memory.yama_asks()
                self.offer = Offer(host, seen, os.getpid(), file, mark.address, mark.value, yama)

    def __enter__(self) -> Search:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.close()

    def end(
        self, offers: Sequence[Offer | None], gather: Callable[[Any], list[Any]]
    ) -> Neighbours | None:
        """Who was found, given every rank's offer. `gather` collects a value of every rank's."""
        me, mine = self._rank, self.offer
        hosts = [(offer.host, offer.viewpoint) if offer else None for offer in offers]
        if not any(host and hosts.count(host) > 1 for host in hosts):
            return None
        local = {
            rank: offer
            for rank, offer in enumerate(offers)
            if offer and mine and hosts[rank] == hosts[me]
        }
        others = {rank: offer for rank, offer in local.items() if rank != me}
        take_back = None
        if any(offer.yama for offer in offers if offer):
            if mine and mine.yama and others:
                take_back = memory.allow(offer.process for offer in others.values())
            gather(None)  # nobody tries before all have allowed it
        board, files = self._meet(others)
        reading = gather(list(files))
        found = {
            rank: _Neighbour(
                others[rank].process,
                _Board(memory.map_theirs(files[rank], _Board.size(len(local))), len(local)),
                others[rank].address,
                others[rank].mark,
            )
            for rank in files
            if me in reading[rank]
        }
        leaving = _Leaving(board, self._mark, take_back) if board and found else None
        if leaving is None:
            if take_back is not None:
                take_back()
            return None
        assert board is not None
        places = {rank: k for k, rank in enumerate(local)}
        return Neighbours(me, board, places, found, reading, self._timeout, leaving)

    def _meet(self, others: Mapping[int, Offer]) -> tuple[_Board | None, dict[int, int]]:
        """This rank's board, and the files of those whom it can read from."""
        files: dict[int, int] = {}
        if not others:
            return None, files
        try:
            ranks = len(others) + 1
            board = _Board(memory.map_own(self._file, _Board.size(ranks)), ranks)
        except OSError:
            return None, files
        for rank, other in others.items():
            with contextlib.suppress(OSError):
                memory.check_mark(other.process, other.address, other.mark)
                files[rank] = memory.open_theirs(other.process, other.file, other.mark)
                self._files.callback(os.close, files[rank])
        return board, files


class _Leaving:
    """What a rank does when it leaves: also at the end of the program, if that has an end."""

    def __init__(self, board: _Board, mark: memory.Mark, done: Callable[[], None] | None) -> None:
        self._board, self._mark, self._done = board, mark, done
        self._process = os.getpid()

    def __call__(self) -> None:
        if os.getpid() != self._process:  # a fork of the rank, which takes part in nothing
            return
        failed = getattr(sys, "last_value", None) is not None
        self._board.left[0] = 2 if failed else 1
        if self._done is not None:
            self._done()
