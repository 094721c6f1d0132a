"""A gather by a ring, for hosts that share a link between several ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grain_ddp._wire.wire import Transfer, Wire


class Ring(Transfer):
    """Parts of all ranks, each handed on from rank to rank.

    So a rank receives from one other at a time, and the link of a host with several ranks carries
    a part once.
    """

    def __init__(self, wire: Wire, own: Tensor, parts: Sequence[Tensor], what: object) -> None:
        super().__init__()
        self._ring, self._own, self._parts, self._name = wire, own, parts, what
        self._hops: list[Transfer] = []
        self._hop()

    def _hop(self) -> None:
        wire, n, step = self._ring, self._ring.size, len(self._hops)
        nothing = self._own.new_empty(0)
        send, receive = [nothing] * n, [nothing] * n
        before = (wire.rank - 1) % n
        send[(wire.rank + 1) % n] = self._parts[wire.rank - step] if step else self._own
        receive[before] = self._parts[before - step]
        self._hops.append(wire.exchange(send, receive, self._name))

    def advance(self) -> bool:
        self._hops[-1].arrive()
        more = len(self._hops) < self._ring.size - 1
        if more:
            self._hop()
        return more

    def arrive(self) -> None:
        while self.advance():
            pass

    def wait(self) -> None:
        self.arrive()
        for hop in self._hops:
            hop.wait()
