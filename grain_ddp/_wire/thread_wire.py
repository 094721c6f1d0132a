"""n ranks as threads of one process: what a debugger can step through, and always the same way.

One rank runs at a time, until it waits for a message that is not there; then the next one does. If
all of them wait, that is an error at once.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grain_ddp._wire.lost import ELSEWHERE, ENDED, Gone, OutOfStep
from grain_ddp._wire.wire import Message, Transfer, Wire


def run(n: int, function: Callable[..., Any], *arguments: Any, deadline: float = 60) -> list[Any]:
    """What ``function(wire, *arguments)`` returned on each of n ranks; or the error it raised.

    Raises:
        TimeoutError: a rank was not done by the deadline, in seconds: it says where each one is.
    """
    stage = _Stage(n)
    found: list[Any] = [None] * n

    def play(rank: int) -> None:
        try:
            stage.wait_for_turn(rank)
            found[rank] = function(ThreadWire(stage, rank), *arguments)
        except BaseException as error:
            found[rank] = error
        finally:
            stage.leave(rank)

    threads = [threading.Thread(target=play, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + deadline
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    late = [thread for thread in threads if thread.is_alive()]
    if late:
        frames = sys._current_frames()
        stacks = ["".join(traceback.format_stack(frames.get(thread.ident))) for thread in late]  # type: ignore[arg-type]
        raise TimeoutError("grain_ddp: ranks are not done by the deadline:\n" + "\n".join(stacks))
    return found


class _Stage:
    """Whose turn it is, and what the ranks have put down for each other."""

    def __init__(self, n: int) -> None:
        self.size = n
        self.mail: dict[tuple[int, ...], Tensor] = {}  # what was sent and is not yet received
        self.waiting: dict[int, int] = {}  # for whom, since anything was sent or received
        self.playing = list(range(n))
        self._turn = 0
        self._changed = threading.Condition(threading.RLock())

    def wait_for_turn(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank)

    def wait(self, rank: int, other: int, ready: Callable[[], bool]) -> None:
        """Let the others play until something is ready, which the other rank makes so."""
        while not ready():
            if other not in self.playing:
                raise Gone(other, ENDED)
            self.waiting[rank] = other
            if len(self.waiting) == len(self.playing):
                raise Gone(other, ELSEWHERE, f"all ranks wait, for {self.waiting}")
            self._pass_on(rank)
            self.wait_for_turn(rank)
        self.waiting.clear()

    def leave(self, rank: int) -> None:
        with self._changed:
            self.waiting.clear()
            self._pass_on(rank)
            self.playing.remove(rank)

    def _pass_on(self, rank: int) -> None:
        with self._changed:
            place = self.playing.index(rank)
            self._turn = self.playing[(place + 1) % len(self.playing)]
            self._changed.notify_all()


class ThreadWire(Wire):
    """A rank of n that are threads of this process. CPU tensors only. `run` makes them."""

    def __init__(self, stage: _Stage, rank: int) -> None:
        super().__init__(rank, stage.size)
        self._stage, self._count = stage, 0

    def among(self, ranks: Sequence[int], space: int) -> Wire:
        wire = super().among(ranks, space)
        assert isinstance(wire, ThreadWire)
        wire._count = 0
        return wire

    def exchange(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], what: object = "an exchange"
    ) -> Transfer:
        if self.checking:
            self._check("exchange", send, receive, what)
        return self._start(send, receive, what)

    def _start(self, send: Sequence[Tensor], receive: Sequence[Tensor], what: object) -> Transfer:
        self._count += 1
        me, stage, label = self.ranks[self.rank], self._stage, (self.space, self._count)
        receiving, sending = list[Message](), list[Message]()
        for j, other in enumerate(self.ranks):
            if other != me and len(send[j]):
                mail = (*label, me, other)
                stage.mail[mail] = send[j]
                gone = partial(lambda mail: mail not in stage.mail, mail)
                sending.append((partial(stage.wait, me, other, gone), other))
            if other != me and len(receive[j]):
                take = partial(self._take, (*label, other, me), receive[j])
                receiving.append((take, other))
        stage.waiting.clear()
        return Transfer(receiving, [*send, *receive], sending, self, what)

    def _take(self, mail: tuple[int, ...], out: Tensor) -> None:
        """Read it where the sender has it, as late as that may be."""
        *_, other, me = mail
        self._stage.wait(me, other, lambda: mail in self._stage.mail)
        found = self._stage.mail.pop(mail)
        if found.nbytes != out.nbytes:
            raise OutOfStep(
                f"expected {out.nbytes} bytes from rank {other}, but found {found.nbytes}"
            )
        out.view(torch.uint8).copy_(found.view(torch.uint8))

    def all_reduce(self, values: Tensor, what: object = "a sum") -> Transfer:
        whole = self.whole
        assert isinstance(whole, ThreadWire)
        if whole.checking:
            whole._check("sum", [values] * whole.size, [values] * whole.size, what)
        rows = values.new_empty(whole.size, len(values))
        rows[whole.rank] = values
        gathered = whole._start([values.clone()] * whole.size, list(rows), what)

        def add() -> None:
            gathered.wait()
            torch.sum(rows, 0, out=values)

        return Transfer([(add, None)], [values], (), self, what)
