"""Ranks of one host read each other's memory: one copy, where a socket takes two and the protocol.

By Linux's cross-memory attach (process_vm_readv), as MPI libraries do. What a rank has to be read,
and what it has read, it shows on a small board in shared memory; the others wait by futex.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SWITCH = "GRAIN_DDP_CMA"
"""Environment variable: with 0 on a rank, it reads from no other rank, and none from it."""

SPACES = 3
"""Kinds of exchanges, each of which is counted on its own."""

SLOTS = 4096
"""The most exchanges of a kind that may be under way at once."""

_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}  # the system call's number
_WAIT, _WAKE, _ALL = 0, 1, 2**31 - 1
_PR_SET_PTRACER, _ANYONE = 0x59616D61, -1
_SLICE = 500_000_000  # ns between two looks whether a rank that is waited for is still there


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    word, pointer = ctypes.c_long, ctypes.c_void_p
    libc.process_vm_readv.argtypes = (word, pointer, word, pointer, word, word)
    libc.process_vm_readv.restype = word
    libc.syscall.argtypes = (word, pointer, word, word, pointer)
    libc.prctl.argtypes = (ctypes.c_int, word, word, word, word)
    return libc


def _futex(words: NDArray[np.int32], slot: int, operation: int, value: int) -> None:
    number, limit = _FUTEX[platform.machine()], _Time(0, _SLICE)
    _libc().syscall(number, words.ctypes.data + 4 * slot, operation, value, ctypes.byref(limit))


def _copy(process: int, address: int, to: int, count: int) -> None:
    """Copy bytes of another process to an address here. OSError if it may not, or that is gone."""
    while count:  # the kernel stops at 2 GiB
        here, there = _Range(to, count), _Range(address, count)
        done = _libc().process_vm_readv(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if done <= 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        address, to, count = address + done, to + done, count - done


class _Board:
    """What one rank shows of its exchanges, each of which has a slot, used again lap by lap.

    ``messages[slot, k]`` is where its message to the host's k-th rank lies, and how many bytes it
    has. `posted` and `read` hold the lap in which these were written, and in which the rank had
    read all that was for itself.
    """

    def __init__(self, file: int, ranks: int) -> None:
        slots = SPACES * SLOTS
        size = 8 + slots * (8 + 16 * ranks)
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        memory = mmap.mmap(file, size)
        self.mark = np.frombuffer(memory, np.int64, 1)
        self.posted = np.frombuffer(memory, np.int32, slots, 8)
        self.read = np.frombuffer(memory, np.int32, slots, 8 + 4 * slots)
        messages = np.frombuffer(memory, np.int64, slots * ranks * 2, 8 + 8 * slots)
        self.messages = messages.reshape(slots, ranks, 2)


class _Neighbour(NamedTuple):
    process: int
    board: _Board
    mark: int  # where the board's is in that process

    def check(self) -> None:
        """OSError if its memory cannot be read, or is not what it seems."""
        mark = np.zeros_like(self.board.mark)
        _copy(self.process, self.mark, mark.ctypes.data, mark.nbytes)
        if mark != self.board.mark:
            raise OSError("the process of that number is another")


class Neighbours:
    """Other ranks of this host: this one reads from them, and they from it. `find` finds them.

    All of them start the same exchanges in the same order, in each of the `SPACES`. ``reading[j]``
    is whom rank j can read from.
    """

    def __init__(
        self,
        rank: int,
        board: _Board,
        places: Mapping[int, int],
        others: Mapping[int, _Neighbour],
        reading: Sequence[Collection[int]],
        timeout: Callable[[], float],
    ) -> None:
        self.rank, self.board, self.places, self.others = rank, board, places, others
        self.reading, self.timeout = reading, timeout
        # By slot. Weak, so that what is dropped after an error does not keep its slot.
        self.under_way: WeakValueDictionary[int, Exchange] = WeakValueDictionary()
        self._started = [0] * SPACES

    def among(self, ranks: Iterable[int]) -> bool:
        """Whether each of these ranks reads from all of the others; the same answer on all."""
        return all({*ranks} <= {rank, *self.reading[rank]} for rank in ranks)

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
        self.under_way[slot] = exchange = Exchange(self, slot, lap + 1)
        return exchange


class Exchange:
    """What was started with neighbours. OSError in any method: a rank is gone, or took too long.

    RuntimeError if another rank sends something else than is expected here.
    """

    def __init__(self, near: Neighbours, slot: int, lap: int) -> None:
        self._near, self._slot, self._lap = near, slot, lap

    def read(self, rank: int, out: Tensor) -> None:
        """Wait for the message of that rank, and copy it."""
        other = self._near.others[rank]
        self._wait(other, other.board.posted)
        place = self._near.places[self._near.rank]
        address, length = other.board.messages[self._slot, place].tolist()
        if length != out.nbytes:
            raise RuntimeError(
                f"expected {out.nbytes} bytes from rank {rank}, but found {length}: it is at "
                "another place in the program"
            )
        _copy(other.process, address, out.data_ptr(), length)

    def all_read(self) -> None:
        """Tell the others that this rank has read what it wants to."""
        _show(self._near.board.read, self._slot, self._lap)

    def wait_for(self, rank: int) -> None:
        """Wait until that rank has read what it wants to."""
        other = self._near.others[rank]
        self._wait(other, other.board.read)

    def close(self) -> None:
        """Give the slot back: everything has been waited for."""
        self._near.under_way.pop(self._slot, None)

    def _wait(self, other: _Neighbour, words: NDArray[np.int32]) -> None:
        slot, lap = self._slot, self._lap
        start = time.monotonic()
        while (found := int(words[slot])) != lap:
            _futex(words, slot, _WAIT, found)
            if words[slot] == found:
                other.check()
                if time.monotonic() - start > self._near.timeout():
                    raise TimeoutError(f"nothing for {self._near.timeout():g} seconds")


def _show(words: NDArray[np.int32], slot: int, lap: int) -> None:
    _futex(words, slot, _WAKE, _ALL)  # a memory barrier: whoever sees the lap sees what was before
    words[slot] = lap
    _futex(words, slot, _WAKE, _ALL)


def find(
    rank: int,
    host: tuple[str, ...],
    gather: Callable[[Any], list[Any]],
    timeout: Callable[[], float],
) -> Neighbours | None:
    """The other ranks of this host, if they and this one can read each other's memory.

    Collective: `gather` collects every rank's value, in rank order. `timeout` is in seconds.
    Nothing is taken for granted: each reads a random number from every other.
    """
    able = sys.platform == "linux" and platform.machine() in _FUTEX
    able = able and os.environ.get(SWITCH) != "0"
    every = gather((host, os.getpid()) if able else None)
    local = [one for one, theirs in enumerate(every) if able and theirs and theirs[0] == host]
    shown = None
    with contextlib.ExitStack() as files:
        if len(local) > 1:
            with contextlib.suppress(OSError):
                file = os.memfd_create("grain_ddp")
                files.callback(os.close, file)
                board = _Board(file, len(local))
                board.mark[0] = secrets.randbits(62)
                _libc().prctl(_PR_SET_PTRACER, _ANYONE, 0, 0, 0)  # for Yama, where there is one
                shown = file, board.mark.ctypes.data
        boards = gather(shown)
        others = {}
        for one in local:
            if one != rank and shown and boards[one]:
                with contextlib.suppress(OSError):
                    others[one] = _meet(every[one][1], boards[one], len(local))
        reading = gather(list(others))
    others = {one: other for one, other in others.items() if rank in reading[one]}
    if not others:
        return None
    places = {one: k for k, one in enumerate(local)}
    return Neighbours(rank, board, places, others, reading, timeout)


def _meet(process: int, shown: tuple[int, int], ranks: int) -> _Neighbour:
    """OSError if the other's board or memory cannot be read."""
    file, mark = shown
    theirs = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
    try:
        other = _Neighbour(process, _Board(theirs, ranks), mark)
    finally:
        os.close(theirs)
    other.check()
    return other
