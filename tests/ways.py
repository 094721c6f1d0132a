"""The same on every wire: threads of one process, gloo by memory and by network, and MPI.

As a program this is what mpiexec starts: ranks that do what they are told until nobody is there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from harness import Outcome, launch

WAYS = ["threads", "memory", "network", "mpi"]
MPI_RANKS = 5
DEADLINE = 120.0


def play(way: str, n: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run ``function(wire, *arguments)`` on n ranks: how each one ended, in rank order.

    The function must be at the top of a module of tests.
    """
    if way == "threads":
        return _by_threads(n, function, *arguments)
    if way == "mpi":
        return _by_mpi(n, function, *arguments)
    return launch(n, _over_gloo, way, function, *arguments, **options)


def values(way: str, n: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function returned on each rank. All must succeed."""
    outcomes = play(way, n, function, *arguments)
    assert not any(one.failed for one in outcomes), [one.error for one in outcomes]
    return [one.value for one in outcomes]


def _outcome(rank: int, found: Any) -> Outcome:
    if isinstance(found, BaseException):
        return Outcome(rank, error="".join(traceback.format_exception(found)))
    return Outcome(rank, found)


def _by_threads(n: int, function: Callable[..., Any], *arguments: Any) -> list[Outcome]:
    from grain_ddp._wire.thread_wire import run

    found = run(n, function, *arguments, deadline=DEADLINE)
    return [_outcome(rank, one) for rank, one in enumerate(found)]


def _over_gloo(way: str, function: Callable[..., Any], *arguments: Any) -> Any:
    import torch.distributed as dist

    from grain_ddp._wire.neighbours import SWITCH
    from grain_ddp._wire.torch_wire import TorchWire

    os.environ[SWITCH] = "1" if way == "memory" else "0"
    return function(TorchWire(dist.group.WORLD), *arguments)


_mpi: tuple[Connection, subprocess.Popen[bytes]] | None = None


def _by_mpi(n: int, function: Callable[..., Any], *arguments: Any) -> list[Outcome]:
    """Started once, at the first call, as MPI takes seconds for it."""
    global _mpi
    if _mpi is None:
        from test_mpi import mpiexec

        with Listener(family="AF_UNIX") as listener:
            command = [mpiexec(), "-n", str(MPI_RANKS), sys.executable, __file__]
            listener._listener._socket.settimeout(DEADLINE)  # type: ignore[attr-defined]
            started = subprocess.Popen([*command, str(listener.address)])
            _mpi = listener.accept(), started
    ranks, process = _mpi
    ranks.send_bytes(pickle.dumps((n, function.__module__, function.__name__, arguments)))
    assert ranks.poll(DEADLINE), f"mpiexec: no answer; exit status {process.poll()}"
    return [Outcome(rank, *one) for rank, one in enumerate(pickle.loads(ranks.recv_bytes()))]


def end_mpi() -> None:
    """Its ranks end, and it with them."""
    global _mpi
    if _mpi is not None:
        ranks, process = _mpi
        ranks.close()
        process.wait(DEADLINE)
        _mpi = None


def _rank(address: str) -> None:
    import torch
    from mpi4py import MPI

    from grain_ddp._wire.mpi_wire import MpiWire

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    teller = Client(address, "AF_UNIX") if world.rank == 0 else None
    while True:
        task = None
        if teller is not None:
            with contextlib.suppress(EOFError):
                task = pickle.loads(teller.recv_bytes())
        task = world.bcast(task)
        if task is None:
            return
        n, module, name, arguments = task
        comm = world.Split(0 if world.rank < n else 1)
        faulthandler.dump_traceback_later(DEADLINE, exit=True)
        value = error = None
        if world.rank < n:
            try:
                value = getattr(importlib.import_module(module), name)(MpiWire(comm), *arguments)
            except Exception:
                error = traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        found = world.gather((value, error))
        comm.Free()
        if teller is not None:
            teller.send_bytes(pickle.dumps(found[:n]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _rank(sys.argv[1])
