"""What Linux offers to processes of one host: each other's memory, files in it, futexes, Yama."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import secrets
import stat
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}  # the system call's number
WAIT, WAKE, ALL = 0, 1, 2**31 - 1
_PR_SET_PTRACER, _NOBODY, _ANYONE = 0x59616D61, 0, -1
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"


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


def known_machine() -> bool:
    """Whether the number of a futex call is known here."""
    return platform.machine() in _FUTEX


def futex(words: NDArray[np.int32], slot: int, operation: int, value: int, limit: int) -> None:
    """Wait, for `limit` nanoseconds, while a word has that value; or wake so many who wait."""
    number, time = _FUTEX[platform.machine()], _Time(0, limit)
    _libc().syscall(number, words.ctypes.data + 4 * slot, operation, value, ctypes.byref(time))


def copy(process: int, address: int, to: int, count: int) -> None:
    """Copy bytes of another process to an address here. OSError if it may not, or that is gone."""
    while count:  # the kernel stops at 2 GiB
        here, there = _Range(to, count), _Range(address, count)
        done = _libc().process_vm_readv(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if done <= 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        address, to, count = address + done, to + done, count - done


class Mark:
    """A random number in this process's memory, by which others recognise it."""

    def __init__(self) -> None:
        self.value = secrets.randbits(62)
        self._memory = np.array([self.value], np.int64)
        self.address: int = self._memory.ctypes.data


def check_mark(process: int, address: int, value: int) -> None:
    """OSError unless that process has the mark of that value there."""
    found = np.zeros(1, np.int64)
    copy(process, address, found.ctypes.data, found.nbytes)
    if found[0] != value:
        raise ProcessLookupError("the process of that number is another")


# A file in memory is named after its owner's mark. Its owner alone gives it a size and writes to
# it; the others open it for reading.


def create(mark: int) -> int:
    """A new, empty file in memory. OSError where there are none."""
    return os.memfd_create(_name(mark))


def open_theirs(process: int, file: int, mark: int) -> int:
    """Another process's file, after a look whether it is what it should be. OSError if not."""
    path, expected = f"/proc/{process}/fd/{file}", f"/memfd:{_name(mark)} (deleted)"
    # Before it is opened: to open a pipe or a device is to do something to it.
    if os.readlink(path) != expected or not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("the process of that number has another file there")
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if os.readlink(f"/proc/self/fd/{opened}") != expected or os.fstat(opened).st_uid != _uid():
        os.close(opened)
        raise OSError("the process of that number has another file there")
    return opened


def map_own(file: int, size: int) -> mmap.mmap:
    """This process's own file, of that size from now on."""
    os.ftruncate(file, size)
    return mmap.mmap(file, size)


def map_theirs(file: int, size: int) -> mmap.mmap:
    """Another process's, to read. OSError if it has another size."""
    found = os.fstat(file).st_size
    if found != size:
        raise OSError(f"expected a file of {size} bytes, but found {found}")
    return mmap.mmap(file, size, prot=mmap.PROT_READ)


def _name(mark: int) -> str:
    return f"grain_ddp-{mark:x}"


def _uid() -> int:
    return os.geteuid()


# Where Yama lets processes read from their descendants only, each must name one other whose
# descendants may read from it too.


def yama_asks() -> bool:
    """Whether a process must allow others, of its own user, to read its memory."""
    with contextlib.suppress(OSError), open(_YAMA) as file:
        return file.read().strip() == "1"
    return False


_allowed: list[frozenset[int]] = []  # the processes that may read now


def allow(processes: Iterable[int]) -> Callable[[], None]:
    """Let these processes read this one's memory. Returns what takes the permission back."""
    those = frozenset(processes)
    _allowed.append(those)
    _tell_yama()

    def take_back() -> None:
        _allowed.remove(those)
        _tell_yama()

    return take_back


def _tell_yama() -> None:
    every = frozenset[int]().union(*_allowed)
    _libc().prctl(_PR_SET_PTRACER, _reader(every) if every else _NOBODY, 0, 0, 0)


def _reader(processes: frozenset[int]) -> int:
    """The nearest process of which all of these descend, or which they are.

    That is the one process, or the launcher; if they were not started by one, anyone.
    """
    first, *others = (_line(process) for process in sorted(processes))
    common = (process for process in first if all(process in line for line in others))
    nearest = next(common, 1)
    return nearest if nearest > 1 else _ANYONE


def _line(process: int) -> list[int]:
    """A process, its parent, and so on."""
    line = []
    with contextlib.suppress(OSError, ValueError):
        while process > 0:
            line.append(process)
            with open(f"/proc/{process}/stat") as file:
                process = int(file.read().rpartition(")")[2].split()[1])
    return line
