"""What a run's records say, in words and in numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from grain_ddp._math.record import Array, StepRecord, named
from grain_ddp._math.status import Status
from grain_ddp._math.weighting import weigh

# A group stands out if its mean over the run differs from the groups' median by this many robust
# standard deviations of the groups (Iglewicz and Hoaglin 1993) and by this many standard errors.
SPREADS, ERRORS = 3.5, 4.0

SMALLEST = 0.02
"""Cosines that differ by less than this, from zero or from each other, are not worth a word."""

FEWEST = 10
"""With fewer records than this nobody is called an outlier."""

# What a record's status says of the rule that was in charge, if it was not GRAIN.
_RULES: dict[str, str] = {
    Status.MEAN: "the mean",
    Status.INVERSE_NORM: "inverse_norm",
    Status.CUSTOM: "a custom weighting",
}
_NO_RULE = {Status.NOT_FINITE, Status.ABSENT}  # gradients that no rule can do anything about
_ORDINARY = {*_RULES, Status.OPTIMAL, Status.CAPPED, Status.ROUNDED, Status.NOT_FINITE}


@dataclass(frozen=True)
class Run:
    """The records of a run as arrays over T records and n groups, whole gradients in each.

    Records with a gradient that is not finite are counted and left out of all arrays.
    """

    records: Sequence[StepRecord]
    left_out: int  # of an earlier part of the run, with another number of groups

    @classmethod
    def of(cls, records: Sequence[StepRecord]) -> Run:
        """From records in the order of their steps: the last ones with one number of groups."""
        n = records[-1].gramian.shape[-1]
        start = next(
            (k + 1 for k in reversed(range(len(records))) if records[k].gramian.shape[-1] != n), 0
        )
        return cls(records[start:], start)

    @property
    def n(self) -> int:
        return int(self.records[0].gramian.shape[-1])

    @cached_property
    def finite(self) -> list[StepRecord]:
        return [r for r in self.records if np.isfinite(r.gramian).all()]

    @cached_property
    def steps(self) -> Array:
        return np.array([r.step for r in self.finite], dtype=np.float64)

    @cached_property
    def gramians(self) -> Array:
        """[T, n, n]"""
        return np.array([r.gramian.reshape(-1, self.n, self.n).sum(0) for r in self.finite])

    @cached_property
    def weights(self) -> Array:
        """[T, n], the mean over the buckets."""
        return np.array([r.weights.reshape(-1, self.n).mean(0) for r in self.finite])

    @cached_property
    def norms(self) -> Array:
        """[T, n]"""
        norms: Array = np.sqrt(np.diagonal(self.gramians, axis1=1, axis2=2))
        return norms

    @cached_property
    def present(self) -> Any:
        """[T, n]: whose gradient was not zero."""
        return self.norms > 0

    @cached_property
    def cosines(self) -> Array:
        """[T, n, n], NaN where a gradient is zero."""
        both = self.present[:, :, None] & self.present[:, None, :]
        cosines: Array = np.where(both, [r.cosine for r in self.finite], np.nan)
        return cosines

    @cached_property
    def cosine_to_others(self) -> Array:
        """[T, n], NaN where the gradient is zero."""
        cosines: Array = np.where(self.present, [r.cosine_to_others for r in self.finite], np.nan)
        return cosines

    @cached_property
    def mean_cosine(self) -> Array:
        """[n]: of each group to the sum of the others, over the records where it has a gradient."""
        count = self.present.sum(0)
        total: Array = np.nansum(self.cosine_to_others, 0)
        mean: Array = np.divide(total, count, out=np.full(self.n, np.nan), where=count > 0)
        return mean

    @cached_property
    def outliers(self) -> list[int]:
        """Groups that point elsewhere: their cosine to the others is less than half the usual."""
        far = standing_out(self.cosine_to_others)
        if not far:
            return []
        floor = max(abs(float(np.nanmedian(self.mean_cosine))) / 2, SMALLEST)
        return [i for i, deviation in far.items() if deviation < -floor]

    @cached_property
    def opposed_pairs(self) -> list[tuple[float, int, int]]:
        """Mean cosine and groups of pairs that oppose each other, worst first; no outliers."""
        count = np.isfinite(self.cosines).sum(0)
        enough = np.maximum(count, 1)
        mean = np.nansum(self.cosines, 0) / enough
        error = np.sqrt(np.nansum((self.cosines - mean) ** 2, 0)) / enough
        others = [i for i in range(self.n) if i not in self.outliers]
        pairs = (
            (float(mean[i, j]), i, j)
            for i, j in combinations(others, 2)
            if count[i, j] >= FEWEST and mean[i, j] < -max(SMALLEST, ERRORS * error[i, j])
        )
        return sorted(pairs)

    @cached_property
    def statuses(self) -> Counter[str]:
        """In how many records each status occurs."""
        return Counter(
            status
            for r in self.records
            for status in ({r.status} if isinstance(r.status, str) else set(r.status))
        )

    @cached_property
    def rules(self) -> set[str]:
        """Whose steps were taken, in words."""
        return {_RULES.get(s, "GRAIN") for s in self.statuses if s not in _NO_RULE}

    @property
    def min_norm(self) -> bool:
        """Whether all of the run was aggregated by GRAIN, and not only watched."""
        return self.rules <= {"GRAIN"}

    @cached_property
    def grain(self) -> list[StepRecord]:
        """What GRAIN did; or would have done at the same parameters, if it was not in charge."""
        if self.min_norm:
            return self.finite
        return [
            StepRecord(r.step, **vars(weigh(gramian, "min_norm")))
            for r, gramian in zip(self.finite, self.gramians, strict=True)
        ]

    @cached_property
    def gaps(self) -> Array:
        """[T]: the duality gap over the mean squared gradient norm."""
        squares = (self.norms**2).mean(1)
        gaps = np.array([np.sum(r.gap) for r in self.finite])
        relative: Array = np.divide(gaps, squares, out=np.zeros_like(gaps), where=squares > 0)
        return relative

    def thirds(self) -> tuple[slice, slice]:
        """The first and the last third of the records: early and late."""
        third = max(len(self.finite) // 3, 1)
        return slice(0, third), slice(-third, None)

    def noise_scale(self, part: slice) -> float:
        """`StepRecord.noise_scale` over several steps: a ratio of means, not a mean of ratios."""
        gramian, zero = self.gramians[part].mean(0), np.zeros(self.n)
        return StepRecord(0, gramian, zero, 0.0, Status.MEAN, (), ()).noise_scale


def standing_out(values: Array) -> dict[int, float]:
    """Groups whose values ``[T, n]`` stand out over the run, and how far from the median group.

    NaN where a group has no value.
    """
    known = np.isfinite(values)
    steps, groups = known.any(1), np.flatnonzero(known.any(0))
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


def summary(run: Run, batch: int | None = None) -> str:
    """The report in words. ``batch``: examples in one group's batch, if the caller knows."""
    records = run.records
    rules = " and ".join(sorted(run.rules or {"GRAIN"}))
    watching = "" if "GRAIN" in rules else "; GRAIN was watching only"
    lines = [
        f"{_count(len(records), 'record')}, steps {records[0].step} to {records[-1].step}, "
        f"{_count(run.n, 'group')}. The steps were those of {rules}{watching}.",
        "",
        "What stands out",
    ]
    lines += [f"- {finding}" for finding in findings(run, batch)]
    if run.finite:
        lines += ["", *_numbers(run)]
    return "\n".join(lines)


