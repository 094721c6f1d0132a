"""A cluster's links and speeds, and what its collectives take by the α-β model: see `cost`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from grain_ddp._core.agreement import MARKS
from grain_ddp._core.transposed import MESSAGE_BYTES, SCRATCH_BYTES
from grain_ddp._wire import torch_wire, wire

SOLVER = ((2, 1e-4), (8, 1.9e-4), (64, 5e-4), (512, 0.015), (1024, 0.077))
"""Rows, and seconds of one solve: docs/benchmarks/solver.md, full rank and correlated."""

GPU_SOLVER = ((2, 1e-4), (32, 1e-4), (64, 3.8e-4))
"""The same on a GPU, for as many rows as it solves for: docs/benchmarks/gpu.md."""


@dataclass(frozen=True)
class Link:
    """Latency α in seconds per message, and bandwidth β in bytes per second in each direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """A host's ranks and links, and how fast a rank works on its own memory.

    `near` is one rank's link to another of its host, `far` one host's to all the others; None where
    there is none, or none was measured. The two of a kind differ only if measured: messages between
    pairs of ranks, and the backend's own all-reduce.
    """

    per_host: int  # ranks
    near: Link | None
    far: Link | None
    near_reduce: Link | None
    far_reduce: Link | None
    gramian: float  # bytes of rows per second
    weighted_sum: float  # the same
    copy: float  # bytes copied per second
    flops: float  # of the Gramian, where it has many rows
    gpu: bool = True
    capacity: float | None = None  # bytes of a GPU's memory
    solver: tuple[tuple[int, float], ...] = SOLVER

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Cluster:
        """From what `dataclasses.asdict` gave, also by way of JSON."""
        found = dict(values)
        for name in ("near", "far", "near_reduce", "far_reduce"):
            found[name] = None if found[name] is None else Link(**found[name])
        found["solver"] = tuple((int(n), float(seconds)) for n, seconds in found["solver"])
        return cls(**found)

    def waits(self, rows: int) -> bool:
        """Whether the host waits for the weights, and computing with it. (A GPU's is beside it.)"""
        return not self.gpu or rows > GPU_SOLVER[-1][0]

    def solve(self, rows: int) -> float:
        """Seconds to solve for that many rows: between measured sizes a power law, beyond n³."""
        known = self.solver if self.waits(rows) else GPU_SOLVER
        if rows <= known[0][0]:
            return known[0][1]
        for (low, fast), (high, slow) in pairwise(known):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return float(fast * (slow / fast) ** share)
        return float(known[-1][1] * (rows / known[-1][0]) ** 3)


def uniform(
    per_host: int,
    nvlink: float,
    link: float,
    memory: float,
    flops: float,
    capacity: float,
    gap: float = 2e-6,
) -> Cluster:
    """GPUs by their data sheets: bytes/s of a GPU inside a host, of a host, and of a GPU's memory,
    and bytes of that.

    Between messages inside a host half the gap in seconds; a step of a ring or tree takes 5 gaps.
    A copy reads and writes, so it runs at half of the memory's speed.
    """
    return Cluster(
        per_host,
        near=Link(gap / 2, nvlink),
        far=Link(gap, link),
        near_reduce=Link(2.5 * gap, nvlink),
        far_reduce=Link(5 * gap, link),
        gramian=memory,
        weighted_sum=memory,
        copy=memory / 2,
        flops=flops,
        capacity=capacity,
    )


@dataclass(frozen=True)
class Traffic:
    """Seconds on the network, bytes that a rank sends, and bytes that leave a host."""

    seconds: float = 0.0
    sent: float = 0.0
    out: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.seconds + other.seconds, self.sent + other.sent, self.out + other.out)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.seconds * times, self.sent * times, self.out * times)


class Network:
    """The collectives of n ranks."""

    def __init__(self, cluster: Cluster, ranks: int) -> None:
        self.cluster, self.ranks = cluster, ranks
        self.here = min(cluster.per_host, ranks)  # ranks of a host that take part
        if ranks > self.here and ranks % self.here:
            raise ValueError(
                f"grain_ddp: {ranks} GPUs do not fill hosts of {cluster.per_host}: give a multiple."
            )

    def _time(self, messages: tuple[float, float], sent: float, out: float, way: str) -> float:
        """α for each message near and far, and the slower of what goes near and far."""
        latency = busiest = 0.0
        for name, count, load in (("near", messages[0], sent), ("far", messages[1], out)):
            if count:
                link: Link | None = getattr(self.cluster, name + way)
                if link is None:
                    where = "inside a host" if name == "near" else "between hosts"
                    flag = "--nvlink" if name == "near" else "--link"
                    raise ValueError(
                        f"grain_ddp: {self.ranks} GPUs need a link {where}, but none was measured. "
                        f"Give its speed with {flag}, or bench on more ranks."
                    )
                latency += count * link.latency
                busiest = max(busiest, load / link.bandwidth)
        return latency + busiest

    def ring(self, p: int, size: float) -> Traffic:
        """Half an all-reduce of that many bytes, among each p consecutive ranks."""
        if p == 1:
            return Traffic()
        steps = math.log2(p) if self.cluster.gpu else p - 1
        sent = (p - 1) / p * size
        if p <= self.here:
            return Traffic(self._time((steps, 0), sent, 0, "_reduce"), sent)
        # A step lasts as long as its slowest message. With several ranks per host, as many bytes
        # go along the links inside.
        time = self._time((0, steps), 0, sent, "_reduce")
        if self.here > 1 and self.cluster.near_reduce is not None:
            time = max(time, sent / self.cluster.near_reduce.bandwidth)
        return Traffic(time, sent, sent)

    def exchange(self, p: int, stride: int, each: float) -> Traffic:
        """`each` bytes from every rank to each of the p − 1 others, who are `stride` apart."""
        pieces, here = self._pieces(p, each), self._near(p, stride)
        near, far = here - 1, p - here
        out = self.here * far * each
        time = self._time((pieces * near, pieces * far), near * each, out, "")
        return Traffic(time, (p - 1) * each, out)

    def gather(self, p: int, stride: int, each: float) -> Traffic:
        """As `TorchWire.gather`: to all of them the same `each` bytes."""
        here, piece = self._near(p, stride), each / self._pieces(p, each)
        if self.cluster.gpu or p in (2, here) or piece < torch_wire.RING_BYTES:
            return self.exchange(p, stride, each)
        sent = (p - 1) * each
        out = sent * self.here / here  # as many rings as a host's ranks have positions
        hops = self._pieces(p, each) * (p - 1)
        return Traffic(self._time((0, hops), 0, out, ""), sent, out)

    def _pieces(self, p: int, each: float) -> int:
        message = SCRATCH_BYTES // p if self.cluster.gpu else MESSAGE_BYTES
        return max(math.ceil(each / message), 1)

    def _near(self, p: int, stride: int) -> int:
        """How many of p ranks, `stride` apart, are on one host."""
        return min(max(self.here // stride, 1), p)

    def sum(self, numbers: int) -> Traffic:
        """As `TorchWire.sum`, of a Gramian's numbers in fp64 and its marks, over all ranks."""
        numbers += MARKS
        if self.ranks <= wire._GATHER_LIMIT:
            return self.exchange(self.ranks, 1, 8 * numbers)
        return self.ring(self.ranks, 8 * numbers) * 2
