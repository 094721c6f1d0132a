"""What a step costs on a cluster that need not be there yet: time, bytes and memory.

The α-β model (Hockney 1994; Thakur, Rabenseifner and Gropp 2005): a message of s bytes takes
α + s/β, latency and bandwidth. n ranks, k on each host, D bytes of gradient in B buckets, groups of
g ranks, G = n/g of them. A host sends to other hosts over one link, the sum of its interfaces.

* A ring's reduce-scatter or all-gather of D bytes: n − 1 steps, (n−1)/n · D sent by each rank, and
  as much by each host, since a ring leaves a host once. All-reduce is both. NCCL's trees (Sanders,
  Speck and Träff 2009) need log₂ n steps at about the same bytes: on GPUs that is counted.
* An exchange of D bytes among G ranks: (G−1)/G · D sent by each, one message and its α for every
  other rank. Messages overlap, so this α is the gap between two (LogP, Culler et al. 1993). All k
  ranks of a host send across its link, each to the G − k/g partners elsewhere. The way back is the
  same, but on CPUs of several hosts, for large parts, a ring.
* Gramian: G(G+1)/2 numbers in fp64, gathered by up to 32 ranks, all-reduced beyond.
* Passes: the rows, D/g bytes, are read once for the Gramian (2·G flops for each number) and once
  for the weighted sum. The solver's time is measured up to n = 1024, and grows with n³ beyond.

With a sketch only k numbers are exchanged, in bf16, and the gradients move as plain ones: as soon
as a bucket has its weights, or, in global scope, after the last bucket.

With groups of g ranks: a reduce-scatter inside, the exchange of D/g across, and both ways back. A
sharded optimizer (ZeRO 1 to 3, FSDP) leaves out the ways back, and gathers parameters by whatever
rule: at stages 1 and 2 after the step, at stage 3 and in FSDP for each pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from grain_ddp._core.sketched import WATCHING
from grain_ddp._core.transposed import SCRATCH_BYTES
from grain_ddp._tools.network import Cluster, Network, Traffic
from grain_ddp._wire import wire

BACKWARD = 2 / 3
"""The share of a step's computing that is the backward pass, where communication overlaps."""

SCOPES = ("global", "bucket")

SHARDED = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
"""Integrations, and of what each rank keeps its part only: the optimizer's states (1), gradients
too (2), parameters too (3)."""


@dataclass(frozen=True)
class Job:
    """What is trained, and by which integration: a key of `SHARDED`."""

    parameters: int
    itemsize: int  # bytes of a gradient's number
    buckets: int
    compute: float  # seconds of a step without communication
    kind: str = "ddp"

    @property
    def size(self) -> float:
        """Bytes of gradient."""
        return self.parameters * self.itemsize

    @property
    def sharded(self) -> int:
        """What a rank keeps its part only of."""
        return SHARDED[self.kind]

    def states(self, ranks: int) -> float:
        """Bytes of a rank's parameters, gradients and states of Adam, without activations.

        16 for each parameter in fp32 (4 + 4 + 8) and in mixed precision (2 + 2 + 12), by
        Rajbhandari et al. 2020 (arXiv 1910.02054, section 3).
        """
        whole = (16 - 2 * self.itemsize, self.itemsize, self.itemsize)  # states, gradients, weights
        parts = (each / ranks if k < self.sharded else each for k, each in enumerate(whole))
        return self.parameters * sum(parts)


@dataclass(frozen=True)
class Choice:
    """Options of `GrainState`: scope, ranks in a group, bytes of a number on the wire, sketch."""

    scope: str
    group: int = 1
    itemsize: int | None = None  # None: the gradient's own
    sketch: int | None = None

    def name(self, per_host: int) -> str:
        groups = {1: "rank", per_host: "node"} if per_host > 1 else {1: "rank"}
        found = f"{self.scope}, {groups.get(self.group, str(self.group))}"
        return found + (", bf16" if self.itemsize else "") + (", sketch" if self.sketch else "")


@dataclass(frozen=True)
class Cost:
    """Of a step: seconds, bytes that a rank sends for gradients, bytes that leave a host for them,
    bytes of memory beyond plain DDP's, and seconds in the solver (part of the step's)."""

    seconds: float
    sent: float
    out: float
    memory: float = 0.0
    solve: float = 0.0


def _overlapped(compute: float, buckets: int, each: float) -> float:
    """Seconds until all is sent, if a bucket is ready after each B-th of the computing.

    The last bucket follows the computing, or the first is followed by all the others.
    """
    return max(compute + each, compute / buckets + buckets * each)


