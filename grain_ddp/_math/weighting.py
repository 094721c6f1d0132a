"""From a Gramian to weights: the rules by name, and which groups count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grain_ddp._math.gramian import has_kernels
from grain_ddp._math.host import to_device, to_host
from grain_ddp._math.qp import EPS, Indices
from grain_ddp._math.record import Array
from grain_ddp._math.rules import krum, normalized_min_norm, upgrad
from grain_ddp._math.solver import judge, min_norm
from grain_ddp._math.status import Status

Weighting = str | Callable[[Tensor], Tensor]
"""A name in `RULES`, or a callable from a float64 CPU Gramian ``[n, n]`` to weights ``[n]``."""


SHORT = 1 / 16
"""An aggregate shorter than this part of Σ wᵢ‖gᵢ‖ is too short for sums in fp32.

They are off by up to 3.5e-8 of Σ wᵢ‖gᵢ‖ (measured: 2 to 64 rows, 3 thousand to 1 million columns),
so by 1e-6 of the aggregate at 1/28."""


@dataclass(frozen=True)
class Weights:
    """What a weighting made of one Gramian; the fields are those of `StepRecord`."""

    gramian: Array
    weights: Array
    status: Status
    active: tuple[int, ...]
    dropped: tuple[int, ...]
    gap: float
    sketch_error: float | None = None

    def factors(self, dtype: torch.dtype, *, exact: bool = False) -> Array:
        """What to multiply the groups' gradients of that dtype with, ``[n]``: the weights.

        Or zeros, where the aggregate d is zero to rounding: else its rounding errors would come
        out, which point anywhere, against some gradient too. The mean stays what it is. `exact`:
        the Gramian is that of `gramian(rows, exact=True)`, and so is the weighted sum to come.
        """
        square, terms = self._sizes()
        zero = square <= self._rounding(dtype, exact) * terms**2
        if zero and self.status is not Status.MEAN:
            return np.zeros_like(self.weights)
        return self.weights

    def cancels(self, dtype: torch.dtype) -> bool:
        """Whether gradients of that dtype cancel so far that sums in fp32 are too inexact.

        Then ‖d‖ is a small part of Σ wᵢ‖gᵢ‖, and rounding errors are not small beside it: both the
        Gramian and the weighted sum should be made anew with ``exact=True``.
        """
        if dtype == torch.float64 or self.status is Status.MEAN:
            return False
        square, terms = self._sizes()
        return bool(square < (SHORT * terms) ** 2)

    def _sizes(self) -> tuple[float, float]:
        """‖d‖² of the aggregate d = Σ wᵢ gᵢ, and Σ |wᵢ|‖gᵢ‖: what it was summed from."""
        counted = list(self.active)
        gramian, weights = self.gramian, self.weights
        if len(counted) < len(weights):
            gramian, weights = gramian[np.ix_(counted, counted)], weights[counted]
        with np.errstate(all="ignore"):  # NaN and inf have no order: no comparison holds
            terms = np.abs(weights) @ np.sqrt(np.diagonal(gramian))
            return float(weights @ gramian @ weights), float(terms)

    def _rounding(self, dtype: torch.dtype, exact: bool) -> float:
        """The ‖d‖² that is zero to rounding, in units of (Σ |wᵢ|‖gᵢ‖)²."""
        if exact or dtype == torch.float64:
            return 4 * len(self.active) * EPS  # that of the products in the Gramian
        return (4 * torch.finfo(torch.float32).eps) ** 2  # that of the weighted sum

    def factors_for(self, gradient: Tensor, *, exact: bool = False) -> Tensor:
        """The factors for gradients like this one, on its device; the host does not wait."""
        factors = torch.from_numpy(self.factors(gradient.dtype, exact=exact))
        return to_device(factors, gradient.device)


class DeviceWeights:
    """Weights that were found on the GPU and are still there: `read` gives the `Weights`."""

    dropped = ()  # their factors are zero, and the kernel leaves out such rows

    def __init__(
        self,
        gramian: Tensor,
        rule: str,
        cap: float | None,
        nonfinite: str,
        sketch_error: Tensor | None = None,
    ) -> None:
        from grain_ddp._math.kernel_solver import weights_on_device

        self._error = sketch_error
        self._gramian, self._rule, self._cap, self._nonfinite = gramian, rule, cap, nonfinite
        self._found = weights_on_device(gramian, rule, cap, nonfinite == "drop")
        self._ready: torch.cuda.Event | None = None
        if gramian.device.type == "cuda":
            self._ready = torch.cuda.current_stream(gramian.device).record_event()

    def factors_for(self, gradient: Tensor, *, exact: bool = False) -> Tensor:
        """The factors for gradients like this one."""
        n, wide = len(self._gramian), exact or gradient.dtype == torch.float64
        return self._found[2 * n : 3 * n] if wide else self._found[n : 2 * n]

    def read(self) -> Weights:
        """The weights on the CPU. Waits for the step that made them, not for what came later."""
        gramian = to_host(self._gramian, self._ready).numpy()
        found = to_host(self._found, self._ready).numpy()

        def rule(inner: Array, active: Indices) -> tuple[Array, Status]:
            weights = found[active]
            if self._rule != "min_norm":
                return weights, Status(self._rule)
            return weights, judge(inner, weights, self._cap, bool(found[-1]))[2]

        weights = _weigh(gramian, self._rule, self._nonfinite, rule)
        return _sketched(weights, None if self._error is None else to_host(self._error))


def uniform(n: int) -> Weights:
    """Plain averaging of n groups, whose Gramian nobody asked for."""
    every = tuple(range(n))
    return Weights(np.full((n, n), np.nan), np.full(n, 1 / n), Status.MEAN, every, (), float("nan"))


def _mean(gramian: Array, cap: float | None) -> tuple[Array, Status]:
    return np.full(len(gramian), 1 / len(gramian)), Status.MEAN


def _min_norm(gramian: Array, cap: float | None) -> tuple[Array, Status]:
    solution = min_norm(gramian, cap=cap)
    return np.asarray(solution.weights), solution.status


def _inverse_norm(gramian: Array, cap: float | None) -> tuple[Array, Status]:
    # Relative to the smallest, so that no square of a norm, however small, overflows.
    squares = np.diagonal(gramian)
    weights = squares.min() / squares
    return weights / weights.sum(), Status.INVERSE_NORM


def _upgrad(gramian: Array, cap: float | None) -> tuple[Array, Status]:
    return upgrad(gramian), Status.UPGRAD


def _krum(gramian: Array, cap: float | None) -> tuple[Array, Status]:
    return krum(gramian), Status.KRUM


def _multi_krum(gramian: Array, cap: float | None) -> tuple[Array, Status]:
    return krum(gramian, selected=max(len(gramian) - 1, 1)), Status.MULTI_KRUM


RULES: dict[str, Callable[[Array, float | None], tuple[Array, Status]]] = {
    "min_norm": _min_norm,
    "mean": _mean,
    "inverse_norm": _inverse_norm,
    "upgrad": _upgrad,
    "krum": _krum,
    "multi_krum": _multi_krum,
}

KRUM_FEWEST = 5
"""Groups that Krum needs: 2f + 3 for f = 1 broken one (Blanchard et al. 2017)."""

ON_DEVICE = ("min_norm", "mean", "inverse_norm")
"""Rules that the GPU can do by itself."""


def weigh(
    gramian: Array,
    weighting: Weighting,
    *,
    cap: float | None = None,
    normalize: bool = False,
    nonfinite: str = "propagate",
    left_out: Sequence[int] = (),
    seed: int = 0,
    shares: Array | None = None,
) -> Weights:
    """Weights of the n groups from their Gramian ``[n, n]`` (float64).

    A group whose gradient is zero is absent: it gets weight 0 (except from "mean", which divides by
    n whatever the gradients are, as plain averaging does). With ``nonfinite="drop"`` so does one
    whose gradient is not finite. Otherwise, or if no group is finite, all weights are 1/n, so that
    the NaN or inf comes out as it would from averaging. Groups that are `left_out` get weight 0 in
    any case.

    "mean" weighs groups by their `shares` [n] of what they are means of; None: all alike.

    A callable sees the Gramian of the groups that count. It runs with torch's global random
    generator seeded by `seed` and restored afterwards, so that all ranks draw alike.

    Raises:
        ValueError: a callable did not return one finite weight per group.
    """

    def rule(inner: Array, active: Indices) -> tuple[Array, Status]:
        if callable(weighting):
            return _call(weighting, inner, seed), Status.CUSTOM
        if normalize:
            weights, solution = normalized_min_norm(inner, cap)
            return weights, solution.status
        if weighting == "mean" and shares is not None:
            return shares[active] / (shares[active].sum() or 1), Status.MEAN
        return RULES[weighting](inner, cap)

    return _weigh(gramian, weighting, nonfinite, rule, left_out)


def check_groups(weighting: Weighting, n: int) -> None:
    """Whether a rule can do anything for n groups. One group is its own aggregate.

    Raises:
        ValueError: it needs more of them.
    """
    if weighting in ("krum", "multi_krum") and 1 < n < KRUM_FEWEST:
        raise ValueError(
            f"grain_ddp: weighting={weighting!r} needs at least {KRUM_FEWEST} groups to tell a "
            f"broken one from the others, but there are {n}. Run more ranks or smaller groups, or "
            'set weighting="min_norm" with cap=1.5.'
        )


def weigh_tensor(
    gramian: Tensor,
    weighting: Weighting,
    *,
    cap: float | None = None,
    normalize: bool = False,
    nonfinite: str = "propagate",
    left_out: Sequence[int] = (),
    seed: int = 0,
    shares: Array | None = None,
    sketch_error: Tensor | None = None,
) -> Weights | DeviceWeights:
    """`weigh`, of a Gramian on any device. `sketch_error` is noted, a scalar, if it is a sketch's.

    On a GPU with Triton a rule by name for up to 64 groups is done there, and the host does not
    wait. Else the Gramian is copied to the CPU, and the host waits for it.
    """
    shares = None if weighting != "mean" else shares
    alike = shares is None and not left_out
    if has_kernels(gramian) and weighting in ON_DEVICE and not normalize and alike:
        from grain_ddp._math.kernel_solver import LARGEST

        if len(gramian) <= LARGEST:
            return DeviceWeights(gramian, weighting, cap, nonfinite, sketch_error)
    host = to_host(gramian).numpy()
    weights = weigh(
        host,
        weighting,
        cap=cap,
        normalize=normalize,
        nonfinite=nonfinite,
        left_out=left_out,
        seed=seed,
        shares=shares,
    )
    return _sketched(weights, sketch_error)


def _sketched(weights: Weights, error: Tensor | None) -> Weights:
    return weights if error is None else replace(weights, sketch_error=float(error))


def _weigh(
    gramian: Array,
    weighting: Weighting,
    nonfinite: str,
    rule: Callable[[Array, Indices], tuple[Array, Status]],
    left_out: Sequence[int] = (),
) -> Weights:
    """By a rule that sees the Gramian of the groups that count, and which they are."""
    n = len(gramian)
    squares = np.diagonal(gramian)
    finite = np.isfinite(squares)
    wanted = np.ones(n, dtype=bool)
    wanted[list(left_out)] = False
    dropped = tuple(left_out)
    if not finite[wanted].all():
        if nonfinite != "drop" or not finite[wanted].any():
            every = tuple(range(n))
            return Weights(gramian, np.full(n, 1 / n), Status.NOT_FINITE, every, (), float("nan"))
        dropped = tuple(np.flatnonzero(~(finite & wanted)).tolist())
    finite &= wanted
    counted = finite if weighting == "mean" else finite & (squares > 0)
    active = np.flatnonzero(counted)
    weights = np.zeros(n)
    if not len(active):
        return Weights(gramian, weights, Status.ABSENT, (), dropped, 0.0)
    inner = gramian if len(active) == n else gramian[np.ix_(active, active)]
    weights[active], status = rule(inner, active)
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
