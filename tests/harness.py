"""Runs a function on n ranks, each a process of its own, with one deadline for all of them."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Ranks are forked from a server that has imported once what takes long, and has no threads.
_context = multiprocessing.get_context("forkserver")
_PRELOAD = ["grain_ddp", "pytest", "scipy.optimize", "torch._dynamo", "deepspeed"]
if not torch.cuda.is_available():  # it asks CUDA for its devices, and then no fork can use them
    _PRELOAD += ["torch._inductor.compile_fx"]
_PRELOAD += ["transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "peft"]
_PRELOAD += ["accelerate", "lightning.pytorch", "torchjd.aggregation"]
_context.set_forkserver_preload(_PRELOAD)

TIMEOUT = 20.0
"""Seconds that a collective waits for the other ranks."""

GRACE = 10.0
"""Seconds in which a rank ends that has nothing more to do."""


@dataclass
class Outcome:
    """How one rank ended: with a value, with an error, or not at all."""

    rank: int
    value: Any = None
    error: str | None = None  # the traceback
    exitcode: int | None = 0  # None: it hung, and was killed at the deadline

    @property
    def failed(self) -> bool:
        return self.error is not None or self.exitcode != 0


class RanksFailed(AssertionError):
    """Some rank raised, died or hung; the message has each one's traceback."""


def launch(
    n: int,
    function: Callable[..., Any],
    *arguments: Any,
    deadline: float = 90,
    timeout: float = TIMEOUT,
) -> list[Outcome]:
    """Run ``function(*arguments)`` on n ranks of a gloo group, and say how each one ended.

    The function and its arguments are pickled: it must be at the top of a module.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = {}, []
        for rank in range(n):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_rank, args=(rank, n, folder, timeout, theirs, function, arguments)
            )
            process.start()
            theirs.close()
            ends[ours] = rank
            processes.append(process)
        outcomes = [Outcome(rank, exitcode=None) for rank in range(n)]
        until = time.monotonic() + deadline
        open_ends: set[Connection] = set(ends)
        while open_ends and time.monotonic() < until:
            for end in wait(list(open_ends), max(0.0, until - time.monotonic())):
                assert isinstance(end, Connection)
                outcome = outcomes[ends[end]]
                with contextlib.suppress(EOFError):  # it died without a word
                    outcome.value, outcome.error = pickle.loads(end.recv_bytes())
                open_ends.discard(end)
        for end in ends:
            end.close()  # what ranks wait for that could end
        late = {ends[end] for end in open_ends}
        for outcome, process in zip(outcomes, processes, strict=True):
            process.join(0 if outcome.rank in late else GRACE)
            outcome.exitcode = process.exitcode
            if process.is_alive():
                process.kill()
                process.join()
                dump = Path(folder, f"stack{outcome.rank}")
                outcome.error = f"hung; at the deadline of {deadline} s it was at\n" + (
                    dump.read_text() if dump.exists() else ""
                )
            elif outcome.exitcode and outcome.error is None:
                outcome.error = f"died with exit code {outcome.exitcode}"
        return outcomes


def run(n: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """`launch`, for ranks that must all succeed: their values, in rank order."""
    outcomes = launch(n, function, *arguments, **options)
    if any(outcome.failed for outcome in outcomes):
        raise RanksFailed("\n".join(f"rank {o.rank}: {o.error}" for o in outcomes if o.failed))
    return [outcome.value for outcome in outcomes]


def _rank(
    rank: int,
    n: int,
    folder: str,
    timeout: float,
    result: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    store = dist.FileStore(str(Path(folder, "store")), n)
    with open(Path(folder, f"stack{rank}"), "w") as stack:
        faulthandler.dump_traceback_later(timeout * 3, file=stack)
        try:
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=n,
                timeout=timedelta(seconds=timeout),
            )
            value, error = function(*arguments), None
        except BaseException:
            value, error = None, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        # Plain pickle: multiprocessing's own would send a tensor as a handle of this process.
        result.send_bytes(pickle.dumps((value, error)))
        if error is None:  # nobody leaves while another still talks to it
            with contextlib.suppress(EOFError):
                result.recv_bytes()
        os._exit(0)  # not waiting for gloo's threads, which may wait for a dead rank
