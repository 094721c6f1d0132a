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

from grain_ddp._math.status import Status

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Weights = TypeVar("Weights", Array, torch.Tensor)

EPS, TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)


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
        G = tensor.to("cpu", torch.float64).numpy()
    else:
        given = np.asarray(gramian)
        if given.dtype.kind not in "fiub":
            raise ValueError(
                f"grain_ddp: the Gramian must hold real numbers, but its dtype is {given.dtype}."
            )
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
        z, exact, iterations = _solve(C, u, bound, slack)
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
    n, slope = len(G), G @ w
    norm_squared = float(w @ slope)
    gap = max(norm_squared - float(slope.min()), 0.0)
    if norm_squared <= n * 4 * EPS * float(w @ np.sqrt(np.maximum(G.diagonal(), 0.0))) ** 2:
        return norm_squared, gap, Status.ZERO
    if exact:
        capped = cap is not None and cap < n and w.max() >= cap / n * (1 - 8 * EPS)
        return norm_squared, gap, Status.CAPPED if capped else Status.OPTIMAL
    own_gap = norm_squared - _least(slope, min(cap or n, n) / n)
    rounding = 1e-12 * float((G.diagonal() / n).sum())
    return norm_squared, gap, Status.ROUNDED if own_gap <= rounding else Status.STALLED


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


class _Face:
    """The problem on the coordinates ``free``: K = C + vvᵀ factored once, v = u to scale 1.

    K takes the place of C because it is nonsingular where the minimiser is unique; as uᵀz is
    given, it has the same one. Kz ∝ v is the NNLS identity of the min-norm point. A shift at
    rounding level keeps a singular K factorable; among many minimisers it picks the shortest.
    """

    def __init__(self, C: Array, u: Array) -> None:
        self.scale = float(u.max())
        self.v = v = u / self.scale
        self.K, self.shift, self.a = v * v[:, None], 0.0, v
        self.K += C
        shift = 4 * len(v) * EPS
        while not self.factor(shift) and shift < len(v):  # the end is reached if K is not finite
            shift *= 1e3

    def factor(self, shift: float) -> bool:
        """Factor K + shift, and say whether it is positive definite."""
        self.K.reshape(-1)[:: len(self.K) + 1] += shift - self.shift
        self.shift = shift
        self.L, info = torch.linalg.cholesky_ex(torch.from_numpy(self.K))
        if info.item():
            return False
        self.a = self.inverse(self.v)
        return True

    def inverse(self, h: Array) -> Array:
        if len(h) < 32:  # a second factorisation takes less time than a call of cholesky_solve
            return np.asarray(np.linalg.solve(self.K, h), np.float64)
        x: Array = torch.cholesky_solve(torch.from_numpy(h[:, None]), self.L).numpy()[:, 0]
        return x

    def solve(self, total: float, h: Array | None = None) -> tuple[Array, float]:
        """The z minimising ½ zᵀCz + hᵀz where uᵀz = total, and the λ of Cz + h = λu."""
        total /= self.scale
        b = 0.0 if h is None else self.inverse(h)
        t = (total if h is None else total + float(self.v @ b)) / float(self.v @ self.a)
        return self.a * t - b, (t - total) / self.scale


def _solve(C: Array, u: Array, bound: Array | None, slack: float) -> tuple[Array, bool, int]:
    """The z, whether it meets the optimality conditions to rounding, and matrices factored."""
    whole = _Face(C, u)
    # C + shift is positive semi-definite if and only if K + shift is and vᵀ(K + shift)⁻¹v <= 1.
    if whole.shift > 1e-9 or whole.v @ whole.a > 1 + 1e-9:
        if not whole.factor(slack) or whole.v @ whole.a > 1:
            least = float(np.linalg.eigvalsh(C)[0])
            raise ValueError(
                "grain_ddp: the Gramian must be positive semi-definite, but with its diagonal"
                f" scaled to 1 it has the eigenvalue {least:g} (rounding to bf16 would explain"
                f" {-slack:.2g})."
            )
        whole = _Face(C, u)
    top = None
    if bound is not None:
        top = bound / u
        if bound.sum() <= 1 + 4 * EPS:
            return top, True, 1
    z, exact, count = _pivot(C, u, top, np.zeros(len(u)), np.zeros(len(u)), whole)
    if not exact:
        inner, state, more = _interior(C, u, top)
        z, exact, last = _pivot(C, u, top, inner, state, None)
        count += more + last
        z = z if exact else inner
    return z, exact, count