def cost(cluster: Cluster, job: Job, ranks: int, choice: Choice | None = None) -> Cost:
    """Of a step of plain averaging (choice None), or of GRAIN.

    Raises:
        ValueError: the ranks do not fill hosts or groups, or the cluster lacks a link.
    """
    network = Network(cluster, ranks)
    buckets = job.buckets
    gather = network.ring(ranks, job.size / buckets)  # a bucket's parameters, or gradients
    forward, backward = (1 - BACKWARD) * job.compute, BACKWARD * job.compute
    # Parameters are gathered by whatever rule.
    parameters = 0.0
    if job.sharded == 3:
        parameters = gather.seconds
        forward = _overlapped(forward, buckets, parameters)
    elif job.sharded:
        forward += network.ring(ranks, job.size).seconds
    if choice is None:
        half = gather * (1 if job.sharded else 2)
        time = forward + _overlapped(backward, buckets, half.seconds + parameters)
        return Cost(time, buckets * half.sent, buckets * half.out)

    g, rows = choice.group, ranks // choice.group
    if ranks % g or rows < 2:
        raise ValueError(f"grain_ddp: {ranks} GPUs do not make two or more groups of {g}.")
    if choice.sketch is not None:
        return _sketched(cluster, job, network, choice, forward, parameters)
    wide = job.size / g  # bytes of rows, over the step
    narrow = min((choice.itemsize or job.itemsize) / job.itemsize, 1)
    bucket = job.size * narrow / buckets
    inside = network.ring(g, bucket)
    there = inside + network.exchange(rows, g, bucket / g / rows)
    back = Traffic() if job.sharded else inside + network.gather(rows, g, bucket / g / rows)
    numbers = rows * (rows + 1) // 2
    total = network.sum(numbers)
    solve = cluster.solve(rows)
    first = max(wide / cluster.gramian, 2 * rows * wide / job.itemsize / cluster.flops)
    second = wide / cluster.weighted_sum
    if narrow < 1:  # to the wire's dtype and back, and the rows to fp32 for either pass
        first += (job.size + wide) / cluster.copy
        second += ((0 if job.sharded else job.size) + wide) / cluster.copy
    times = 1 if choice.scope == "global" else buckets
    if choice.scope == "global":
        time = _overlapped(backward + first, buckets, there.seconds + parameters)
        time += total.seconds + solve + max(second, buckets * back.seconds)
    else:
        each = there.seconds + total.seconds + solve + back.seconds + parameters
        busy = backward + first + second + (buckets * solve if cluster.waits(rows) else 0)
        time = _overlapped(busy, buckets, each)
    moved = (there + back) * buckets + total * times
    # Scratch for rows that arrive; a Gramian for each bucket, in global scope stacked to be summed;
    # triangles, as many as are gathered.
    held = job.size if choice.scope == "global" else bucket
    scratch = min(SCRATCH_BYTES, held if job.sharded else 2 * bucket)
    if job.sharded:
        scratch += 2 * min(bucket, SCRATCH_BYTES)
    gathered = ranks if ranks <= wire._GATHER_LIMIT else 1
    stacked = 2 if choice.scope == "global" else 1
    memory = scratch + 8 * (stacked * buckets * rows * rows + times * gathered * numbers)
    if choice.scope == "global" and job.sharded >= 2:
        memory += job.size * (1 - 1 / ranks)  # gradients that would have been given away
    return Cost(forward + time, moved.sent, moved.out, memory, times * solve)


def _sketched(
    cluster: Cluster, job: Job, network: Network, choice: Choice, forward: float, parameters: float
) -> Cost:
    """Of a step in which a sketch is exchanged, and the gradients are summed as plain ones.

    `forward`: seconds until the backward pass; `parameters`: of a bucket's, gathered during it.
    """
    buckets, ranks, backward = job.buckets, network.ranks, BACKWARD * job.compute
    g, rows = choice.group, network.ranks // choice.group
    single = choice.scope == "global"
    most = job.parameters if single else job.parameters / buckets
    k = min(choice.sketch or 0, most)
    size = k * (2 if k < most else 4)  # in bf16, unless nothing is lost
    there = network.ring(g, size) + network.exchange(rows, g, size / g / rows)
    numbers = rows * (rows + 1) // 2 + (rows if g == 1 else 0)
    total, solve = network.sum(numbers), cluster.solve(rows)
    half = network.ring(ranks, job.size / buckets) * (1 if job.sharded else 2)
    first = job.size / cluster.gramian  # read once, into the sums
    second = job.size / cluster.copy  # weighed
    each = there.seconds + total.seconds + solve
    if single:
        time = _overlapped(backward + first, buckets, parameters) + each
        time += second / buckets + buckets * half.seconds  # the first is weighed, then all move
    else:
        each += half.seconds + parameters
        busy = backward + first + second + (buckets * solve if cluster.waits(rows) else 0)
        time = _overlapped(busy, buckets, each)
    times = 1 if single else buckets
    moved = half * buckets + (there + total) * times
    gathered = ranks if ranks <= wire._GATHER_LIMIT else 1
    flying = min(times, 3)  # of a bucket that is summed, one that arrives and one that is sent
    memory = flying * (4 * k + 2 * size) + 8 * times * (gathered * numbers + rows * rows)
    if single and job.sharded >= 2:
        memory += job.size * (1 - 1 / ranks)
    return Cost(forward + time, moved.sent, moved.out, memory, times * solve)


def overhead(cluster: Cluster, job: Job, ranks: int, choice: Choice) -> float:
    """How much longer than plain averaging a step takes: 0.05 is five percent."""
    return cost(cluster, job, ranks, choice).seconds / cost(cluster, job, ranks).seconds - 1


def watching(cluster: Cluster, job: Job, ranks: int) -> float:
    """How much longer a step takes that is recorded, and averages: a sketch of it is exchanged."""
    network, k = Network(cluster, ranks), min(WATCHING, job.parameters)
    seconds = network.exchange(ranks, 1, 2 * k / ranks).seconds
    seconds += network.sum(ranks * (ranks + 1) // 2 + ranks).seconds + job.size / cluster.gramian
    return seconds / cost(cluster, job, ranks).seconds
