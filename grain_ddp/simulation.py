"""The transpose-reduce of n ranks in one process: for studies, and as the readable twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grain_ddp._core import aggregation
from grain_ddp._core.aggregation import narrow_dtype, record_of, weights_of
from grain_ddp._core.state import GrainState
from grain_ddp._math.gramian import gramian, weighted_sum
from grain_ddp._math.record import StepRecord
from grain_ddp._wire.wire import cut


def simulate(
    gradients: Sequence[Sequence[Tensor]], state: GrainState
) -> tuple[list[Tensor], StepRecord]:
    """One step of n groups in one process: the aggregate of each bucket, and the record.

    ``gradients[i][b]`` is group i's flat gradient in bucket b. The same arithmetic in the same
    order as on n ranks with CPUs: equal but for last bits, which in a matrix product may depend on
    where its rows lie in memory. `groups`, `microbatches`, `warmup_steps` and `record_every` are
    not looked at. Advances the state.
    """
    n = len(gradients)
    rows, columns = torch.triu_indices(n, n)
    buckets = list(zip(*gradients, strict=True))
    # What travels, and which part of it each rank receives.
    sent = [[g.to(narrow_dtype(state, g) or g.dtype) for g in bucket] for bucket in buckets]
    parts = [cut(len(b[0]), n, -(-aggregation.MESSAGE_BYTES // b[0].itemsize)) for b in buckets]

    shares = torch.zeros(len(buckets), n, n, n, dtype=torch.float64)  # [bucket, rank, n, n]
    for share, bucket, pieces in zip(shares, sent, parts, strict=True):
        for slots in pieces:
            for rank, slot in enumerate(slots):
                share[rank] += gramian(torch.stack([g[slot] for g in bucket]))
    if state.scope == "global":
        shares = shares.sum(0, keepdim=True)
    totals = shares.sum(1)[:, rows, columns]
    weights = [weights_of(state, total, n) for total in totals] * (
        len(buckets) if state.scope == "global" else 1
    )

    results = []
    for found, originals, sources, pieces in zip(weights, buckets, sent, parts, strict=True):
        result = torch.empty_like(sources[0])
        factors = found.factors_for(originals[0])
        for slots in pieces:
            for slot in slots:
                matrix = torch.stack([g[slot] for g in sources])
                matrix[list(found.dropped)] = 0
                weighted_sum(matrix, factors, out=result[slot])
        results.append(result.to(originals[0].dtype))
    record = record_of(state, weights)
    state.advance(record)
    return results, record