def findings(run: Run, batch: int | None = None) -> Iterator[str]:
    """What a person should notice, a sentence or a few each, the most urgent first."""
    yield from _broken(run)
    if not run.finite:
        return
    if run.n == 1:
        yield "There is one group only: nothing to weigh, and nothing to compare."
        return
    yield from _outliers(run)
    yield from _lengths(run)
    yield from _pairs(run)
    yield from _conflicts(run)
    yield from _grain(run)
    yield from _noise(run, batch)


def _broken(run: Run) -> Iterator[str]:
    total = len(run.records)
    if run.left_out:
        yield (
            f"The number of groups changed: the {_count(run.left_out, 'record')} before step "
            f"{run.records[0].step} had another one, and are left out here."
        )
    if len(run.finite) < total:
        yield (
            f"{total - len(run.finite)} of {total} records have a gradient with NaN or inf, and "
            "are left out of all that follows. Expected now and then with a loss scaler; else "
            "look for a diverging loss."
        )
    dropped = Counter(i for r in run.records for i in named(r.dropped))
    for group, count in sorted(dropped.items()):
        yield f"Group {group} was dropped in {count} of {total} records: it had NaN or inf."
    absent = Counter(int(i) for i in np.nonzero(~run.present)[1]) if run.finite else Counter()
    for group, count in sorted(absent.items()):
        yield (
            f"Group {group} had a gradient of exactly zero in {count} of {total} records. "
            "It ran out of data, or its loss does not reach the parameters."
        )
    for status, count in run.statuses.items():
        if status not in _ORDINARY:
            yield f'In {count} of {total} records the status was "{status}".'


