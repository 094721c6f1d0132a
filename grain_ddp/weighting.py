"""From a Gramian to weights: the rules by name, and which groups count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grain_ddp.record import Array
from grain_ddp.solver import min_norm

Weighting = str | Callable[[Tensor], Tensor]
"""A name in `RULES`, or a callable from a float64 CPU Gramian ``[n, n]`` to weights ``[n]``."""


@dataclass(frozen=True)
class Weights:
    """What a weighting made of one Gramian; the fields are those of `StepRecord`."""

    gramian: Array
    weights: Array
    status: str
    active: tuple[int, ...]
    dropped: tuple[int, ...]
    gap: float

    def factors(self, dtype: torch.dtype) -> Array:
        """What to multiply the groups' gradients of that dtype with, ``[n]``: the weights.

        Or zeros, where the aggregate d is zero to rounding: else its rounding errors would come
        out, which point anywhere, against some gradient too.
        """
        eps = torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
        gramian, weights = self.gramian, self.weights
        if len(self.active) < len(weights):
            counted = list(self.active)
            gramian, weights = gramian[np.ix_(counted, counted)], weights[counted]
        with np.errstate(all="ignore"):  # NaN and inf have no order: the weights it is
            square, largest = weights @ gramian @ weights, np.diagonal(gramian).max(initial=0.0)
            zero = square <= (4 * eps) ** 2 * largest
        return np.zeros_like(self.weights) if zero else self.weights


def uniform(n: int) -> Weights:
    """Plain averaging of n groups, whose Gramian nobody asked for."""
    every = tuple(range(n))
    return Weights(np.full((n, n), np.nan), np.full(n, 1 / n), "mean", every, (), float("nan"))


def _mean(gramian: Array, cap: float | None) -> tuple[Array, str]:
    return np.full(len(gramian), 1 / len(gramian)), "mean"


def _min_norm(gramian: Array, cap: float | None) -> tuple[Array, str]:
    solution = min_norm(gramian, cap=cap)
    return np.asarray(solution.weights), str(solution.status)


def _inverse_norm(gramian: Array, cap: float | None) -> tuple[Array, str]:
    # Relative to the smallest, so that no square of a norm, however small, overflows.
    squares = np.diagonal(gramian)
    weights = squares.min() / squares
    return weights / weights.sum(), "inverse_norm"


RULES: dict[str, Callable[[Array, float | None], tuple[Array, str]]] = {
    "min_norm": _min_norm,
    "mean": _mean,
    "inverse_norm": _inverse_norm,
}


def weigh(
    gramian: Array,
    weighting: Weighting,
    *,
    cap: float | None = None,
    nonfinite: str = "propagate",
    seed: int = 0,
) -> Weights:
    """Weights of the n groups from their Gramian ``[n, n]`` (float64).

    A group whose gradient is zero is absent: it gets weight 0 (except from "mean", which divides by
    n whatever the gradients are, as plain averaging does). With ``nonfinite="drop"`` so does one
    whose gradient is not finite. Otherwise, or if no group is finite, all weights are 1/n, so that
    the NaN or inf comes out as it would from averaging.

    A callable sees the Gramian of the groups that count. It runs with torch's global random
    generator seeded by `seed` and restored afterwards, so that all ranks draw alike.

    Raises:
        ValueError: a callable did not return one finite weight per group.
    """
    n = len(gramian)
    squares = np.diagonal(gramian)
    finite = np.isfinite(squares)
    dropped: tuple[int, ...] = ()
    if not finite.all():
        if nonfinite != "drop" or not finite.any():
            return Weights(
                gramian,
                np.full(n, 1 / n),
                "not finite: a gradient has NaN or inf, which was propagated",
                tuple(range(n)),
                (),
                float("nan"),
            )
        dropped = tuple(np.flatnonzero(~finite).tolist())
    counted = finite if weighting == "mean" else finite & (squares > 0)
    active = np.flatnonzero(counted)
    weights = np.zeros(n)
    if not len(active):
        return Weights(gramian, weights, "zero: every gradient is zero", (), dropped, 0.0)
    inner = gramian if len(active) == n else gramian[np.ix_(active, active)]
    if callable(weighting):
        weights[active], status = _call(weighting, inner, seed), "custom"
    else:
        weights[active], status = RULES[weighting](inner, cap)
    products = inner @ weights[active]
    gap = float(weights[active] @ products - products.min())
    return Weights(gramian, weights, status, tuple(active.tolist()), dropped, max(gap, 0.0))


def _call(weighting: Callable[[Tensor], Tensor], gramian: Array, seed: int) -> Array:
    # Gradients, which a backward pass's hook runs without: a weighting may optimise by autograd.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        result = weighting(torch.from_numpy(gramian.copy()))
    found = np.asarray(torch.as_tensor(result).detach().double().cpu())
    if found.shape != (len(gramian),) or not np.isfinite(found).all():
        raise ValueError(
            f"grain_ddp: the weighting {weighting!r} must return {len(gramian)} finite weights, "
            f"one per group, but it returned {result!r}."
        )
    return found
