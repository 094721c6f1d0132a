"""The weights of up to 64 groups, on the GPU: one Triton program, and nothing waits for it.

The method is that of `qp.py`, which says why; here vectors and matrices are padded to a power
of two, and a subset of the coordinates is a mask.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 64
"""Groups; beyond it a matrix does not fit into the registers of one program."""

_EPS = tl.constexpr(2.0**-52)
_TINY = tl.constexpr(2.0**-1022)


def weights_on_device(gramian: Tensor, rule: str, cap: float | None, drop: bool) -> Tensor:
    """What `grain_ddp.weighting.weigh` makes of a float64 Gramian ``[n, n]``, n <= 64.

    ``rule`` is one of "min_norm", "mean" and "inverse_norm"; ``drop`` leaves out groups that are
    not finite. Returns, on the device, float64 ``[3n + 1]``: the weights; the factors for gradients
    of up to fp32; those for fp64; 1 where the weights meet the optimality conditions to rounding.
    """
    n = len(gramian)
    result = gramian.new_empty(3 * n + 1)
    limit = gramian.new_full((1,), float("inf") if cap is None else cap)
    size = max(triton.next_power_of_2(n), 4)
    with torch.cuda.device_of(gramian):
        launch: Any = _weigh[(1,)]
        launch(
            gramian.contiguous(),
            limit,
            result,
            n,
            rule,
            drop,
            size,
            num_warps=4 if n <= 16 else size // 4,
        )
    return result


@triton.jit
def _weigh(gramian, limit, result, n, RULE: tl.constexpr, DROP: tl.constexpr, N: tl.constexpr):
    k = tl.arange(0, N)
    i, j = k[:, None], k[None, :]
    G = tl.load(gramian + i * n + j, mask=(i < n) & (j < n), other=0.0)
    squares = tl.sum(tl.where(i == j, G, 0.0), 0)
    there = k < n
    finite = there & (tl.abs(squares) < float("inf"))
    found = tl.sum(finite.to(tl.int32))
    propagate = found < n
    if DROP:
        propagate = found == 0
    counted = finite
    if RULE != "mean":
        counted = finite & (squares > 0)
    m = tl.sum(counted.to(tl.int32))

    w = tl.zeros([N], tl.float64)
    exact = tl.full((), 1.0, tl.float64)
    if propagate:
        w = there.to(tl.float64) / n
    elif m > 0:
        G = tl.where(counted[:, None] & counted[None, :], G, 0.0)
        if RULE == "mean":
            w = counted.to(tl.float64) / m
        elif RULE == "inverse_norm":
            least = tl.min(tl.where(counted, squares, float("inf")))
            w = tl.where(counted, least / tl.where(counted, squares, 1.0), 0.0)
            w /= tl.sum(w)
        else:
            w, exact = _min_norm(G, squares, tl.load(limit) / m, counted, m, n, i, j, k, N)

    tl.store(result + k, w, mask=there)
    # See Weights.factors: where the aggregate is zero to rounding, it is zero.
    square = tl.sum(w * tl.sum(w[:, None] * G, 0))
    terms = tl.sum(w * tl.sqrt(tl.where(counted, squares, 0.0)))
    for wide in tl.static_range(2):
        rounding = 4 * _EPS * m if wide else 2.0**-42
        zero = (square <= rounding * terms * terms) & (propagate == 0)
        factors = w if RULE == "mean" else tl.where(zero, 0.0, w)
        tl.store(result + (1 + wide) * n + k, factors, mask=there)
    tl.store(result + 3 * n, exact)


@triton.jit
def _min_norm(G, squares, bound, counted, m, n, i, j, k, N: tl.constexpr):
    """Weights [N], and whether they are exact; `bound` is the largest weight, inf for no bound."""
    squares = tl.where(counted, squares, 0.0)
    tiny = tl.maximum(_TINY, 1e-200 * tl.max(squares))
    r = tl.where(counted, tl.sqrt(tl.maximum(squares, tiny)), 1.0)
    C = G / (r[:, None] * r[None, :])
    u = tl.where(counted, tl.min(tl.where(counted, r, float("inf"))) / r, 1.0)
    capped = bound < 1
    top = tl.where(capped, bound, 2.0) / u  # without a cap one that is never reached
    limit = tl.where(capped, top * (1 + 4 * _EPS), float("inf"))
    exact = tl.full((), 1, tl.int32)
    z = top
    if bound * m > 1 + 4 * _EPS:
        zero = tl.zeros([N], tl.float64)
        z, exact = _pivot(C, u, top, limit, zero, zero, counted, m, n, i, j, k, N)
        if exact == 0:
            inner, state = _interior(C, u, top, capped, counted, m, n, i, j, N)
            z, exact = _pivot(C, u, top, limit, inner, state, counted, m, n, i, j, k, N)
            if exact == 0:  # C is not quite semi-definite: the best of what was found
                gap, other = (_gap(C, u, z, capped, counted), _gap(C, u, inner, capped, counted))
                z = tl.where(gap < other, z, inner)
    w = tl.where(counted, tl.minimum(tl.maximum(u * z, 0.0), bound), 0.0)
    w /= tl.sum(w)

    diagonal = tl.sum(tl.where(i == j, C, 0.0), 0)
    if tl.sum((diagonal[None, :] == C).to(tl.int32) * counted[:, None] * counted[None, :]) > m:
        # Equal rows share their weight evenly.
        same = (counted[:, None] & counted[None, :]).to(tl.int32)
        for row in range(n):
            values = tl.sum(tl.where(i == row, G, 0.0), 0)
            same = tl.where(values[:, None] == values[None, :], same, 0)
        w = tl.sum(same * w[:, None], 0) / tl.maximum(tl.sum(same, 0), 1)
        w /= tl.sum(w)
    return w, exact.to(tl.float64)


@triton.jit
def _gap(C, u, z, capped, counted):
    """`Problem.gap` of qp.py; with a cap inf, as it takes sorting."""
    z = tl.where(counted, z, 0.0)
    slope = tl.sum(C * z[:, None], 0)
    gap = tl.sum(z * slope) - tl.min(tl.where(counted, slope / u, float("inf")))
    wrong = capped | (tl.min(z) < 0) | (tl.abs(tl.sum(u * z) - 1) > 1e-12)
    return tl.where(wrong, float("inf"), gap)


@triton.jit
def _factor(K, n, i, j):
    """K = LDLᵀ in place, from its upper triangle: D on the diagonal, L⁻¹ below it, without ones."""
    for step in range(n):
        row = tl.sum(tl.where(i == step, K, 0.0), 0)
        pivot = tl.sum(tl.where(i == step, row[:, None], 0.0))
        below = row[:, None] / pivot
        less = below * tl.where(j == step, 1.0, row[None, :])
        K = tl.where(i > step, tl.where(j == step, 0.0, K) - less, K)
    return K


@triton.jit
def _face(C, u, free, n, i, j):
    """The problem on the free coordinates, factored, as `Face` of qp.py: F, v, scale."""
    scale = tl.max(tl.where(free, u, 0.0))
    v = tl.where(free, u / scale, 0.0)
    K = tl.where(free[:, None] & free[None, :], C + v[:, None] * v[None, :], 0.0)
    count = tl.sum(free.to(tl.float64))
    shift = 4 * _EPS * count
    F = K
    again = count > 0
    while again:
        F = _factor(K + tl.where(i == j, tl.where(free, shift, 1.0)[None, :], 0.0), n, i, j)
        wrong = tl.sum(tl.where((i == j) & ~(F > 0), 1, 0))
        again = (wrong > 0) & (shift < count)
        shift *= 1e3
    return F, v, scale


@triton.jit
def _inverse(F, b, i, j):
    """K⁻¹b of a factored K."""
    lower = tl.where(i > j, F, 0.0)
    D = tl.sum(tl.where(i == j, F, 0.0), 1)
    y = (tl.sum(lower * b[None, :], 1) + b) / tl.where(D == 0, 1.0, D)  # zero: padding
    return tl.sum(lower * y[:, None], 0) + y


@triton.jit
def _step(F, v, scale, total, h, i, j):
    """The z minimising ½ zᵀCz + hᵀz where uᵀz = total, and the λ of Cz + h = λu."""
    a, b = _inverse(F, v, i, j), _inverse(F, h, i, j)
    total /= scale
    t = (total + tl.sum(v * b)) / tl.sum(v * a)
    return a * t - b, (t - total) / scale


@triton.jit
def _pivot(C, u, top, limit, start, state, counted, m, n, i, j, k, N: tl.constexpr):
    """Block principal pivoting: z, and whether it meets the optimality conditions."""
    fewest = m + 1
    failures = 0
    refined = 0
    exact = 0
    stale = 1
    part = tl.full((), 1.0, tl.float64)
    z = start
    F, v, scale = C, u, tl.max(u)
    going = m > 0
    while going:
        free = counted & (state == 0)
        z = tl.where(free, start, tl.where(counted & (state > 0), top, 0.0))
        slope = tl.sum(C * z[:, None], 0)
        if tl.sum(free.to(tl.int32)) == 0:
            # Only the next coordinate to move can tell the multiplier.
            full = tl.where(tl.sum(tl.where(counted, u * z, 0.0)) > 1 - 1e-12, 1.0, -1.0)
            able = tl.where(counted & (state == full), full * slope / u, float("-inf"))
            free = k == tl.argmax(able, 0)
            state = tl.where(free, 0.0, state)
            z = tl.where(free, 0.0, z)
            slope = tl.sum(C * z[:, None], 0)
        if stale > 0:
            F, v, scale = _face(C, u, free, n, i, j)
        total = 1 - tl.sum(tl.where(counted, u * z, 0.0))
        dz, multiplier = _step(F, v, scale, total, tl.where(free, slope, 0.0), i, j)
        z = tl.where(free, z + dz, z)
        y = tl.sum(C * z[:, None], 0) - multiplier * u
        rounding = 8 * _EPS * tl.sum(tl.abs(z))
        wrong = tl.where(free, tl.maximum(-z, z - limit), state * y - rounding)
        wrong = tl.where(counted, wrong, 0.0)
        bad = wrong > 0
        many = tl.sum(bad.to(tl.int32))
        if many > 0:
            failures = tl.where(many < fewest, 0, failures + 1)
            part = tl.where(many < fewest, 1.0, part * 0.7)
            most = tl.maximum((many * part).to(tl.int32), 1)
            worse = (wrong[:, None] > wrong[None, :]) | (
                (wrong[:, None] == wrong[None, :]) & (i > j)
            )
            bad = bad & (tl.sum(worse.to(tl.int32), 0) < most)
            fewest = tl.minimum(many, fewest)
            state = tl.where(bad, tl.where(free, tl.where(z < 0, -1.0, 1.0), 0.0), state)
            going = failures < 8
            refined = 0
            stale = 1
        else:
            level = tl.max(tl.where(free, tl.abs(y), 0.0)) <= rounding
            exact = level.to(tl.int32)
            going = (exact == 0) & (refined < 3)
            refined += 1
            start = z
            stale = 0
    return z, exact


@triton.jit
def _interior(C, u, top, capped, counted, m, n, i, j, N: tl.constexpr):
    """Mehrotra's interior point method: a z near the optimum, and where each z_i will be."""
    one = tl.full([N], 1.0, tl.float64)
    zero = tl.zeros([N], tl.float64)
    z = one / tl.sum(tl.where(counted, u, 0.0))
    if capped:
        z = top / tl.sum(tl.where(counted, u * top, 0.0))
    s = top - z
    y = tl.sum(C * tl.where(counted, z, 0.0)[None, :], 1)
    size = tl.sum(tl.where(counted, z, 0.0))
    mu = tl.maximum(tl.sum(tl.where(counted, z * y, 0.0)), size * size * _EPS) / m
    p, q = mu / z, mu / s
    state = zero
    count = 0
    going = m > 0
    while going:
        count += 1
        barrier = tl.where(counted, p / z + q / s, 0.0)
        F, v, scale = _face(C + tl.where(i == j, barrier[None, :], 0.0), u, counted, n, i, j)
        short = 1 - tl.sum(tl.where(counted, u * z, 0.0))
        total = tl.sum(tl.where(counted, z * p + s * q, 0.0))
        # The first step aims at zp = sq = 0, the second at mu.
        c, e = zero, zero
        dz, dp, dq, step = zero, zero, zero, total
        for corrected in tl.static_range(2):
            h = tl.where(counted, y - c / z + e / s, 0.0)
            dz, _ = _step(F, v, scale, short, h, i, j)
            dp = (c - p * dz) / z - p
            dq = (e + q * dz) / s - q
            speed = tl.maximum(tl.maximum(-dz / z, -dp / p), tl.maximum(dz / s, -dq / q))
            fastest = tl.maximum(tl.max(tl.where(counted, speed, 0.0)), _EPS)
            step = tl.minimum((0.995 if corrected else 1.0) / fastest, 1.0)
            if corrected == 0:
                left = (z + step * dz) * (p + step * dp) + (s - step * dz) * (q + step * dq)
                ratio = tl.sum(tl.where(counted, left, 0.0)) / total
                mu = ratio * ratio * ratio * total / (2 * m)
                c, e = mu - dz * dp, mu + dz * dq
        sound = tl.sum(tl.where(counted, tl.abs(dz) + tl.abs(dp) + tl.abs(dq), 0.0)) < float("inf")
        # Tapia's indicators: what goes to its bound shrinks, its multiplier stays.
        above = tl.where(-dz / s < dq / q, tl.where(capped, one, zero), zero)
        state = tl.where(sound, above - tl.where(dz / z < dp / p, one, zero), state)
        z = tl.where(sound, z + step * dz, z)
        s = tl.where(sound, s - step * dz, s)
        p = tl.where(sound, p + step * dp, p)
        q = tl.where(sound, q + step * dq, q)
        # Along this axis: along the other one Triton 3.7 fails to compile.
        y = tl.sum(C * tl.where(counted, z, 0.0)[None, :], 1)
        size = tl.sum(tl.where(counted, z, 0.0))
        going = sound & (total > size * size * _EPS) & (step >= 1e-6) & (count < 50)
    return z, state
