"""What tells one host from another, and processes that can look into each other from others."""

from __future__ import annotations

import contextlib
import os
import socket

Marks = tuple[str, ...]


def host() -> Marks:
    """What tells this rank's host from others. A network namespace counts as one."""
    marks = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on Linux
        with open("/proc/sys/kernel/random/boot_id") as file:
            marks.append(file.read().strip())
        marks.append(_namespace("net"))
    return tuple(marks)


def viewpoint() -> Marks | None:
    """What processes have in common for whom a number is the same process, and their own user's.

    None where it cannot be known. Pods may share a host's name and number their processes alike.
    """
    try:
        return _namespace("pid"), _namespace("user"), str(os.geteuid())
    except (OSError, AttributeError):  # not on Linux
        return None


def _namespace(kind: str) -> str:
    return os.readlink(f"/proc/self/ns/{kind}")  # such as net:[4026531840]