def _pivot(
    C: Array, u: Array, top: Array | None, start: Array, state: Array, face: _Face | None
) -> tuple[Array, bool, int]:
    """Block principal pivoting: swap all coordinates on the wrong side, until none is.

    ``state`` says where each is: at its lower bound (-1), free (0), at its upper bound (1). The
    free ones take the stationary point nearest to ``start``. Where the swaps do not lessen the
    wrong ones, swap fewer of them, the worst; where that does not help either, end with False.
    """
    fewest, failures, refined, count = len(u) + 1, 0, 0, int(face is not None)
    limit = np.inf if top is None else top * (1 + 4 * EPS)
    while True:
        inside = state == 0
        free = inside.nonzero()[0]
        z = start * inside if top is None else np.where(state > 0, top, start * inside)
        if not len(free):
            # Only the next coordinate to move can tell the multiplier.
            full = 1 if u @ z > 1 - 1e-12 else -1
            free = np.argmax(np.where(state == full, full * (C @ z) / u, -np.inf), keepdims=True)
            inside[free], state[free], z[free] = True, 0, 0.0
        if face is None:
            face = _Face(C.take(free, 0).take(free, 1), u[free])
            count += 1
        total = 1 - float(u @ z)
        dz, multiplier = face.solve(total, None if total == 1 else (C @ z)[free])
        z[free] += dz
        y = C @ z - multiplier * u
        rounding = 8 * EPS * float(np.abs(z).sum())
        # How wrong each side is: in comparable units, as the diagonal of C is 1.
        wrong = np.where(inside, np.maximum(-z, z - limit), state * y - rounding)
        bad = wrong > 0
        if many := int(np.count_nonzero(bad)):
            failures = 0 if many < fewest else failures + 1
            if failures == 8:
                return z, False, count
            if failures:  # 0.7 and 8: of 0.5 to 0.8 and 5 to 10 none is better throughout
                bad[wrong.argsort(kind="stable")[: -max(int(many * 0.7**failures), 1)]] = False
            fewest, refined, face = min(many, fewest), 0, None
            state = np.where(bad, np.copysign(inside, z), state)
        elif refined == 3 or np.abs(y[free]).max() <= rounding:
            return z, refined < 3, count
        else:  # the shift of a near-singular K shows: solve for what is left
            refined, start = refined + 1, z


def _interior(C: Array, u: Array, top: Array | None) -> tuple[Array, Array, int]:
    """Mehrotra's interior point method (1992): a z near the optimum, and where each z_i will be.

    Slower than pivoting, but it cannot cycle. s = top − z; p and q are the multipliers of z >= 0
    and s >= 0. Without a cap s is infinite and q zero.
    """
    n, capped = len(u), top is not None
    z: Array = np.full(n, 1 / u.sum()) if top is None else top / float(u @ top)
    s: Array = np.full(n, np.inf) if top is None else top - z
    y = C @ z
    mu = max(float(z @ y), EPS * float(z.sum()) ** 2) / n
    p, q = mu / z, mu / s
    state: Array = np.zeros(n)
    count = 0
    while count < 50:
        count += 1
        barred = C.copy()
        barred.reshape(-1)[:: n + 1] += p / z + q / s
        face = _Face(barred, u)
        short = 1 - float(u @ z)
        total = float(z @ p) + (float(s @ q) if capped else 0.0)
        mu, c, e = 0.0, np.zeros(n), np.zeros(n)
        for corrected in (False, True):  # the first step aims at zp = sq = 0, the second at mu
            dz, _ = face.solve(short, y - c / z + e / s)
            dp, dq = (c - p * dz) / z - p, (e + q * dz) / s - q
            now = np.concatenate([z, p, s, q] if capped else [z, p])
            change = np.concatenate([dz, dp, -dz, dq] if capped else [dz, dp])
            step = min(1.0, (0.995 if corrected else 1.0) / max(float((-change / now).max()), EPS))
            if not corrected:
                after = now + step * change
                left = float(after[:n] @ after[n : 2 * n])
                left += float(after[2 * n : 3 * n] @ after[3 * n :])
                mu = (left / total) ** 3 * total / (len(now) / 2)
                c, e = mu - dz * dp, mu + dz * dq
        if not np.isfinite(change).all():
            break
        # Tapia's indicators: what goes to its bound shrinks, its multiplier stays.
        state = np.where(capped & (-dz / s < dq / q), 1.0, 0.0) - (dz / z < dp / p)
        z, p, s, q = z + step * dz, p + step * dp, s - step * dz, q + step * dq
        y = C @ z
        if total <= EPS * float(z.sum()) ** 2 or step < 1e-6:
            break
    return z, state, count