def _outliers(run: Run) -> Iterator[str]:
    for group in run.outliers:
        found, typical = run.mean_cosine[group], np.nanmedian(run.mean_cosine)
        yield (
            f"Group {group} is an outlier: the cosine of its gradient to the sum of the others' is "
            f"{found:.2f} on average, and {typical:.2f} for the median group. Look at its data and "
            "labels first."
        )


def _lengths(run: Run) -> Iterator[str]:
    logs = np.log(run.norms, out=np.full_like(run.norms, np.nan), where=run.present)
    for group, deviation in standing_out(logs).items():
        if abs(deviation) > math.log(2):
            times = math.exp(abs(deviation))
            way = "long" if deviation > 0 else "short"
            why = (
                "Its loss is larger: other data, wrong labels, or a loss that is summed and not "
                "averaged. In a mean it counts for more than the others."
                if deviation > 0
                else "It fits its data already, or its loss is scaled down. Min-norm gives it a "
                "large weight."
            )
            yield f"Group {group}'s gradient is {times:.1f} times as {way} as the median one. {why}"


def _pairs(run: Run) -> Iterator[str]:
    if not run.opposed_pairs:
        return
    shown = [
        f"{i} and {j} (cosine {value:.2f} on average, negative in "
        f"{_percent(np.nanmean(run.cosines[:, i, j] < 0))} of the records)"
        for value, i, j in run.opposed_pairs[:4]
    ]
    more = len(run.opposed_pairs) - len(shown)
    rest = f", and {_count(more, 'more pair')}" if more else ""
    yield (
        f"These groups pull against each other: {'; '.join(shown)}"
        f"{rest}. Their data ask for different "
        "things."
    )


def _conflicts(run: Run) -> Iterator[str]:
    mean, grain = opposed(run.finite, "conflicts_mean"), opposed(run.grain, "conflicts_aggregate")
    early, late = run.thirds()
    if not mean.any():
        yield "The mean never pointed against a group: no conflict here that GRAIN could cure."
        return
    was, did = (
        ("would have pointed", "opposed") if run.min_norm else ("pointed", "would have opposed")
    )
    rest = (
        f"one in {_percent((grain > 0).mean())} of them" if grain.any() else "none in any of them"
    )
    yield (
        f"The mean {was} against at least one group in {_percent((mean > 0).mean())} of the "
        f"records (early {_percent((mean[early] > 0).mean())}, late "
        f"{_percent((mean[late] > 0).mean())}). "
        f"GRAIN {did} {rest}."
    )


