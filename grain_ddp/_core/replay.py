"""Is it the machine or the batch? Ranks compute each other's gradients, and compare."""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grain_ddp._core.digest import bits
from grain_ddp._core.guard import place
from grain_ddp._core.state import GrainState, in_use
from grain_ddp._math.record import Array
from grain_ddp._math.suspect import Suspect
from grain_ddp._wire.wire import Wire

Batch = TypeVar("Batch")
Digests = NDArray[np.int64]

CHUNK = 2**20
"""Elements of a gradient that are projected at a time."""

PROBES = 4
"""Random projections of each gradient, by which it is compared where bits need not be equal."""

TOLERANCE = 30.0
"""So many times the difference between two runs on one rank may two ranks differ."""


@dataclass(frozen=True)
class Replay:
    """What came out when batches were computed again; the same on every rank.

    Attributes:
        machine: whether a machine is to blame. Otherwise all agree now: what stood out, if anything
            did, was the batch, or a fault that came once.
        suspects: the ranks that computed what others did not, or not the same twice. Where two
            ranks differ and there is no third, both.
        deterministic: whether every sound rank had the same bits twice. If not, gradients were
            compared within `TOLERANCE` times the difference of two runs.
    """

    machine: bool
    suspects: tuple[Suspect, ...]
    deterministic: bool

    def __str__(self) -> str:
        if self.machine:
            return " ".join(map(str, self.suspects))
        how = "bit by bit" if self.deterministic else "within what two runs on one rank differ by"
        return (
            f"All ranks agree, {how}: no machine computes wrongly now. What stood out was the "
            "batch, or a fault that came and went: run the step again, and see whether it stands "
            "out again."
        )


def replay(
    backward: Callable[[Batch], object], batch: Batch, state: GrainState | None = None
) -> Replay:
    """Run this rank's batch twice and its neighbour's once, and compare the gradients. Collective.

    Where two ranks differ, a third one runs the batch too. Parameters, gradients, buffers and the
    random state are afterwards as they were; every run starts with the same random state. At the
    cost of three or four backward passes it can be called every some thousand steps, or when there
    is a suspect.

    Args:
        backward: runs forward and backward for a batch, on this rank alone. It need not avoid
            DDP's synchronisation: that is off meanwhile.
        batch: this rank's, of anything that `torch.save` takes.
        state: the one that serves the model. None: the only one in use.

    Raises:
        ValueError: there is no such state, or it serves nothing whose model is whole on every rank.
    """
    owner, wire, step = _serving(state)
    n, me = wire.size, wire.rank
    own = _packed(batch).to(wire.device)
    sizes = wire.gather_objects(len(own), "the sizes of batches")
    model = owner.replica()
    buffers = _buffers(model)

    def run(packed: Tensor) -> Tensor:
        return _run(backward, _unpacked(packed, model[0][1].device), model, buffers, step)

    def handed_on(packed: Tensor, places: int) -> Tensor:
        """The batch of the rank so many places before this one."""
        source, target = (me - places) % n, (me + places) % n
        empty = packed.new_empty(0)
        received = packed.new_empty(sizes[source])
        send = [packed if j == target else empty for j in range(n)]
        receive = [received if j == source else empty for j in range(n)]
        wire.exchange(send, receive, "batches").wait()
        return received

    local: AbstractContextManager[Any] = getattr(owner, "local", nullcontext)()
    with local:
        every = [run(own), run(own)]
        if n > 1:
            every.append(run(handed_on(own, 1)))
        found = _shared(wire, every)  # [rank, run, tensor, 1 + PROBES]
        tolerance = _tolerance(found)
        itself = _differ(found[:, 0], found[:, 1], tolerance)
        pairs = np.zeros(n, dtype=bool)
        if n > 1:  # of each batch: whether its own rank and the next one differ
            pairs = _differ(found[:, 0], np.roll(found[:, 2], -1, axis=0), tolerance)
        third = None
        if pairs.any() and n > 2:
            third = np.roll(_shared(wire, [run(handed_on(own, 2))])[:, 0], -2, axis=0)
    guilty = set(np.flatnonzero(itself).tolist())
    for j in np.flatnonzero(pairs).tolist():
        first, second, last = j, (j + 1) % n, (j + 2) % n
        if third is None:
            guilty |= guilty or {first, second}
            continue
        with_first, with_second = (
            _differ(digests[None], third[[j]], tolerance)[0]
            for digests in (found[first, 0], found[second, 2])
        )
        guilty |= {first} if not with_second else {second} if not with_first else set()
        guilty |= {first, second, last} if with_first and with_second else set()
    places = wire.gather_objects(place(wire), "the names of the hosts")
    suspects = [
        Suspect(step, rank, host, device, "replay", None, math.inf, 1)
        for rank, (host, device) in enumerate(places)
        if rank in guilty
    ]
    return Replay(bool(guilty), tuple(suspects), not tolerance.any())


