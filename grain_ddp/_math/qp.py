"""min ½ zᵀCz over 0 <= z <= top, uᵀz = 1, exactly: block principal pivoting, interior point.

Its KKT conditions: with y = Cz − λu, every coordinate is on one of three *sides*: at 0 (side −1)
with y_i >= 0, free between its bounds (side 0) with y_i = 0, or at top (side 1) with y_i <= 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grain_ddp._math.record import Array

Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]

EPS = float(np.finfo(np.float64).eps)


class Problem(NamedTuple):
    """C [n, n], positive semi-definite to rounding, of unit diagonal; u and top [n], > 0.

    ``top`` is inf if not ``capped``. Beyond ``limit`` a z is above it by more than rounding.
    """

    C: Array
    u: Array
    top: Array
    limit: Array | float
    capped: bool

    @classmethod
    def of(cls, C: Array, u: Array, bound: Array | None) -> Problem:
        """With u ∘ z <= bound, if one is given."""
        if bound is None:
            return cls(C, u, np.full(len(u), np.inf), np.inf, False)
        top = bound / u
        return cls(C, u, top, top * (1 + 4 * EPS), True)

    def gap(self, z: Array) -> float:
        """zᵀCz less the least that its slope promises anywhere; inf for a z out of bounds.

        Not below 0, and 0 at the optimum.
        """
        if z.min() < 0 or (z > self.limit).any() or abs(self.u @ z - 1) > 1e-12:
            return np.inf
        slope = self.C @ z
        order = (slope / self.u).argsort()
        most = np.minimum(self.u * self.top, 1.0)[order]
        share = np.clip(1 - (most.cumsum() - most), 0, most)  # of 1: the lowest slopes first
        return float(z @ slope - share @ (slope / self.u)[order])


class Face:
    """The problem without bounds on some coordinates: K = C + vvᵀ factored once, v = u to scale 1.

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
        """K⁻¹h."""
        if len(h) < 32:  # a second factorisation takes less time than a call of cholesky_solve
            try:
                return np.asarray(np.linalg.solve(self.K, h), np.float64)
            except np.linalg.LinAlgError:  # this one met a pivot that is zero; Cholesky did not
                pass
        x: Array = torch.cholesky_solve(torch.from_numpy(h[:, None]), self.L).numpy()[:, 0]
        return x

    def convex_to(self, rounding: float) -> bool:
        """Whether C is positive semi-definite to rounding.

        C + shift is if and only if K + shift is and vᵀ(K + shift)⁻¹v <= 1.
        """
        return self.shift <= rounding and float(self.v @ self.a) <= 1 + rounding

    def minimise(self, total: float, h: Array | None = None) -> tuple[Array, float]:
        """The z minimising ½ zᵀCz + hᵀz where uᵀz = total, and the λ of Cz + h = λu."""
        total /= self.scale
        b = 0.0 if h is None else self.inverse(h)
        t = (total if h is None else total + float(self.v @ b)) / float(self.v @ self.a)
        return self.a * t - b, (t - total) / self.scale


def solve(problem: Problem, whole: Face) -> tuple[Array, bool, int]:
    """The z, whether it meets the KKT conditions to rounding, and the number of matrices factored.

    ``whole`` is the face of all coordinates.
    """
    zero = np.zeros(len(problem.u))
    z, exact, count = pivot(problem, zero, zero, whole)
    if exact:
        return z, True, count
    inner, sides, steps = interior_point(problem)
    last, exact, more = pivot(problem, sides, inner)
    if not exact:  # C is not quite semi-definite: the best of what was found
        last = min([inner, last, z], key=problem.gap)
    return last, exact, count + steps + more


def pivot(
    problem: Problem, sides: Array, start: Array, face: Face | None = None
) -> tuple[Array, bool, int]:
    """Block principal pivoting (Portugal, Júdice and Vicente 1994), from the sides given.

    Take the stationary point over the free coordinates; move those that break a condition there to
    another side; until none does. Returns the last z, whether it meets the KKT conditions to
    rounding, and the number of matrices factored. ``face`` is that of the sides, if known.
    """
    blocks, refined, count = _Blocks(len(sides)), 0, 0 if face is None else 1
    while True:
        inside = sides == 0
        free = inside.nonzero()[0]
        if not len(free):
            free = _next_to_move(problem, sides)
            inside[free] = True
            sides = np.where(inside, 0.0, sides)
        if face is None:
            face = Face(problem.C.take(free, 0).take(free, 1), problem.u[free])
            count += 1
        z = start * inside
        if problem.capped:
            z = np.where(sides > 0, problem.top, z)
        y, rounding = _move_to_stationary_point(problem, free, z, face)

        # How wrong each side is: in comparable units, as the diagonal of C is 1.
        wrong = np.where(inside, np.maximum(-z, z - problem.limit), sides * y - rounding)
        bad = wrong > 0
        many = int(np.count_nonzero(bad))
        if many:
            size = blocks.next_size(many)
            if not size:
                return z, False, count
            if size < many:
                bad[wrong.argsort(kind="stable")[:-size]] = False  # the worst remain
            # Who was free goes to the bound that it passed; who was at a bound becomes free.
            sides, face, refined = np.where(bad, np.copysign(inside, z), sides), None, 0
            continue
        level = bool(np.abs(y[free]).max() <= rounding)
        if level or refined == 3:
            return z, level, count
        start, refined = z, refined + 1  # the shift of a near-singular K shows: once more from here


