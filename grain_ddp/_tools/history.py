"""A run as arrays over its records, and what is computed from all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from grain_ddp._math.record import Array
from grain_ddp._math.status import Status
from grain_ddp._math.suspect import Suspect
from grain_ddp._math.weighting import weigh

# A group stands out if its mean over the run differs from the groups' median by this many robust
# standard deviations of the groups (Iglewicz and Hoaglin 1993) and by this many standard errors.
SPREADS, ERRORS = 3.5, 4.0

SMALLEST = 0.02
"""Cosines that differ by less than this, from zero or from each other, are not worth a word."""

FEWEST = 10
"""With fewer records than this nothing is said about anybody."""

SOLVED = 3000
"""Records for which it is computed what GRAIN would have done, evenly over the run."""

# What a record's status says of the rule that was in charge, if it was not GRAIN.
RULES: dict[str, str] = {
    Status.MEAN: "the mean",
    Status.INVERSE_NORM: "inverse_norm",
    Status.UPGRAD: "UPGrad",
    Status.KRUM: "Krum",
    Status.MULTI_KRUM: "multi-Krum",
    Status.CUSTOM: "a custom weighting",
}
ORDINARY = {*RULES, Status.OPTIMAL, Status.CAPPED, Status.ROUNDED, Status.NOT_FINITE}
_NO_RULE = {Status.NOT_FINITE, Status.ABSENT}  # gradients that no rule can do anything about


class Kind(NamedTuple):
    """What is counted of a record."""

    statuses: frozenset[str]
    dropped: frozenset[int]
    finite: bool
    measured: bool = True  # or only there for a suspect


@dataclass(frozen=True)
class Grain:
    """What GRAIN did, or would have done at the same parameters, in S of the T records."""

    at: Any  # [S], which ones
    weights: Array  # [S, n]
    norms: Array  # [S], of its step
    opposed: Array  # [S], groups that it opposes


@dataclass(frozen=True)
class _Cosines:
    """Of pairs of groups, summed over some records, [n, n] each."""

    count: Array
    total: Array
    squares: Array
    negative: Array

    def __add__(self, other: _Cosines) -> _Cosines:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Cosines(*(a + b for a, b in pairs))

    @property
    def mean(self) -> Array:
        """NaN where a group never had a gradient."""
        mean: Array = np.divide(
            self.total, self.count, out=np.full_like(self.total, np.nan), where=self.count > 0
        )
        return mean


@dataclass(frozen=True)
class _Readings:
    norms: Array  # [T, n]
    cosine_to_others: Array  # [T, n], NaN where the gradient is zero, or all others are
    mean_square: Array  # [T], of the mean gradient
    opposed: Array  # [T], groups that the mean opposes
    parts: list[tuple[int, int, _Cosines]]  # of the records from one to another


@dataclass(frozen=True, eq=False)
class Run:
    """The records of a run as arrays over T records and n groups, whole gradients in each.

    Records with a gradient that is not finite are counted, and left out of all arrays.
    """

    n: int
    first: int  # step
    last: int
    kinds: Counter[Kind]
    left_out: int
    every: int  # the arrays have each so-many-th record
    steps: Array  # [T]
    squares: Array  # [T], of the step that was taken
    all_gaps: Array  # [T], summed over the buckets
    weights: Array  # [T, n], the mean over the buckets
    products: Array  # [T, n], of the step that was taken with each group's gradient
    triangles: Array  # [T, n(n+1)/2], upper halves of the Gramians, row by row
    suspects: tuple[Suspect, ...] = ()
    labels: tuple[str, ...] | None = None  # of the groups, where these are made by label

    def name(self, i: int) -> str:
        """What a group is called."""
        return f"Group {i}" if self.labels is None else f'Group "{self.labels[i]}"'

    @property
    def records(self) -> int:
        return sum(count for kind, count in self.kinds.items() if kind.measured)

    @property
    def finite(self) -> int:
        return sum(count for kind, count in self.kinds.items() if kind.finite)

    @cached_property
    def statuses(self) -> Counter[str]:
        """In how many records each status occurs."""
        return self._counted("statuses")

    @cached_property
    def dropped(self) -> Counter[int]:
        """In how many records each group was dropped."""
        return self._counted("dropped")

    def _counted(self, name: str) -> Counter[Any]:
        found: Counter[Any] = Counter()
        for kind, count in self.kinds.items():
            found.update(dict.fromkeys(getattr(kind, name), count))
        return found

    @cached_property
    def rules(self) -> set[str]:
        """Whose steps were taken, in words."""
        return {RULES.get(s, "GRAIN") for s in self.statuses if s not in _NO_RULE}

    @property
    def min_norm(self) -> bool:
        """Whether all of the run was aggregated by GRAIN, and not only watched."""
        return self.rules <= {"GRAIN"}

    def gramians(self, part: Any) -> Array:
        """[t, n, n] of some records."""
        triangles = self.triangles[part]
        found = np.empty((len(triangles), self.n, self.n))
        rows, columns = np.triu_indices(self.n)
        found[:, rows, columns] = found[:, columns, rows] = triangles
        return found

    def thirds(self) -> tuple[slice, slice]:
        """The first and the last third of the records: early and late."""
        third = max(len(self.steps) // 3, 1)
        return slice(0, third), slice(-third, None)

    @cached_property
    def _readings(self) -> _Readings:
        """The formulas are those of `StepRecord`, for many records at a time."""
        total, third = len(self.steps), max(len(self.steps) // 3, 1)
        chunk = max(2**20 // self.n**2, 1)
        norms, others = np.empty((2, total, self.n))
        mean_square, by_mean = np.empty((2, total))
        parts = []
        for start, end in pairwise(sorted({0, min(third, total), max(total - third, 0), total})):
            cosines = _Cosines(*np.zeros((4, self.n, self.n)))
            for low in range(start, end, chunk):
                here = slice(low, min(low + chunk, end))
                gramians = self.gramians(here)
                squares = np.diagonal(gramians, axis1=1, axis2=2)
                rows, sums = gramians.sum(2), gramians.sum((1, 2))
                norms[here] = length = np.sqrt(squares)
                rest = np.sqrt(np.maximum(sums[:, None] - 2 * rows + squares, 0.0))
                others[here] = _ratio(rows - squares, length * rest, 0.0)
                others[here][(length == 0) | (rest == 0)] = np.nan
                mean_square[here] = sums / self.n**2
                by_mean[here] = _opposed(rows / self.n, mean_square[here], length)
                cosine = _ratio(gramians, length[:, :, None] * length[:, None, :], np.nan)
                known = np.nan_to_num(cosine)
                cosines += _Cosines(
                    np.isfinite(cosine).sum(0),
                    known.sum(0),
                    (known**2).sum(0),
                    (known < 0).sum(0),
                )
            parts.append((start, end, cosines))
        return _Readings(norms, others, mean_square, by_mean, parts)

    @property
    def norms(self) -> Array:
        """[T, n]"""
        return self._readings.norms

    @property
    def present(self) -> Any:
        """[T, n]: whose gradient was not zero."""
        return self.norms > 0

    @property
    def cosine_to_others(self) -> Array:
        """[T, n], NaN where the gradient is zero, or all others are."""
        return self._readings.cosine_to_others

    @property
    def norm_mean(self) -> Array:
        """[T], of the plain mean."""
        norms: Array = np.sqrt(np.maximum(self._readings.mean_square, 0.0))
        return norms

    @property
    def opposed(self) -> Array:
        """[T]: how many groups the mean opposes."""
        return self._readings.opposed

    @cached_property
    def cosines(self) -> tuple[Array, Array]:
        """[n, n], the mean over the first third and over the last; NaN: never a gradient."""
        parts, total = self._readings.parts, len(self.steps)
        third = max(total // 3, 1)
        early = [c for _, end, c in parts if end <= third]
        late = [c for start, _, c in parts if start >= total - third]
        return sum(early[1:], early[0]).mean, sum(late[1:], late[0]).mean

    @cached_property
    def mean_cosine(self) -> Array:
        """[n]: of each group to the sum of the others, over the records where both are not zero."""
        known = np.isfinite(self.cosine_to_others)
        return _ratio(np.nansum(self.cosine_to_others, 0), known.sum(0), np.nan)

    @cached_property
    def outliers(self) -> list[int]:
        """Groups that point elsewhere: their cosine to the others is less than half the usual."""
        far = standing_out(self.cosine_to_others)
        if not far:
            return []
        floor = max(abs(float(np.nanmedian(self.mean_cosine))) / 2, SMALLEST)
        return [i for i, deviation in far.items() if deviation < -floor]

    @cached_property
    def opposed_pairs(self) -> list[tuple[float, float, int, int]]:
        """Pairs that oppose each other, worst first; no outliers: the mean cosine, the share of
        records in which it is negative, and the two groups."""
        every = [part for _, _, part in self._readings.parts]
        whole = sum(every[1:], every[0])
        enough, mean = np.maximum(whole.count, 1), np.nan_to_num(whole.mean)
        error = np.sqrt(np.maximum(whole.squares - enough * mean**2, 0.0)) / enough
        clear = (whole.count >= FEWEST) & (mean < -np.maximum(SMALLEST, ERRORS * error))
        clear[self.outliers] = clear[:, self.outliers] = False
        share = whole.negative / enough
        pairs = np.argwhere(np.triu(clear, 1)).tolist()
        return sorted((float(mean[i, j]), float(share[i, j]), i, j) for i, j in pairs)

    @cached_property
    def grain(self) -> Grain:
        """What GRAIN did; or would have done at the same parameters, if it was not in charge."""
        if self.min_norm:
            opposed = _opposed(self.products, self.squares, self.norms)
            norms = np.sqrt(np.maximum(self.squares, 0.0))
            return Grain(np.arange(len(self.steps)), self.weights, norms, opposed)
        total = len(self.steps)
        at = np.unique(np.linspace(0, total - 1, min(total, SOLVED)).astype(int))
        weights, products = np.empty((2, len(at), self.n))
        for k, record in enumerate(at):
            gramian = self.gramians(slice(record, record + 1))[0]
            weights[k] = weigh(gramian, "min_norm").weights
            products[k] = gramian @ weights[k]
        squares = (products * weights).sum(1)
        opposed = _opposed(products, squares, self.norms[at])
        return Grain(at, weights, np.sqrt(np.maximum(squares, 0.0)), opposed)

    @cached_property
    def gaps(self) -> Array:
        """[T]: the duality gap over the mean squared gradient norm."""
        return _ratio(self.all_gaps, (self.norms**2).mean(1), 0.0)

    def noise_scale(self, part: slice) -> float:
        """`StepRecord.noise_scale` over several steps: a ratio of means, not a mean of ratios."""
        small, big = (self.norms[part] ** 2).mean(), self._readings.mean_square[part].mean()
        scale = noise_scale(np.array([small]), np.array([big]), self.n)[0]
        return float("inf") if np.isnan(scale) and self.n > 1 else float(scale)

    def noise_scales(self, smooth: Any) -> Array:
        """[T], of the smoothed squares; NaN where they are too noisy to tell."""
        small, big = smooth((self.norms**2).mean(1)), smooth(self._readings.mean_square)
        return noise_scale(small, big, self.n)


def noise_scale(small: Array, big: Array, n: int) -> Array:
    """As in `StepRecord.noise_scale`, from mean squares of a group's gradient and of the mean."""
    if n == 1:
        return np.full_like(small, np.nan)
    signal, noise = (n * big - small) / (n - 1), (small - big) / (1 - 1 / n)
    scale: Array = np.divide(noise, signal, out=np.full_like(noise, np.nan), where=signal > 0)
    return scale


