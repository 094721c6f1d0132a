"""What moves: one primitive, an all-to-all of views, over a torch process group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A Gramian is gathered whole up to this many ranks (n³/2 numbers in one round), and summed by an
# all-reduce (n² numbers, more rounds) beyond it.
_GATHER_LIMIT = 32

# Tags of point-to-point messages, out of the way of a user's own small ones.
_FIRST_TAG, _TAGS = 0x6000, 0x1000


def default_group() -> dist.ProcessGroup:
    """The group of all ranks. RuntimeError if there is none yet."""
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError(
            "grain_ddp: torch.distributed is not initialised. Start with torchrun, and call "
            "torch.distributed.init_process_group() first."
        )
    return group


class Transfer:
    """Messages under way. `wait` returns when all have been sent and received.

    On a CPU it blocks, at most for the process group's timeout; on a GPU it makes the current
    stream wait. The tensors are kept alive until then. ``peers[k]`` is the rank at the other end
    of ``works[k]``, where there is one.
    """

    def __init__(
        self,
        works: Sequence[dist.Work] = (),
        tensors: Sequence[Tensor] = (),
        peers: Sequence[int] = (),
    ) -> None:
        self._works, self._tensors, self._peers = works, tensors, peers

    def wait(self) -> None:
        """RuntimeError, with the backend's own as its cause, if another rank is lost."""
        for k, work in enumerate(self._works):
            try:
                work.wait()
            except RuntimeError as error:
                lost = f"rank {self._peers[k]}" if self._peers else "another rank"
                raise RuntimeError(
                    f"grain_ddp: lost the connection to {lost}: it has died or hangs, or the "
                    "network is cut. No parameter of this rank has changed in this step. Look for "
                    "the first error of all ranks, and resume from a checkpoint. "
                    f"The backend says: {error}"
                ) from error
        self._works = self._tensors = self._peers = ()


class TorchWire:
    """The ranks of a torch process group: gloo or MPI on CPUs, NCCL and its like on GPUs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self._tag = 0

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Transfer:
        """Send ``send[j]`` to rank j and receive ``receive[j]`` from it, asynchronously.

        All are contiguous, of one dtype, of any length; lengths agree pair by pair. Entries of
        this rank itself are ignored, empty ones are not sent.
        """
        self._tag = (self._tag + 1) % _TAGS
        tensors = [*send, *receive]
        if self.size == 1:
            return Transfer()
        if tensors[0].device.type == "cpu":
            works = self._pairwise(send, receive, _FIRST_TAG + self._tag)
            return Transfer([work for work, _ in works], tensors, [peer for _, peer in works])
        empty = tensors[0].new_empty(0)
        work = dist.all_to_all(
            [empty if j == self.rank else t for j, t in enumerate(receive)],
            [empty if j == self.rank else t for j, t in enumerate(send)],
            group=self.group,
            async_op=True,
        )
        return Transfer([work], tensors)

    def _pairwise(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], tag: int
    ) -> list[tuple[dist.Work, int]]:
        """Each message with the rank at its other end."""
        # On gloo, pairs of messages take half of the time of its own all_to_all and all_gather.
        # Starting with the next rank spreads the ranks over the links.
        peers = [(self.rank + k) % self.size for k in range(1, self.size)]
        received = [j for j in reversed(peers) if receive[j].numel()]
        works = [(self.group.recv([receive[j]], j, tag), j) for j in received]
        works += [(self.group.send([send[j]], j, tag), j) for j in peers if send[j].numel()]
        return works

    def sum(self, values: Tensor) -> tuple[Transfer, Tensor]:
        """Start summing ``values`` [m] over the ranks: a transfer, and what it fills: ``[k, m]``.

        The sum of its k rows is the same on every rank, bit by bit.
        """
        if self.size > _GATHER_LIMIT:
            return self.all_reduce(values), values[None]
        rows = values.new_empty(self.size, len(values))
        rows[self.rank] = values
        return self.exchange([values] * self.size, list(rows)), rows

    def all_reduce(self, values: Tensor) -> Transfer:
        """Start the backend's own sum over the ranks, in place."""
        if self.size == 1:
            return Transfer()
        return Transfer([dist.all_reduce(values, group=self.group, async_op=True)], [values])

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raise a ValueError on every rank unless all ranks pass equal values."""
        every = self.gather_objects(dict(values))
        for name in sorted({name for ranks in every for name in ranks}):
            found = [ranks.get(name) for ranks in every]
            if any(value != found[0] for value in found):
                detail = ", ".join(f"rank {j}: {value!r}" for j, value in enumerate(found))
                raise ValueError(
                    f"grain_ddp: {name} must be the same on every rank, but it is {detail} "
                    f"(this is rank {self.rank}). Make the ranks agree and start again."
                )

    def same(self, value: str, device: torch.device) -> bool:
        """Whether all ranks pass the same text; the same answer on all of them."""
        digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest(), "big")
        extremes = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
        largest, smallest = extremes.tolist()
        return bool(largest == -smallest)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self.group)
        return every
