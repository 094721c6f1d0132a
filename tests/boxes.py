"""What the tests of several hosts share."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from cluster_in_a_box import Cluster, Unavailable

ROOT = Path(__file__).resolve().parents[1]
BOX = [sys.executable, str(ROOT / "launch" / "cluster_in_a_box.py")]
DEADLINE = 90.0
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes on the hosts


@cache
def unavailable() -> str:
    try:
        with Cluster(1) as cluster:
            status = cluster.start(0, ["true"]).wait(DEADLINE)
            return f"a command on a host ended with status {status}" if status else ""
    except Unavailable as error:
        return str(error)


def until(what: Callable[[], Any], deadline: float = DEADLINE, every: float = 0.05) -> None:
    end = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < end, "it has not happened by the deadline"
        time.sleep(every)
