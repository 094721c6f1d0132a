"""Ranks on one machine, and the bytes that they send over its loopback interface."""

import fcntl
import os
import socket
import struct
import tempfile
from pathlib import Path

# They stand for hosts: they send, where ranks of one host would read each other's memory.
os.environ.setdefault("GRAIN_DDP_CMA", "0")


def loopback_up() -> None:
    """In a network namespace of one's own the interface exists, but is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(s, 0x8913, request))[1]
        if not flags & 1:
            fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", flags | 1))


def sent() -> int:
    """Bytes that the loopback interface has sent."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if "lo:" in x)
    return int(line.split(":")[1].split()[8])


def measure(context, work, n: int, *arguments) -> tuple[float, int, float]:
    """(seconds, bytes of memory, bytes sent per rank) of a step, as the n ranks of `work` say.

    A rank is ``work(rank, n, folder, *arguments, results)``, in a process of the context.
    """
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=work, args=(rank, n, folder, *arguments, results))
            for rank in range(n)
        ]
        for process in ranks:
            process.start()
        every = [results.get(timeout=300) for _ in ranks]
        for process in ranks:
            process.join(60)
    return tuple(max(values) for values in zip(*every, strict=True))