def _next_to_move(problem: Problem, sides: Array) -> Indices:
    """Where all coordinates are at bounds: the one to free, as [1]; only it tells the multiplier.

    It goes down from its top where uᵀz is too large, up from 0 where it is too small: the one that
    lowers ½ zᵀCz the fastest.
    """
    z = np.where(sides > 0, problem.top, 0.0)
    side = 1.0 if problem.u @ z > 1 - 1e-12 else -1.0
    descent = np.where(sides == side, side * (problem.C @ z) / problem.u, -np.inf)
    return np.array([descent.argmax()])


def _move_to_stationary_point(
    problem: Problem, free: Indices, z: Array, face: Face
) -> tuple[Array, float]:
    """Move the free coordinates of z to the stationary point over them that is nearest to them.

    Returns y = Cz − λu there, and what of it is rounding.
    """
    C, u = problem.C, problem.u
    missing = 1 - float(u @ z)
    step, multiplier = face.minimise(missing, None if missing == 1 else (C @ z)[free])
    z[free] += step
    return C @ z - multiplier * u, 8 * EPS * float(np.abs(z).sum())


class _Blocks:
    """How many of the wrong coordinates are moved at a time: all of them, while that works.

    Where there are not fewer of them afterwards, fewer are moved, the worst; after the eighth such
    failure in a row the search is given up. It ends, as their smallest number falls in between.
    """

    def __init__(self, n: int) -> None:
        self.fewest, self.failures = n + 1, 0

    def next_size(self, many: int) -> int:
        """How many to move where `many` are wrong; 0: moving does not help."""
        if many < self.fewest:
            self.fewest, self.failures = many, 0
            return many
        self.failures += 1
        if self.failures == 8:  # 0.7 and 8: of 0.5 to 0.8 and 5 to 10 none is better throughout
            return 0
        return max(int(many * 0.7**self.failures), 1)


def interior_point(problem: Problem) -> tuple[Array, Array, int]:
    """Mehrotra's predictor–corrector method (1992): a z near the optimum, and the sides it tells.

    Slower than pivoting, but it cannot cycle. The slacks x and their multipliers m are kept > 0; at
    the optimum x ∘ m = 0. A row of each belongs to z >= 0, with x = z, and one to z <= top, if
    there is a cap, with x = top − z: ``sign`` says how x changes with z. Cz − λu = Σ sign ∘ m.
    """
    C, u, top, n = problem.C, problem.u, problem.top, len(problem.u)
    if problem.capped:
        z = top / float(u @ top)
        x, sign = np.stack([z, top - z]), np.array([[1.0], [-1.0]])
    else:
        z = np.full(n, 1 / u.sum())
        x, sign = z[None], np.array([[1.0]])
    m: Array = max(float(z @ (C @ z)), EPS * float(z.sum()) ** 2) / n / x
    sides, count = np.zeros(n), 0
    while count < 50:
        count += 1
        complementarity = float((x * m).sum())
        newton = _Newton(problem, x, m, sign)
        # The predictor aims at x ∘ m = 0; how far it gets tells what the corrector should aim at.
        dx, dm = newton.step(np.zeros_like(x))
        length = _length(x, m, dx, dm, 1.0)
        left = float(((x + length * dx) * (m + length * dm)).sum())
        mu = (left / complementarity) ** 3 * complementarity / x.size
        dx, dm = newton.step(mu - dx * dm)
        if not (np.isfinite(dx).all() and np.isfinite(dm).all()):
            break
        # Tapia's indicators: what goes to its bound shrinks, and its multiplier stays.
        sides = -(sign * (dx / x < dm / m)).sum(0)
        length = _length(x, m, dx, dm, 0.995)
        x, m = x + length * dx, m + length * dm
        if complementarity <= EPS * float(x[0].sum()) ** 2 or length < 1e-6:
            break
    return x[0], sides, count


class _Newton:
    """Newton's method for the conditions of `interior_point`, at x and m: one matrix, two steps."""

    def __init__(self, problem: Problem, x: Array, m: Array, sign: Array) -> None:
        self.x, self.m, self.sign = x, m, sign
        self.slope = problem.C @ x[0]
        self.short = 1 - float(problem.u @ x[0])
        barrier = problem.C.copy()
        barrier.reshape(-1)[:: len(barrier) + 1] += (m / x).sum(0)
        self.face = Face(barrier, problem.u)

    def step(self, aim: Array) -> tuple[Array, Array]:
        """The changes of x and m for which, to first order, the products x ∘ m become `aim`."""
        push = (self.sign * aim / self.x).sum(0)
        dz, _ = self.face.minimise(self.short, self.slope - push)
        dx = self.sign * dz
        return dx, (aim - self.m * dx) / self.x - self.m


def _length(x: Array, m: Array, dx: Array, dm: Array, part: float) -> float:
    """How much of a step to take: that part of the way to where an x or an m is 0, all at most."""
    fastest = max(float((-dx / x).max()), float((-dm / m).max()), EPS)
    return min(1.0, part / fastest)
