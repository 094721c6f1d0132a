"""The wire over an MPI communicator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from grain_ddp._wire.wire import Transfer, Wire

_HALF = MPI.BYTE.Create_contiguous(2).Commit()  # fp16, which not every MPI knows


class MpiWire(Wire):
    """The ranks of an MPI communicator, which must have no other traffic. CPU tensors only."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__(comm.rank, comm.size)
        self.comm = comm

    def exchange(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], what: object = "an exchange"
    ) -> Transfer:
        # Pairs of messages: the collectives also move this rank's own part. Between two ranks they
        # arrive in the order in which they were sent, so they need no tags.
        if self.size == 1:
            return Transfer()
        if self.checking:
            self._check("exchange", send, receive, what)
        peers = [(self.rank + k) % self.size for k in range(1, self.size)]
        try:
            requests = [
                self.comm.Irecv(_bytes(receive[j]), self.ranks[j])
                for j in reversed(peers)
                if receive[j].numel()
            ]
            requests += [
                self.comm.Isend(_bytes(send[j]), self.ranks[j]) for j in peers if send[j].numel()
            ]
        except MPI.Exception as error:
            raise self.lost(error, None, what) from error
        wait = partial(MPI.Request.Waitall, requests)
        return Transfer([(wait, None)], [*send, *receive], (), self, what)

    def all_reduce(self, values: Tensor, what: object = "a sum") -> Transfer:
        if self.whole.checking:
            self.whole._check("sum", [values] * self.whole.size, [values] * self.whole.size, what)
        array = values.numpy()
        try:
            if values.dtype == torch.float16:
                self.comm.Allreduce(MPI.IN_PLACE, [array, array.size, _HALF], _add_halves)
            else:
                self.comm.Allreduce(MPI.IN_PLACE, array)
        except MPI.Exception as error:
            raise self.lost(error, None, what) from error
        return Transfer()


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = values.view(torch.uint8).numpy()
    return array


def _sum_of_halves(a: Any, b: Any, _: MPI.Datatype) -> None:
    total = np.frombuffer(b, np.float16)
    np.add(np.frombuffer(a, np.float16), total, out=total)


_add_halves = MPI.Op.Create(_sum_of_halves, commute=True)
