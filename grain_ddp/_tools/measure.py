"""Links, memory and solver of these machines: what `grain-ddp plan` needs to know."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from grain_ddp._math.gramian import gramian, weighted_sum
from grain_ddp._math.weighting import weigh
from grain_ddp._tools.network import Cluster, Link
from grain_ddp._tools.trial import clock
from grain_ddp._wire.torch_wire import TorchWire


def hosts() -> list[list[int]]:
    """The ranks of each host, in order."""
    mine = socket.gethostname(), os.environ.get("GROUP_RANK")  # torchrun's name for a host
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return [[r for r, host in enumerate(every) if host == one] for one in dict.fromkeys(every)]


def measure_cluster(device: torch.device) -> Cluster:
    """Links, memory and solver, all ranks at work at the same time as they are in training.

    ValueError if the hosts have different numbers of ranks.
    """
    ranks, places = dist.get_rank(), hosts()
    size = len(places[0])
    if any(len(place) != size for place in places):
        raise ValueError(
            f"grain_ddp: expected as many ranks on every host, but found {[*map(len, places)]}."
        )
    links: dict[str, Link | None] = {}
    across = [[place[i] for place in places] for i in range(size)]
    for name, teams in (("near", places), ("far", across)):
        links[name] = links[f"{name}_reduce"] = None
        if len(teams[0]) < 2:
            continue
        every = [dist.new_group(team) for team in teams]  # all ranks make all groups
        mine = next(g for g, team in zip(every, teams, strict=True) if ranks in team)
        share = 1 if name == "near" else size  # of one link between hosts
        wire = TorchWire(mine)
        wire.meet({})
        links[name] = _exchange_link(wire, device, share)
        links[f"{name}_reduce"] = _reduce_link(wire, device, share)
    gpu = device.type == "cuda"
    rows, columns = dist.get_world_size(), (1 << (26 if gpu else 21))
    matrix = torch.randn(rows, columns // rows, device=device)
    out = torch.empty_like(matrix[0])
    weights = torch.full((rows,), 1 / rows, device=device)
    twin = torch.empty_like(matrix)
    tall = torch.randn(256, columns // 256, device=device)

    def speed(function: Callable[[], object], amount: float) -> float:
        return amount / _median(lambda: clock(function, device, 5))

    flops = 2 * 256 * tall.numel()
    return Cluster(
        size,
        **links,
        gramian=speed(lambda: gramian(matrix), matrix.nbytes),
        weighted_sum=speed(lambda: weighted_sum(matrix, weights, out), matrix.nbytes),
        copy=speed(lambda: twin.copy_(matrix), matrix.nbytes),
        flops=speed(lambda: gramian(tall), flops),
        gpu=gpu,
        capacity=torch.cuda.get_device_properties(device).total_memory if gpu else None,
        solver=tuple(_solver(device)),
    )


def _median(measure: Callable[[], float], times: int = 5) -> float:
    """Of some calls after a first, and over the ranks: the same on all of them."""
    measure()
    found = float(np.median([measure() for _ in range(times)]))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return float(np.median(every))


def _volume(device: torch.device) -> int:
    """Numbers of fp32 that a rank sends to measure bandwidth."""
    return 1 << (26 if device.type == "cuda" else 22)


def _exchange_link(wire: TorchWire, device: torch.device, share: int) -> Link:
    """Of messages between pairs: t = (n−1)·(α + s/β)."""
    others, pieces = wire.size - 1, 4  # some are under way while others are worked on

    def exchange(length: int, count: int) -> float:
        buffers = [
            [torch.ones(wire.size, length, device=device).unbind() for _ in range(2)]
            for _ in range(count)
        ]

        def call() -> None:
            for transfer in [wire.exchange(send, receive) for send, receive in buffers]:
                transfer.wait()

        return _median(lambda: clock(call, device, 20 if length == 16 else 1))

    length = _volume(device) // others // pieces
    tiny, large = exchange(16, 1), exchange(length, pieces)
    return Link(tiny / others, share * 4 * length * others * pieces / max(large - tiny, large / 2))


def _reduce_link(wire: TorchWire, device: torch.device, share: int) -> Link:
    """Of the backend's all-reduce: t = 2(n−1)·α + 2(n−1)/n · D/β, or 2 log₂ n · α on GPUs."""
    n = wire.size

    def reduce(length: int) -> float:
        values = torch.ones(length, device=device)
        call = lambda: wire.all_reduce(values).wait()  # noqa: E731
        return _median(lambda: clock(call, device, 20 if length == 16 else 1))

    tiny, large = reduce(16), reduce(_volume(device))
    steps = 2 * (math.log2(n) if device.type == "cuda" else n - 1)
    sent = 2 * (n - 1) / n * 4 * _volume(device)
    return Link(tiny / steps, share * sent / max(large - tiny, large / 2))


def _solver(device: torch.device) -> Iterator[tuple[int, float]]:
    """Seconds for gradients around a common mean, as in docs/benchmarks/solver.md."""
    generator = np.random.default_rng(0)
    for n in (2, 8, 64, 256):
        rows = 0.3 * generator.normal(size=(n, 2 * n)) + generator.normal(size=2 * n)
        matrix = rows @ rows.T
        solve = lambda matrix=matrix: weigh(matrix, "min_norm")  # noqa: E731
        yield n, _median(lambda solve=solve: clock(solve, device, 3), 3)  # type: ignore[misc]
