"""The min-norm point of a convex hull, from the Gramian of its points alone.

All arithmetic is in unit rows: with r_i = ‖g_i‖, C_ij = G_ij / (r_i r_j) and u_i ∝ 1/r_i, the
problem min ½ wᵀGw over the simplex is min ½ zᵀCz over z >= 0, uᵀz = 1, with w = u ∘ z. Nothing
there depends on the scale of G or of a row, so one matrix may span 1e-30 to 1e15.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray

from grain_ddp._math.qp import EPS, Face, Indices, Problem, solve
from grain_ddp._math.record import Array
from grain_ddp._math.status import Status

Weights = TypeVar("Weights", Array, torch.Tensor)

TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Solution(Generic[Weights]):
    """Weights on the simplex, and how good they are.

    ``weights``: float64 ``[n]``, of the kind of the Gramian (numpy, or torch on its device).
    ``norm_squared``: wᵀGw, the squared norm of the aggregate, in units of G.
    ``gap``: the certificate wᵀGw − min_i (Gw)_i >= 0 of the problem *without* a cap, in units of
    G: ‖d − d*‖² <= gap for the aggregate d and the min-norm point d*, and ⟨d, g_i⟩ >= ‖d‖² − gap.
    ``iterations``: matrices factored. ``status``: how the solve ended.
    """

    weights: Weights
    norm_squared: float
    gap: float
    iterations: int
    status: Status


_NOT_REAL = "grain_ddp: the Gramian must hold real numbers, but its dtype is {}."


@overload
def min_norm(gramian: torch.Tensor, *, cap: float | None = None) -> Solution[torch.Tensor]: ...
@overload
def min_norm(
    gramian: NDArray[Any] | Sequence[Sequence[float]], *, cap: float | None = None
) -> Solution[Array]: ...
def min_norm(
    gramian: torch.Tensor | NDArray[Any] | Sequence[Sequence[float]], *, cap: float | None = None
) -> Solution[Any]:
    """Minimise ½ wᵀGw over w >= 0, Σw = 1 and, with a ``cap``, w_i <= cap/n; exactly, in float64.

    This is the weighting of GRAIN (arXiv 2606.22917). ``gramian`` is G ``[n, n]``, positive
    semi-definite up to the rounding of bf16; singular is fine. ``cap=1`` gives uniform weights,
    ``None`` or ``cap >= n`` no bound. Equal rows share their weight evenly. The same bits in give
    the same bits out.

    Method: block principal pivoting (Júdice and Pires 1994; Portugal, Júdice and Vicente 1994)
    with upper bounds and, where that overshoots, smaller blocks; where that cycles, Mehrotra's
    interior point method (1992), and pivoting from the sides that it tells.

    Raises:
        ValueError: G is not a real square matrix with n >= 1, not finite, not symmetric or not
            positive semi-definite (both beyond what rounding to bf16 explains); or cap < 1.
    """
    tensor = gramian.detach() if isinstance(gramian, torch.Tensor) else None
    tiny = TINY
    if tensor is not None:
        if tensor.is_floating_point():
            tiny = max(tiny, torch.finfo(tensor.dtype).tiny)
        if tensor.is_complex():
            raise ValueError(_NOT_REAL.format(tensor.dtype))
        G = tensor.to("cpu", torch.float64).numpy()
    else:
        try:
            given = np.asarray(gramian)
        except ValueError as error:  # rows of several lengths
            raise ValueError(f"grain_ddp: the Gramian must have shape [n, n]: {error}") from None
        if given.dtype.kind not in "fiub":
            raise ValueError(_NOT_REAL.format(given.dtype))
        if given.dtype == np.float32 or given.dtype == np.float16:
            tiny = float(np.finfo(given.dtype).tiny)
        G = given.astype(np.float64, copy=False)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or not G.size:
        raise ValueError(
            "grain_ddp: the Gramian must have shape [n, n] with n >= 1, but it has shape"
            f" {list(G.shape)}."
        )
    if cap is not None and not cap >= 1:
        raise ValueError(
            f"grain_ddp: cap must be >= 1 (no weight exceeds cap/n; None: no cap), but it is {cap}."
        )

    n = len(G)
    slack = n**0.5 / 128  # the spectral norm of a matrix of bf16 rounding errors is half of it
    with np.errstate(all="ignore"):
        C, r = _unit_rows(G, tiny, slack)
        u = r.min() / r
        counts, label = _classes(C, G)
        bound = counts * (cap / n) if cap is not None and cap < n else None
        if label is not None:
            first = np.unique(label, return_index=True)[1]
            C, u = C[first[:, None], first], u[first]
        problem, whole = Problem.of(C, u, bound), _whole_face(C, u, slack)
        if bound is not None and bound.sum() <= 1 + 4 * EPS:
            z, exact, iterations = problem.top, True, 1
        else:
            z, exact, iterations = solve(problem, whole)
        w = u * z if bound is None else np.minimum(u * z, bound)
        w /= w.sum()
        if label is not None:
            w = (w / counts)[label]
            w /= w.sum()

        norm_squared, gap, status = judge(G, w, cap, exact)
    weights = w if tensor is None else torch.from_numpy(w).to(tensor.device)
    return Solution(weights, norm_squared, gap, iterations, status)


def judge(G: Array, w: Array, cap: float | None, exact: bool) -> tuple[float, float, Status]:
    """wᵀGw, the gap and the status of weights; `exact`: optimal by the solver's own conditions."""
    n, slope, r = len(G), G @ w, np.sqrt(np.maximum(G.diagonal(), 0.0))
    norm_squared = float(w @ slope)
    gap = max(norm_squared - float(slope.min()), 0.0)
    if norm_squared <= n * 4 * EPS * float(w @ r) ** 2:
        return norm_squared, gap, Status.ZERO
    if exact:
        capped = cap is not None and cap < n and w.max() >= cap / n * (1 - 8 * EPS)
        return norm_squared, gap, Status.CAPPED if capped else Status.OPTIMAL
    # A slope is a sum of terms w_j r_i r_j, and is no more exact than they are.
    least = _least(slope + 1e-12 * float(w @ r) * r, min(cap or n, n) / n)
    return norm_squared, gap, Status.ROUNDED if norm_squared <= least else Status.STALLED