def _grain(run: Run) -> Iterator[str]:
    was = "was" if run.min_norm else "would have been"
    mean, grain = norms_of(run)
    if mean.any():
        ratio = float(np.median(grain[mean > 0] / mean[mean > 0]))
        yield (
            f"GRAIN's step {was} {ratio:.2f} times as long as the mean's (median). Under SGD that "
            "acts like a smaller learning rate: compare the two with a rate tuned for each."
        )
    weights = grain_weights(run).mean(0)
    fair = 1 / run.n
    top, low = int(weights.argmax()), int(weights.argmin())
    if weights[top] > 1.5 * fair or weights[low] < 0.5 * fair:
        yield (
            f"GRAIN's weights {'are' if run.min_norm else 'would be'} uneven over the whole run: "
            f"{weights[top]:.2f} for group {top} and {weights[low]:.2f} for group {low} on "
            f"average, where the mean gives {fair:.2f}. It favours short gradients, of data that "
            "the model fits already."
        )
    zero = sum(not run_weights.norm_aggregate > 0 for run_weights in run.grain)
    if not run.min_norm and zero:
        yield (
            f"In {zero} of {len(run.grain)} records GRAIN would not have moved at all: the groups "
            "have no common direction. Average more examples per group, or set a cap."
        )


def _noise(run: Run, batch: int | None) -> Iterator[str]:
    early, late = (run.noise_scale(part) for part in run.thirds())
    one = f"batches of one group ({batch} examples)" if batch else "batches of one group"
    differ = run.outliers or run.opposed_pairs
    caveat = " What sets groups apart, see above, counts as noise here." if differ else ""
    if not math.isfinite(late):
        yield (
            "Late in the run the gradient noise scale is too large to tell: the mean gradient is "
            f"lost in noise, far more than the {run.n} {one} of a step average out. A larger "
            f"batch would cut the number of steps.{caveat}"
        )
        return
    examples = f", {late * batch:.3g} examples" if batch else ""
    if late > 2 * run.n:
        verdict = "Most of the step is noise: a larger batch would cut the number of steps"
    elif late < run.n / 2:
        verdict = (
            "The batch is larger than it needs to be: a smaller one would take little more steps"
        )
    else:
        verdict = "The batch is about as large as is useful"
    start = f"{early:.3g}" if math.isfinite(early) else "too large to tell"
    yield (
        f"The gradient noise scale is {late:.3g} {one}{examples} late in the run (early: {start}); "
        f"a step uses {run.n}. {verdict}.{caveat}"
    )


def _numbers(run: Run) -> Iterator[str]:
    early, late = run.thirds()
    mean, grain = norms_of(run)
    by_mean = opposed(run.finite, "conflicts_mean")
    by_grain = opposed(run.grain, "conflicts_aggregate")
    weights = grain_weights(run)
    name = "GRAIN" if run.min_norm else "GRAIN, if it had been in charge"
    rows = {
        "norm of a group's gradient, median": [np.median(run.norms[p]) for p in (early, late)],
        "norm of the mean": [np.median(mean[p]) for p in (early, late)],
        f"norm of {name}": [np.median(grain[p]) for p in (early, late)],
        "groups opposed by the mean": [by_mean[p].mean() for p in (early, late)],
        f"groups opposed by {name}": [by_grain[p].mean() for p in (early, late)],
        f"largest weight of {name}": [weights[p].max(1).mean() for p in (early, late)],
        "noise scale, batches of one group": [run.noise_scale(p) for p in (early, late)],
        "duality gap over mean squared norm, largest": [run.gaps[p].max() for p in (early, late)],
    }
    yield f"{'':52}{'early':>10}{'late':>10}"
    for label, (first, last) in rows.items():
        yield f"{label:52}{first:10.3g}{last:10.3g}"
    yield "(early, late: the first and the last third of the records)"


def opposed(records: Iterable[StepRecord], name: str) -> Array:
    """[T]: how many groups the mean or the aggregate opposes."""
    return np.array([getattr(r, name) for r in records], dtype=np.float64)


def norms_of(run: Run) -> tuple[Array, Array]:
    """Of the mean and of GRAIN, [T] each."""
    return (
        np.array([r.norm_mean for r in run.finite]),
        np.array([r.norm_aggregate for r in run.grain]),
    )


def grain_weights(run: Run) -> Array:
    """[T, n]: those that GRAIN gave, or would have given."""
    return run.weights if run.min_norm else np.array([r.weights for r in run.grain])


def _percent(share: Any) -> str:
    return f"{100 * float(share):.0f} %"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