def _serving(state: GrainState | None) -> tuple[Any, Wire, int]:
    """The owner of the state, its wire, and the number of the step."""
    if state is None:
        states = [one for one in in_use if one.owner is not None and not one.owner.gone]
        if len(states) != 1:
            raise ValueError(
                f"grain_ddp: {len(states)} states are in use, so replay cannot tell which is "
                "meant. Take a step first, and give it the state: replay(backward, batch, state)."
            )
        state = states[0]
    owner = state.owner
    if owner is None or not hasattr(owner, "replica") or not owner.replica():
        raise ValueError(
            f"grain_ddp: replay needs a model that is whole on every rank, but the state serves "
            f"{owner or 'nothing yet'}. It works after the first step under DDP, reduce_gradients, "
            "and DeepSpeed's stages 0 to 2."
        )
    return owner, owner.aggregation.wire.whole, state.step


def _run(
    backward: Callable[[Any], object],
    batch: Any,
    model: Sequence[tuple[str, Tensor]],
    buffers: Sequence[Tensor],
    step: int,
) -> Tensor:
    """The digests of the gradients, int64 ``[tensors, 1 + PROBES]``."""
    trained = [p for _, p in model if p.requires_grad]
    with _as_before(trained, buffers):
        torch.manual_seed(step)
        with torch.enable_grad():
            backward(batch)
        digests = [_digest(k, p.grad) for k, p in enumerate(trained)]
    return torch.stack(digests).cpu()


@contextmanager
def _as_before(trained: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
    """Without gradients inside; gradients, buffers and random state as they were afterwards."""
    gradients = [(p, p.grad) for p in trained]
    kept = [b.detach().clone() for b in buffers]
    devices = {t.device.index for t in trained if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        for p, _ in gradients:
            p.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for p, gradient in gradients:
                    p.grad = gradient
                for b, before in zip(buffers, kept, strict=True):
                    b.copy_(before)


def _buffers(model: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """The buffers of every module that has one of these parameters: a loop tells of no others."""
    known = {id(tensor) for _, tensor in model}
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    ours = [m for m in modules if any(id(p) in known for p in m.parameters())]
    return list({id(b): b for m in ours for b in m.buffers()}.values())


def _digest(number: int, gradient: Tensor | None) -> Tensor:
    """The bits and the probes of a gradient, int64 ``[1 + PROBES]``."""
    if gradient is None:
        return torch.zeros(1 + PROBES, dtype=torch.int64)
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    flat, probes = gradient.detach().reshape(-1), gradient.new_zeros(PROBES, dtype=torch.float64)
    generator = torch.Generator(flat.device).manual_seed(number)
    for part in torch.split(flat, CHUNK):
        shape = PROBES, len(part)
        signs = torch.randint(2, shape, generator=generator, device=flat.device) * 2.0 - 1
        probes += signs.double() @ part.double()
    return torch.cat([bits([flat]), probes.view(torch.int64)])


def _shared(wire: Wire, runs: Sequence[Tensor]) -> Digests:
    """Every rank's digests, ``[ranks, runs, tensors, 1 + PROBES]``."""
    own = torch.stack(list(runs))
    transfer, rows = wire.share(own.view(-1).to(wire.device), "the digests of gradients")
    transfer.wait()
    found: Digests = rows.cpu().view(-1, *own.shape).numpy()
    return found


def _tolerance(found: Digests) -> Array:
    """How far the probes of each tensor may be apart; 0: not in a bit."""
    each = np.sort(_apart(found[:, 0], found[:, 1]), axis=0)
    usual: Array = each[(len(each) - 1) // 2]  # of two the smaller one
    return TOLERANCE * usual


def _apart(first: Digests, second: Digests) -> Array:
    """The largest distance of probes, ``[k, tensors]``; 0 where all bits are equal."""
    a, b = (np.ascontiguousarray(one[..., 1:]).view(np.float64) for one in (first, second))
    with np.errstate(all="ignore"):
        distances = np.nan_to_num(np.abs(a - b).max(-1), nan=np.inf)
    tiny = np.finfo(np.float64).tiny  # other bits, and the same sums
    return np.where(first[..., 0] == second[..., 0], 0.0, np.maximum(distances, tiny))


def _differ(first: Digests, second: Digests, tolerance: Array) -> NDArray[np.bool_]:
    """Which of the gradients ``[k, tensors, 1 + PROBES]`` differ."""
    return np.asarray((_apart(first, second) > tolerance).any(-1))


def _packed(batch: Any) -> Tensor:
    memory = io.BytesIO()
    torch.save(batch, memory)
    return torch.frombuffer(bytearray(memory.getvalue()), dtype=torch.uint8)


def _unpacked(packed: Tensor, device: torch.device) -> Any:
    # From a rank of the same program, which could do anything to this one anyway.
    memory = io.BytesIO(packed.cpu().numpy().tobytes())
    return torch.load(memory, map_location=device, weights_only=False)