def _least(slope: Array, bound: float) -> float:
    """min ⟨slope, v⟩ over the simplex with every v_i <= bound: fill the smallest first."""
    room = np.clip(1 - bound * np.arange(len(slope)), 0, bound)
    return float(room @ np.sort(slope))


def _unit_rows(G: Array, tiny: float, slack: float) -> tuple[Array, Array]:
    """C = G_ij / (r_i r_j) and r = ‖g_i‖; whatever is no Gramian shows in C and is an error.

    Norms stop at the underflow of the Gramian's own dtype, where its entries lose their meaning.
    """
    must = "grain_ddp: the Gramian must be"
    d = G.diagonal()
    r = np.sqrt(np.maximum(d, max(tiny, 1e-200 * float(d.max()))))
    C = G / (r * r[:, None])
    if not np.abs(C).max() <= 1 + slack:  # true of a NaN too
        if not np.isfinite(G).all():
            i, j = np.argwhere(~np.isfinite(G))[0].tolist()
            raise ValueError(f"{must} finite, but G[{i}, {j}] = {G[i, j]}.")
        i, j = divmod(int(np.abs(C).argmax()), len(C))
        if d.min() < 0:
            i = j = int(d.argmin())
        excess = "is negative" if i == j else f"exceeds sqrt({d[i]:g} * {d[j]:g})"
        raise ValueError(f"{must} positive semi-definite, but G[{i}, {j}] = {G[i, j]:g} {excess}.")
    if not (C.T == C).all():
        skew = np.abs(C - C.T)
        i, j = divmod(int(skew.argmax()), len(C))
        if skew[i, j] > slack:
            raise ValueError(
                f"{must} symmetric, but G[{i}, {j}] = {G[i, j]:g} and G[{j}, {i}] = {G[j, i]:g}."
            )
        C = (C + C.T) / 2
    return C, r


def _classes(C: Array, G: Array) -> tuple[Array, Indices | None]:
    """Multiplicities of the distinct rows of G, and which of them each row is (None: all are)."""
    if np.count_nonzero(C.diagonal() == C) > len(G):  # a row equal to another has C_ij = C_ii
        _, label, counts = np.unique(G, axis=0, return_inverse=True, return_counts=True)
        if len(counts) < len(G):
            return counts.astype(np.float64), label.reshape(-1)
    return np.ones(len(G)), None


def _whole_face(C: Array, u: Array, slack: float) -> Face:
    """The face of all coordinates. C must be positive semi-definite to the rounding of bf16."""
    whole = Face(C, u)
    if whole.convex_to(1e-9):
        return whole
    if not whole.factor(slack) or whole.v @ whole.a > 1:
        least = float(np.linalg.eigvalsh(C)[0])
        raise ValueError(
            "grain_ddp: the Gramian must be positive semi-definite, but with its diagonal"
            f" scaled to 1 it has the eigenvalue {least:g} (rounding to bf16 would explain"
            f" {-slack:.2g})."
        )
    return Face(C, u)
