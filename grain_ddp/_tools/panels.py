"""What is drawn of a run, whoever draws it: matplotlib for a picture, `chart` for the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from grain_ddp._math.record import Array
from grain_ddp._tools.history import Run

TOPICS = {
    "records": "What was recorded",
    "direction": "Does anyone point elsewhere?",
    "length": "How long are the gradients?",
    "pairs": "Who pulls against whom?",
    "conflicts": "Does the step oppose anyone?",
    "weights": "Who counts for how much?",
    "noise": "How much of it is noise?",
    "gap": "How far from optimal weights?",
}

POINTS = 240
"""Along the steps: a screen shows no more."""

MARKED = 4
"""Groups that get a colour of their own."""


@dataclass(frozen=True)
class Series:
    """A curve. role: "group", "mark0" to "mark3", "mean", "grain", "noise", "limit" or "zero"."""

    label: str  # "": not in the legend
    role: str
    y: Array  # [points], NaN where there is none


@dataclass(frozen=True)
class Lines:
    """Curves over the steps."""

    title: str
    unit: str
    x: Array  # [points]
    series: list[Series]
    log: bool = False
    low: float | None = None  # an end of the axis that is given
    high: float | None = None
    band: tuple[Array, Array] | None = None  # the smallest and largest of many groups
    note: str = ""  # in place of curves


@dataclass(frozen=True)
class Heat:
    """A value for each group and step: −1 nothing, 0 an equal share, 1 all."""

    title: str
    steps: tuple[float, float]
    values: Array  # [n, points]
    keys: tuple[str, str, str] = ("0", "", "1")  # what -1, 0 and 1 stand for


@dataclass(frozen=True)
class Matrices:
    """Cosines of pairs, early and late."""

    title: str
    values: dict[str, Array] = field(default_factory=dict)  # [n, n] each


Panel = Lines | Heat | Matrices


def panels(run: Run) -> dict[str, Panel]:
    """By topic; none if every record has a gradient that is not finite."""
    if not len(run.steps):
        return {}
    return {
        "direction": _direction(run),
        "length": _length(run),
        "pairs": _pairs(run),
        "conflicts": _conflicts(run),
        "weights": _weights(run),
        "noise": _noise(run),
        "gap": _gap(run),
    }


def _direction(run: Run) -> Lines:
    series, band = _groups(run, run.cosine_to_others)
    x = _steps(run)
    zero = Series("", "zero", np.zeros(len(x)))
    title = "Cosine of each group's gradient to the sum of the others'"
    return Lines(title, "cosine", x, [zero, *series], band=band)


def _length(run: Run) -> Lines:
    series, band = _groups(run, np.where(run.present, run.norms, np.nan))
    x = _steps(run)
    series.append(Series("the mean", "mean", _curve(run.norm_mean)))
    series.append(Series(_name(run), "grain", _of_grain(run, run.grain.norms, x)))
    return Lines(
        "Norm of the gradients and of the step",
        "norm",
        x,
        series,
        log=bool((run.norm_mean > 0).any()),
        band=band,
    )


def _pairs(run: Run) -> Matrices:
    early, late = run.cosines
    return Matrices("Mean cosine of every two groups", {"early": early, "late": late})


def _conflicts(run: Run) -> Lines:
    x = _steps(run)
    mean, grain = 100 * run.opposed / run.n, 100 * run.grain.opposed / run.n
    series = [
        Series("the mean", "mean", _curve(mean, 10)),
        Series(_name(run), "grain", _of_grain(run, grain, x, 10)),
    ]
    top = max(5.0, *(float(np.nanmax(s.y)) for s in series))
    title = "Groups that the step points against, in %"
    return Lines(title, "%", x, series, low=0.0, high=1.05 * top)


def _weights(run: Run) -> Heat:
    grain = run.grain
    weights = _binned(grain.weights, POINTS // 3).T
    share = weights * run.n
    tone = np.where(share < 1, share - 1, np.log(np.maximum(share, 1)) / np.log(max(run.n, 2)))
    title = f"Weights that GRAIN {'gave' if run.min_norm else 'would have given'}"
    steps = float(run.steps[0]), float(run.steps[-1])
    return Heat(title, steps, tone, ("0", f"{1 / run.n:.3g}", "1"))


def _noise(run: Run) -> Lines:
    title = "Gradient noise scale, smoothed"
    x = _steps(run)
    if run.n == 1:
        return Lines(title, "batches", x, [], note="needs two groups")
    scale = _binned(run.noise_scales(smooth))
    series = [
        Series(f"what a step uses: {run.n}", "limit", np.full(len(x), float(run.n))),
        Series("noise scale (gaps: too large to tell)", "noise", scale),
    ]
    return Lines(title, "batches of a group", x, series, log=True)


def _gap(run: Run) -> Lines:
    title = "Duality gap of the weights, over the mean squared norm"
    x = _steps(run)
    gaps = _binned(np.where(run.gaps > 0, run.gaps, np.nan))
    if np.isnan(gaps).all():
        return Lines(title, "gap", x, [], note="0 throughout: optimal")
    high = max(1e-6, float(np.nanmax(gaps))) if run.min_norm else None
    role = "grain" if run.min_norm else "mean"
    label = "of the weights in use" if run.min_norm else "of equal weights"
    return Lines(title, "gap", x, [Series(label, role, gaps)], log=True, high=high)


def _name(run: Run) -> str:
    return "GRAIN" if run.min_norm else "GRAIN would have"


def _groups(run: Run, values: Array) -> tuple[list[Series], tuple[Array, Array] | None]:
    """A curve per group, the outliers in colour; of more than 16 the others are a band."""
    marked = run.outliers[:MARKED]
    others = [i for i in range(run.n) if i not in marked]
    curves = _curve(values)
    label = "the other groups" if marked else "the groups"
    band, series = None, list[Series]()
    if len(others) > 16:
        known = np.where(np.isfinite(curves[:, others]), curves[:, others], np.nan)
        empty = np.isnan(known).all(1)
        known[empty] = 0.0
        low, high, middle = (
            np.where(empty, np.nan, f(known, 1)) for f in (np.nanmin, np.nanmax, np.nanmedian)
        )
        band, series = (low, high), [Series(f"{label}: range and median", "group", middle)]
    else:
        series = [
            Series(label if k == 0 else "", "group", curves[:, i]) for k, i in enumerate(others)
        ]
    marks = [Series(run.name(i), f"mark{k}", curves[:, i]) for k, i in enumerate(marked)]
    return series + marks, band


def _steps(run: Run) -> Array:
    """Along the axis; it begins and ends where the run does."""
    x = _binned(run.steps).copy()
    x[0], x[-1] = run.steps[0], run.steps[-1]
    return x


def _curve(values: Array, share: int = 30) -> Array:
    return _binned(smooth(values, share))


def _of_grain(run: Run, values: Array, x: Array, share: int = 30) -> Array:
    """Of the records for which it is known, at the steps of the others."""
    if len(run.grain.at) == len(run.steps):
        return _curve(values, share)
    known: Array = np.interp(x, run.steps[run.grain.at], smooth(values, share))
    return known


def smooth(values: Array, share: int = 30) -> Array:
    """Centred moving average along the first axis, over 1/share of the records; NaN skipped."""
    width = len(values) // (2 * share)
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([np.zeros_like(values[:1]), np.where(finite, values, 0.0)]), 0)
    counts = np.cumsum(np.concatenate([0 * finite[:1], finite]), 0, dtype=np.float64)
    at = np.arange(len(values))
    low, high = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    mean: Array = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean


def _binned(values: Array, points: int = POINTS) -> Array:
    """Means over equal stretches of the first axis, at most so many; NaN skipped."""
    if len(values) <= points:
        return values
    edges = np.linspace(0, len(values), points + 1).astype(int)[:-1]
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0.0), edges)
    count = np.add.reduceat(finite.astype(np.float64), edges)
    mean: Array = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean


def alike(one: dict[str, Panel], other: dict[str, Panel]) -> tuple[dict[str, Panel], ...]:
    """The same panels with the same axes for both, to be compared side by side."""
    found: tuple[dict[str, Panel], ...] = dict(one), dict(other)
    for topic in one.keys() & other.keys():
        a, b = one[topic], other[topic]
        if isinstance(a, Lines) and isinstance(b, Lines):
            ends = [bounds(a), bounds(b)]
            low, high = min(e[0] for e in ends), max(e[1] for e in ends)
            log = a.log and b.log
            for panel, into in ((a, found[0]), (b, found[1])):
                into[topic] = replace(panel, low=low, high=high, log=log)
    return found


def bounds(panel: Lines) -> tuple[float, float]:
    """The ends of the axis of values."""
    every = [s.y for s in panel.series] + list(panel.band or ())
    known = np.concatenate(every or [np.empty(0)])
    known = known[np.isfinite(known) & ((known > 0) | (not panel.log))]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.1, 1.0)
    if panel.log:
        low, high = low / 1.2, high * 1.2
    else:
        room = 0.05 * (high - low) or 0.5
        low, high = low - room, high + room
    return (
        low if panel.low is None else panel.low,
        max(high if panel.high is None else panel.high, low),
    )


def ticks(low: float, high: float, log: bool) -> Iterator[float]:
    """Round numbers for an axis: three to seven of them."""
    if log and low > 0 and high / low > 10:
        decades = np.log10(high / low)
        every = max(int(np.ceil(decades / 6)), 1)
        steps = (1, 2, 5) if decades < 2.2 else (1,)
        for exponent in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1):
            for step in steps:
                value = step * 10.0**exponent
                if exponent % every == 0 and low <= value <= high:
                    yield value
        return
    size = 10.0 ** np.floor(np.log10(max(high - low, 1e-300)))
    step = next(s * size for s in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (s * size) <= 7)
    first = int(np.ceil(low / step - 1e-9))
    yield from (k * step for k in range(first, int(np.floor(high / step + 1e-9)) + 1))
