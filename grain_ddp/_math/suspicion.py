"""Whose gradient stands out: from a few numbers of each gradient, and those of past steps.

The numbers are the largest entry and the norm of each tensor's gradient, of every row (a rank, or a
pass of one). Only their logarithms enter. What is compared between rows, less the median row:

- ``peak``: a tensor's largest entry, less how much larger this row's tensors are in general;
- ``ratio``: a tensor's largest entry over its norm, in which the row's scale cancels;
- ``total``: the norm of the whole gradient.

A fault leaves a large entry in some tensor; a hard batch makes all of them larger, and cancels. How
far such a deviation goes in sound steps is learned for every channel: its upper decile, and by how
much that is exceeded on average. The logarithm's tail is taken to fall exponentially (a power law
of the gradients themselves, the heaviest that they show), as in peaks over threshold (Davison and
Smith 1990). So a deviation has a chance, and its score is -log of it.

Small deviations that stay are found by the moving mean of the norms' (an EWMA chart, Roberts 1959),
as far as the other tensors do not explain it: a hard batch changes all norms together, so what is
left of a tensor's is several times smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grain_ddp._math.record import Array

Mask = NDArray[np.bool_]

STEPS_PER_FALSE_ALARM = 10_000

MEMORY = 100
"""Over so many steps the habits of a channel are learned."""

WARM_UP = 50
"""Before so many steps only what is some hundred times too large is seen."""

SHARE = 0.1
"""Of the deviations in sound steps: how many are in the tail that is learned."""

FINEST = 0.01
"""A deviation by 1 % never costs more than a factor e of its chance."""

CALM = 2.0
"""By this factor the deviations of all rows may grow before it is taken into account."""

LONG = 250
"""Over so many steps small deviations are averaged."""

LASTING = 6.0
"""By so many standard deviations a mean of sound steps is never off."""

EVERY = 25
"""How often these means are looked at."""

MOST = 512
"""Of so many tensors at most: their covariance is a matrix."""


@dataclass(frozen=True)
class Finding:
    """A row that stands out: how, in which tensor (None: in all of it), and -log of its chance."""

    row: int
    kind: str
    tensor: int | None
    score: float


class History:
    """What the rows of past steps were like, and `look` at the next ones. Float64, no chance.

    Args:
        rows: how many there are.
        tensors: of how many tensors a gradient consists.
    """

    def __init__(self, rows: int, tensors: int) -> None:
        self._rows, self._tensors, self._steps = rows, tensors, 0
        channels = 3 * tensors + 1
        # -log of the chance at which one of the channels of one of the rows is a false alarm
        self.threshold = math.log(STEPS_PER_FALSE_ALARM * rows * channels)
        self._centre = np.zeros(2 * tensors + 1)  # of the rows
        self._level = np.zeros(2 * tensors + 1)  # where that was
        self._edge = np.full(channels, 1.0)  # where the tail begins
        self._decay = np.full(channels, 0.4)  # by how much that is exceeded, on average
        self._spread = np.full(channels, 1.0)  # the mean deviation
        self._usual = 1.0  # of the typical row's deviation, over that
        self._first: list[Array] = []  # deviations of the first steps
        self._slow = _Slow(rows, tensors)
        self._nonzero = np.zeros(tensors)  # steps since the tensor was zero in some row
        self._present = np.ones(rows, dtype=bool)
        self._last: tuple[Array, Array] | None = None

    def look(self, peaks: Array, norms: Array) -> list[Finding]:
        """The rows that stand out in a step; the others are learned from.

        Args:
            peaks: the largest absolute entries, ``[rows, tensors]``.
            norms: the norms, ``[rows, tensors]``.

        Returns:
            One finding for each such row: the one with the highest score.
        """
        found = self._plain(peaks, norms)
        values = _channels(peaks, norms)
        deviations = self._deviations(values)
        scores = self._scores(deviations)
        scores[[one.row for one in found]] = -np.inf
        rows = np.flatnonzero(np.isfinite(values[:, -1]))  # the others are absent, or not finite
        large = [int(row) for row in rows if scores[row].max() > self.threshold]
        if len(found) + len(large) <= self._rows / 2:  # else it is the median that is off
            for row in large:
                channel = int(scores[row].argmax())
                found.append(self._finding(row, channel, float(scores[row, channel])))
        out = {one.row for one in found}
        sound = np.array([row for row in rows if row not in out], dtype=np.int64)
        if len(sound) >= self._rows / 2:
            self._learn(deviations, sound)
            found += [one for one in self._slow.look(values, sound) if one.row not in out]
        self._last = peaks, norms
        return sorted(found, key=lambda one: one.row)

    def _plain(self, peaks: Array, norms: Array) -> list[Finding]:
        """What needs no statistics, where it is so in at most half of the rows."""
        found: dict[int, Finding] = {}
        half, certain = self._rows / 2, self.threshold

        def add(rows: Any, kind: str, tensors: Any = None, score: float = 0.0) -> None:
            if 0 < rows.sum() <= half:
                for row in np.flatnonzero(rows):
                    tensor = None if tensors is None else int(tensors[row].argmax())
                    found.setdefault(int(row), Finding(int(row), kind, tensor, certain + score))

        broken = ~np.isfinite(peaks)
        add(broken.any(1), "nonfinite", broken, math.inf)
        present = np.asarray((peaks > 0).any(1))
        absent = ~present & ~broken.any(1)
        add(absent & self._present, "zero")
        zero: Mask = (peaks == 0) & present.reshape(-1, 1)
        new = zero & (self._nonzero >= MEMORY)
        add(new.any(1), "zero", new)
        if self._last is not None:
            same = (peaks == self._last[0]).all(1) & (norms == self._last[1]).all(1)
            add(same & present, "stale")
        self._nonzero = np.where(zero.any(0), 0, self._nonzero + 1)
        self._present = ~absent
        return list(found.values())

    def _deviations(self, values: Array) -> Array:
        """Of the channels ``[rows, channels]`` from the median row; NaN where there is nothing."""
        t = self._tensors
        compared = values
        if self._rows <= 2 and self._steps:  # with the past as a third, it shows which one is off
            compared = np.concatenate([values, self._level[None]])
        self._centre = _median(compared, 0)
        deviations = values - self._centre
        # Of peaks there are two: as they are, and less what the row's tensors have in common.
        alone = deviations[:, :t] - _median(deviations[:, :t], 1)[:, None]
        return np.concatenate([alone, deviations], 1)

    def _scores(self, deviations: Array) -> Array:
        """-log of the chance of a deviation as large, for those in the tail, else -inf.

        The decay is the mean of `count` deviations in the tail. So the chance of one that exceeds
        the edge x times as far is (1 + x/count)^-count.
        """
        count = SHARE * self._rows * min(max(self._steps, WARM_UP), 2 * MEMORY)
        with np.errstate(invalid="ignore"):
            excess = (deviations / self._unrest(deviations) - self._edge) / self._decay
            scores = count * np.log1p(np.maximum(excess, 0) / count) - math.log(SHARE)
            return np.where(excess > 0, scores, -np.inf)

    def _unrest(self, deviations: Array) -> float:
        """By what factor all rows deviate more than they did: in a spike of the loss, say."""
        typical = self._typical_row(deviations)
        grown = typical / self._usual if self._steps >= WARM_UP else 1.0
        return grown if grown > CALM else 1.0

    def _typical_row(self, deviations: Array) -> float:
        """How far the median row, or the lower of two, deviates in its median channel."""
        rows = np.sort(_median(np.abs(deviations) / self._spread, 1))  # NaN comes last
        known = int(np.isfinite(rows).sum())
        return float(rows[(known - 1) // 2]) if known else 0.0

    def _finding(self, row: int, channel: int, score: float) -> Finding:
        tensor = None if channel == 3 * self._tensors else channel % self._tensors
        return Finding(row, "norm" if tensor is None else "peak", tensor, score)

    def _learn(self, deviations: Array, rows: NDArray[np.int64]) -> None:
        """Take the sound rows into account."""
        some = np.nan_to_num(deviations[rows] / self._unrest(deviations))
        self._steps += 1
        rate = 1 / min(self._steps, MEMORY)
        self._level += rate * np.nan_to_num(self._centre - self._level)
        size = np.minimum(np.abs(some), 4 * self._spread if self._steps > WARM_UP else np.inf)
        self._spread = np.maximum(self._spread + rate * (size.mean(0) - self._spread), FINEST)
        self._usual += rate * (self._typical_row(some) - self._usual)
        if self._steps <= WARM_UP:
            self._first.append(some)
            if self._steps == WARM_UP:
                every = np.concatenate(self._first)
                self._edge = np.quantile(every, 1 - SHARE, axis=0)
                over = np.maximum(every - self._edge, 0).mean(0) / SHARE
                self._decay = np.maximum(over, FINEST)
                self._first = []
            return
        over = some - self._edge
        self._edge = self._edge + rate * self._decay * ((over > 0).mean(0) / SHARE - 1)
        excess = np.where(over > 0, np.minimum(over, 5 * self._decay) - self._decay, 0.0)
        self._decay = np.maximum(self._decay + rate * excess.mean(0) / SHARE, FINEST)


class _Slow:
    """Deviations of the norms that do not average out."""

    def __init__(self, rows: int, tensors: int) -> None:
        self._some = np.unique(np.linspace(0, tensors - 1, min(tensors, MOST)).astype(int))
        size = len(self._some)
        self._tensors, self._steps = tensors, 0
        self._mean, self._weight = np.zeros((rows, size)), np.zeros(rows)
        self._covariance = np.eye(size)

    def look(self, values: Array, sound: NDArray[np.int64]) -> list[Finding]:
        """Learn from the channels of a step's sound rows, and find rows whose mean is off."""
        t = self._tensors
        norms = (values[:, :t] - values[:, t : 2 * t])[:, self._some]
        deviations = np.nan_to_num(norms - _median(norms, 0))[sound]
        self._steps += 1
        rate = 1 / min(self._steps, LONG)
        spread = np.sqrt(self._covariance.diagonal())
        if self._steps > WARM_UP:
            deviations = np.clip(deviations, -4 * spread, 4 * spread)
            self._mean[sound] += (deviations - self._mean[sound]) / LONG
            self._weight[sound] += (1 - self._weight[sound]) / LONG
        if self._steps <= WARM_UP or self._steps % (1 + len(self._some) // 100) == 0:
            square = deviations.T @ deviations / max(len(sound), 1)
            self._covariance += rate * (square - self._covariance)
        return self._lasting() if self._steps % EVERY == 0 and self._steps > 2 * MEMORY else []

    def _lasting(self) -> list[Finding]:
        """The rows that are off, of which the means begin anew."""
        size = len(self._some)
        least = max(1e-3 * float(self._covariance.diagonal().mean()), FINEST**2 / 100)
        inverse = np.linalg.inv(self._covariance + least * np.eye(size))
        unexplained, whole = self._mean @ inverse, inverse.sum()
        deviations = np.concatenate([unexplained, unexplained.sum(1, keepdims=True)], 1)
        deviations /= np.sqrt(np.append(inverse.diagonal(), whole))
        # Standard deviations of a mean of independent steps
        noise = np.sqrt((1 - (1 - self._weight) ** 2) / (2 * LONG - 1))
        off = np.abs(deviations) / np.maximum(noise, 1e-9)[:, None]
        off /= max(float(np.median(off)) / 0.6745, 1.0)  # every rank has other data
        found = []
        for row in np.flatnonzero((off > LASTING).any(1)):
            at = int(off[row].argmax())
            tensor = int(self._some[at]) if at < size else None
            found.append(Finding(int(row), "norm", tensor, float(off[row, at] ** 2 / 2)))
            self._mean[row], self._weight[row] = 0, 0
        return found if len(found) <= len(off) / 2 else []


def _channels(peaks: Array, norms: Array) -> Array:
    """Peaks, ratios and the total norm, as logarithms ``[rows, 2 tensors + 1]``; else NaN."""
    norms = np.where(np.isfinite(norms), norms, peaks)  # its square has left the dtype
    with np.errstate(all="ignore"):
        largest = norms.max(1, keepdims=True)
        total = np.log(largest) + 0.5 * np.log(np.square(norms / largest).sum(1, keepdims=True))
        logs = np.log(peaks)
        values = np.concatenate([logs, logs - np.log(norms), total], 1)
    values[~np.isfinite(values)] = np.nan
    return values


def _median(values: Array, axis: int) -> Array:
    """Along an axis, of what is no NaN; NaN where nothing is."""
    if not np.isnan(values).any():
        result: Array = np.median(values, axis)
        return result
    ordered = np.sort(values, axis)  # NaN comes last
    count = np.isfinite(values).sum(axis)
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, values.shape[axis] - 1)
    low, high = (np.expand_dims(index, axis) for index in (low, high))
    both = np.take_along_axis(ordered, low, axis) + np.take_along_axis(ordered, high, axis)
    return np.squeeze(both, axis) / 2


def minority(digests: NDArray[np.int64], wanted: Mask) -> list[Finding]:
    """The rows that differ from most others, or where no most are, all that differ from any.

    Args:
        digests: ``[rows, tensors]``.
        wanted: which tensors count, ``[tensors]``.
    """
    found: dict[int, Finding] = {}
    for tensor in np.flatnonzero(wanted & (digests != digests[0]).any(0)):
        column = digests[:, tensor]
        _, which, counts = np.unique(column, return_inverse=True, return_counts=True)
        largest = counts == counts.max()
        right = counts.argmax() if largest.sum() == 1 else -1
        for row in np.flatnonzero(which != right):
            found.setdefault(int(row), Finding(int(row), "replica", int(tensor), math.inf))
    return [found[row] for row in sorted(found)]