def standing_out(values: Array) -> dict[int, float]:
    """Groups whose values ``[T, n]`` stand out over the run, and how far from the median group.

    NaN where a group has no value; of fewer than FEWEST nothing is said.
    """
    known = np.isfinite(values)
    steps, groups = known.any(1), np.flatnonzero(known.sum(0) >= FEWEST)
    values = values[steps][:, groups]
    if len(values) < FEWEST:
        return {}
    means = np.nanmean(values, 0)
    deviation = means - np.median(means)
    spread = 1.4826 * np.median(np.abs(deviation))
    relative = values - np.nanmedian(values, 1, keepdims=True)
    error = np.nanstd(relative, 0) / np.sqrt(np.isfinite(values).sum(0))
    far = np.abs(deviation) > np.maximum(SPREADS * spread, ERRORS * error)
    return {int(groups[i]): float(deviation[i]) for i in np.flatnonzero(far)}


def parts_of(values: Array, at: Any, total: int, parts: tuple[slice, slice]) -> Iterator[Array]:
    """Values of some of the records, those within each part."""
    for part in parts:
        low, high, _ = part.indices(total)
        inside = values[(at >= low) & (at < high)]
        yield inside if len(inside) else values


def _ratio(above: Array, below: Array, otherwise: float) -> Array:
    ratio: Array = np.divide(
        above, below, out=np.full(np.shape(below), otherwise), where=np.asarray(below) != 0
    )
    return ratio


def _opposed(products: Array, squares: Array, norms: Array) -> Array:
    """How many of the n inner products [T, n] are negative, beyond the Gramian's own rounding."""
    rounding = 1e-6 * np.sqrt(np.maximum(squares, 0.0)) * norms.max(1, initial=0.0)
    found: Array = (products < -rounding[:, None]).sum(1).astype(np.float64)
    return found
