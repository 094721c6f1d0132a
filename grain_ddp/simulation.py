"""The transpose-reduce of n ranks in one process: for studies, and as the readable twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grain_ddp._core import transposed
from grain_ddp._core.agreement import record_of, weights_of
from grain_ddp._core.narrow import decode, encoded
from grain_ddp._core.options import Options
from grain_ddp._core.state import GrainState
from grain_ddp._core.views import cut
from grain_ddp._math.gramian import gramian, weighted_sum
from grain_ddp._math.record import StepRecord


def simulate(
    gradients: Sequence[Sequence[Tensor]], state: GrainState
) -> tuple[list[Tensor], StepRecord]:
    """One step of n groups in one process: the aggregate of each bucket, and the record.

    ``gradients[i][b]`` is group i's flat gradient in bucket b. The same arithmetic in the same
    order as on n ranks with CPUs: equal but for last bits, which in a matrix product may depend on
    where its rows lie in memory. `groups`, `microbatches`, `warmup_steps` and `record_every` are
    not looked at. Advances the state.
    """
    n, options, single = len(gradients), state.options, state.options.scope == "global"
    buckets = list(zip(*gradients, strict=True))
    # Which part of a bucket each rank receives, and what arrives there.
    parts = [cut(len(b[0]), n, -(-transposed.MESSAGE_BYTES // b[0].itemsize)) for b in buckets]
    arrived = [
        [
            [_travel(torch.stack([g[slot] for g in b]), options) for slot in slots]
            for slots in pieces
        ]
        for b, pieces in zip(buckets, parts, strict=True)
    ]
    summed = torch.zeros(len(buckets), n, n, n, dtype=torch.float64)  # [bucket, rank, n, n]
    for by_rank, received in zip(summed, arrived, strict=True):
        for matrices in received:
            for rank, matrix in enumerate(matrices):
                by_rank[rank] += gramian(matrix)
    if single:
        summed = summed.sum(0, keepdim=True)
    weights = [weights_of(options, state.step, total) for total in summed.sum(1)]
    weights *= len(buckets) if single else 1

    results = []
    for found, bucket, pieces, received in zip(weights, buckets, parts, arrived, strict=True):
        result = torch.empty_like(bucket[0])
        factors = found.factors_for(bucket[0])
        for slots, matrices in zip(pieces, received, strict=True):
            for slot, matrix in zip(slots, matrices, strict=True):
                matrix[list(found.dropped)] = 0
                weighted_sum(matrix, factors, out=result[slot])
                result[slot] = _travel(result[slot][None], options)[0]
        results.append(result)
    record = record_of(state, weights)
    state.advance(record)
    return results, record


def _travel(rows: Tensor, options: Options) -> Tensor:
    """What arrives of rows [n, c]: of a narrower dtype on the wire, rounded."""
    narrow = options.narrow(rows.dtype)
    if narrow:
        for row in rows:
            decode(encoded(row, narrow), row)
    return rows
