"""Rules beside min-norm, from the same float64 Gramian ``[n, n]`` of groups that are not zero.

Like the solver they work in unit rows, C_ij = G_ij / (r_i r_j) with r_i = ‖g_i‖, so nothing depends
on the scale of G, and rows may differ by 1e60.
"""

from __future__ import annotations

import numpy as np

from grain_ddp._math.qp import EPS, Indices
from grain_ddp._math.record import Array
from grain_ddp._math.solver import Solution, min_norm


def upgrad(gramian: Array) -> Array:
    """Weights ``[n]`` of UPGrad: every row projected so that it opposes none, then their mean.

    Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232): row i
    goes to the nearest point of the dual cone {x: ⟨x, g_j⟩ >= 0 for all j}, which is g_i + Jᵀz for
    the z >= 0 of least ‖g_i + Jᵀz‖. The mean of such points opposes no group either. Weights are
    at least 1/n, exactly 1/n where no two groups conflict, and add up to more than 1 otherwise.
    """
    n = len(gramian)
    C, r = unit_rows(gramian)
    if C.min() >= 0:
        return np.full(n, 1 / n)
    # Rounding may leave C indefinite, the Gramian of no rows at all: the least shift repairs that.
    C += max(0.0, -float(np.linalg.eigvalsh(C)[0])) * np.eye(n)
    conflicting = np.flatnonzero((C < 0).any(1))
    # Each of its rows is a problem with its own matrix: few enough at once for the cache.
    parts = np.array_split(conflicting, -(-len(conflicting) * n * n // 2**18))
    z = np.concatenate([_to_dual_cone(C, part) for part in parts])
    with np.errstate(under="ignore"):
        weights: Array = (1 + (r[conflicting] @ z) / r) / n
    return weights


def _to_dual_cone(C: Array, rows: Indices) -> Array:
    """For each of the rows i the z >= 0 minimising ½ zᵀCz + c_iᵀz, ``[len(rows), n]``.

    Block principal pivoting (Portugal, Júdice and Vicente 1994): solve for the free coordinates,
    swap all that are on the wrong side; where that has not helped three times, only the last of
    them (Murty 1974), which cannot cycle. The shift makes every subset of a singular C solvable.
    """
    n, c = len(C), C[rows]
    K = C + n * 1e-13 * np.eye(n)
    unit = np.eye(n, dtype=bool)
    free, z = c < 0, np.zeros_like(c)
    fewest, patience = np.full(len(rows), n + 1), np.zeros(len(rows), int)
    for _ in range(20 * n + 20):
        pairs = free[:, :, None] & free[:, None, :]
        faces = np.where(pairs, K, unit)
        z = np.linalg.solve(faces, np.where(free, -c, 0.0)[:, :, None])[:, :, 0]
        y = z @ K + c
        wrong = np.where(free, -z, -y) > 8 * n * EPS * (1 + np.abs(z).sum(1, keepdims=True))
        many = wrong.sum(1)
        if not many.any():
            break
        fewer = many < fewest
        fewest, patience = np.where(fewer, many, fewest), np.where(fewer, 3, patience - 1)
        last = n - 1 - wrong[:, ::-1].argmax(1)
        alone = (patience < 0)[:, None] & (np.arange(n) != last[:, None])
        free = free ^ (wrong & ~alone)
    for _ in range(3):  # what the shift left: the proximal point method
        residual = np.where(free, -(z @ C + c), 0.0)
        z += np.linalg.solve(faces, residual[:, :, None])[:, :, 0]
    return np.maximum(z, 0.0)


def normalized_min_norm(gramian: Array, cap: float | None = None) -> tuple[Array, Solution[Array]]:
    """Weights ``[n]`` of the hull of unit gradients, and the `Solution` in unit rows.

    z minimises ‖Σ z_i g_i/‖g_i‖‖ over the simplex; w_i ∝ z_i/‖g_i‖, scaled to sum to one. A ``cap``
    keeps z in the ball |z_i − 1/n| <= (cap − 1)/n: a bound below too, for cap < 2. This is the rule
    of FedMGDA+ (Hu et al., arXiv 2006.11489), with ε = (cap − 1)/n. cap=1 is the mean of the
    unit gradients.
    """
    n = len(gramian)
    C, r = unit_rows(gramian)
    if cap is None or cap >= 2:
        solution = min_norm(C, cap=cap)
        z = solution.weights
    else:
        # z = Ay with y in the simplex and y_i <= 2/n: rows drawn towards their mean by cap − 1.
        A = (cap - 1) * np.eye(n) + (2 - cap) / n
        solution = min_norm(A @ C @ A, cap=2)
        z = A @ solution.weights
    weights = z * (r.min() / r)
    return weights / weights.sum(), solution


def krum(gramian: Array, f: int = 1, selected: int = 1) -> Array:
    """Weights ``[n]`` of Krum: equal on the `selected` groups with the nearest n − f − 2 others.

    Blanchard et al., "Machine Learning with Adversaries" (NeurIPS 2017): the score is the sum of
    squared distances to those others. It withstands f broken groups of n >= 2f + 3. Krum selects
    one, multi-Krum n − f: with noisy gradients the one is often just the shortest. Of n < f + 3
    (some may be absent) the nearest other one counts.
    """
    n = len(gramian)
    squares = np.diagonal(gramian)
    distances = np.maximum(squares + squares[:, None] - 2 * gramian, 0.0)
    np.fill_diagonal(distances, 0.0)
    scores = np.sort(distances, axis=1)[:, 1 : max(n - f - 1, 2)].sum(1)
    weights = np.zeros(n)
    weights[scores.argsort(kind="stable")[:selected]] = 1 / selected
    return weights


def unit_rows(gramian: Array) -> tuple[Array, Array]:
    """C_ij = G_ij / (r_i r_j), symmetric with ones on its diagonal, and r = ‖g_i‖."""
    r = np.sqrt(np.diagonal(gramian))
    C = gramian / r / r[:, None]
    C = (C + C.T) / 2
    np.fill_diagonal(C, 1.0)
    return C, r
