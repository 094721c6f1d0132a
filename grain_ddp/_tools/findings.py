"""What a run's records say, in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from grain_ddp._math.record import Array
from grain_ddp._math.suspect import WHAT
from grain_ddp._tools.dominance import HEAVY, MANY, SHORT, ruled
from grain_ddp._tools.history import FEWEST, ORDINARY, SOLVED, Run, parts_of, standing_out
from grain_ddp._tools.quantities import percent, shown

BAD, LOOK, FINE, UNKNOWN = "bad", "look", "fine", "unknown"
"""How it is with a run: something is wrong; look at it; nothing stands out; nobody can say."""

OFTEN = 0.1
"""A share of the records from which on something is worth a look."""


@dataclass(frozen=True)
class Finding:
    """What a person should notice.

    topic: which evidence belongs to it, a key of `grain_ddp._tools.panels.TOPICS`.
    text: a sentence or a few.
    level: `BAD`, `LOOK` or `FINE`; None: to know, and no matter of good or bad.
    headline: the same in a few words, of what is `BAD` or to `LOOK` at.
    """

    topic: str
    text: str
    level: str | None = None
    headline: str = ""


def opening(run: Run) -> str:
    """What was read."""
    rules = " and ".join(sorted(run.rules or {"GRAIN"}))
    watching = "" if "GRAIN" in rules else "; GRAIN was watching only"
    thinned = f" Of the finite ones every {run.every}th is counted." if run.every > 1 else ""
    return (
        f"{count(run.records, 'record')}, steps {run.first} to {run.last}, "
        f"{count(run.n, 'group')}. The steps were those of {rules}{watching}.{thinned}"
    )


def verdict(run: Run, found: list[Finding]) -> tuple[str, str]:
    """How it is with the run, and why, in a line."""
    for level in (BAD, LOOK):
        said = [finding.headline for finding in found if finding.level == level]
        if said:
            more = f", and {len(said) - 2} more" if len(said) > 2 else ""
            return level, "; ".join(said[:2]) + more
    if len(run.steps) < FEWEST:
        return UNKNOWN, f"Too early to tell: {count(len(run.steps), 'record')} of {FEWEST}"
    if run.n == 1:
        return UNKNOWN, "One group only: nothing to compare"
    return FINE, "Nothing stands out"


def summary(run: Run, batch: int | None = None) -> str:
    """The report in words. ``batch``: examples in one group's batch, if the caller knows."""
    found = list(findings(run, batch))
    lines = [opening(run), "", f"Verdict: {verdict(run, found)[1]}.", "", "What stands out"]
    lines += [f"- {finding.text}" for finding in found]
    if len(run.steps):
        lines += ["", f"{'':52}{'early':>10}{'late':>10}"]
        lines += [f"{name:52}{a:>10}{b:>10}" for name, (a, b) in numbers(run).items()]
        lines += ["(early, late: the first and the last third of the records)"]
    return "\n".join(lines)


def findings(run: Run, batch: int | None = None) -> Iterator[Finding]:
    """What a person should notice, the most urgent first."""
    yield from _suspects(run)
    yield from _broken(run)
    if not len(run.steps):
        return
    if run.n == 1:
        yield Finding(
            "records", "There is one group only: nothing to weigh, and nothing to compare."
        )
        return
    if len(run.steps) < FEWEST:
        yield Finding(
            "records",
            f"{count(len(run.steps), 'record')} with finite gradients: too few to judge a run by. "
            f"Come back when there are {FEWEST}.",
        )
        return
    yield from _outliers(run)
    yield from _lengths(run)
    yield from _pairs(run)
    yield from _conflicts(run)
    yield from _grain(run)
    yield from _noise(run, batch)


def _suspects(run: Run) -> Iterator[Finding]:
    """The ranks that the guard named, the most often named first."""
    for rank, times in Counter(suspect.rank for suspect in run.suspects).most_common():
        found = [suspect for suspect in run.suspects if suspect.rank == rank]
        kinds = [f"{WHAT.get(k, k)} ({many} x)" for k, many in _counted(s.kind for s in found)]
        places = [place for place, _ in _counted(f"{s.device} of {s.host}" for s in found)]
        tensors = [name for name, _ in _counted(s.tensor for s in found if s.tensor)]
        shown = f", most often in {tensors[0]}" if tensors else ""
        first, last = found[0].step, found[-1].step
        steps = f"step {first}" if times == 1 else f"steps {first} to {last}"
        yield Finding(
            "records",
            f"Rank {rank} ({', '.join(places)}) is suspect: {count(times, 'time')}, at {steps}, it "
            f"{'; it '.join(kinds)}{shown}. Look at its data of these steps, and run "
            "grain_ddp.replay or the vendor's diagnosis on its machine.",
            BAD,
            f"Rank {rank} is suspect",
        )


def _counted(values: Iterable[Any]) -> list[tuple[Any, int]]:
    return Counter(values).most_common()


def _broken(run: Run) -> Iterator[Finding]:
    total = run.records
    if run.left_out:
        yield Finding(
            "records",
            f"The number of groups changed: the {count(run.left_out, 'record')} before step "
            f"{run.first} had another one, and are left out here.",
        )
    if run.finite < total:
        many = total - run.finite
        yield Finding(
            "records",
            f"{many} of {total} records have a gradient with NaN or inf, and are left out of all "
            "that follows. Expected now and then with a loss scaler; else look for a diverging "
            "loss.",
            LOOK if many > OFTEN * total else None,
            f"{percent(many / total)} of the records have NaN or inf",
        )
    for group, times in sorted(run.dropped.items()):
        yield Finding(
            "records",
            f"{run.name(group)} was dropped in {times} of {total} records: it had NaN or inf.",
            LOOK,
            f"{run.name(group)} was dropped",
        )
    absent = Counter[int]()
    if len(run.steps) and run.labels is None:  # else a step need not have a batch of each
        absent.update(np.nonzero(~run.present)[1].tolist())
    for group, times in sorted(absent.items()):
        yield Finding(
            "records",
            f"{run.name(group)} had a gradient of exactly zero in {times} of {total} records. "
            "It ran out of data, or its loss does not reach the parameters.",
            LOOK if times > OFTEN * total else None,
            f"{run.name(group)} often has no gradient",
        )
    for status, times in run.statuses.items():
        if status not in ORDINARY:
            yield Finding("records", f'In {times} of {total} records the status was "{status}".')


def _outliers(run: Run) -> Iterator[Finding]:
    for group in run.outliers:
        found, typical = run.mean_cosine[group], np.nanmedian(run.mean_cosine)
        yield Finding(
            "direction",
            f"{run.name(group)} is an outlier: the cosine of its gradient to the sum of the "
            f"others' is {found:.2f} on average, and {typical:.2f} for the median group. Look at "
            "its data and labels first.",
            BAD,
            f"{run.name(group)} is an outlier",
        )


def _lengths(run: Run) -> Iterator[Finding]:
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
            said = f"{run.name(group)}'s gradient is {times:.1f} times as {way} as the median one"
            yield Finding("length", f"{said}. {why}", LOOK, said)


def _pairs(run: Run) -> Iterator[Finding]:
    if not run.opposed_pairs:
        return
    shown = [
        f"{i} and {j} (cosine {value:.2f} on average, negative in {percent(share)} of the records)"
        for value, share, i, j in run.opposed_pairs[:4]
    ]
    more = len(run.opposed_pairs) - len(shown)
    rest = f", and {count(more, 'more pair')}" if more else ""
    pairs = count(len(run.opposed_pairs), "pair")
    yield Finding(
        "pairs",
        f"These groups pull against each other: {'; '.join(shown)}{rest}. Their data ask for "
        "different things.",
        LOOK,
        f"{pairs} of groups pull{'s' * (len(run.opposed_pairs) == 1)} against each other",
    )


def _conflicts(run: Run) -> Iterator[Finding]:
    mean, grain = run.opposed > 0, run.grain.opposed > 0
    if not mean.any():
        yield Finding(
            "conflicts",
            "The mean never pointed against a group: no conflict here that GRAIN could cure.",
            FINE,
        )
        return
    was, did = (
        ("would have pointed", "opposed") if run.min_norm else ("pointed", "would have opposed")
    )
    early, late = (mean[part].mean() for part in run.thirds())
    rest = f"one in {percent(grain.mean())} of them" if grain.any() else "none in any of them"
    yield Finding(
        "conflicts",
        f"The mean {was} against at least one group in {percent(mean.mean())} of the records "
        f"(early {percent(early)}, late {percent(late)}). GRAIN {did} {rest}.",
        LOOK if mean.mean() >= OFTEN else None,
        f"The mean {was} against a group in {percent(mean.mean())} of the records",
    )


def _grain(run: Run) -> Iterator[Finding]:
    was = "was" if run.min_norm else "would have been"
    grain, mean = run.grain, run.norm_mean[run.grain.at]
    if mean.any():
        ratio = float(np.median(grain.norms[mean > 0] / mean[mean > 0]))
        yield Finding(
            "length",
            f"GRAIN's step {was} {ratio:.2f} times as long as the mean's (median). Under SGD that "
            "acts like a smaller learning rate: compare the two with a rate tuned for each.",
        )
    weights = grain.weights.mean(0)
    fair = 1 / run.n
    top, low = int(weights.argmax()), int(weights.argmin())
    if weights[top] > 1.5 * fair or weights[low] < 0.5 * fair:
        yield Finding(
            "weights",
            f"GRAIN's weights {'are' if run.min_norm else 'would be'} uneven over the whole run: "
            f"{weights[top]:.2g} for {run.name(top)} and {weights[low]:.2g} for {run.name(low)} "
            f"on average, where the mean gives {fair:.2g}. It favours short gradients, of data "
            "that the model fits already.",
        )
    if ruled(run) >= MANY:
        had = "had" if run.min_norm else "would have had"
        said = f"one group {had} more than {HEAVY} of GRAIN's weight, or the step {was} shorter"
        yield Finding(
            "weights",
            f"In {percent(ruled(run))} of the records {said} than {SHORT} of the mean's: one group "
            "all but decides. Trainings like that did worse than the mean's more often than better "
            '(documentation, "Does it help?"). Set cap=1.5, or weighting="upgrad", which stays as '
            "long as the mean where nothing conflicts; or stay with the mean.",
            LOOK if run.min_norm else None,
            "One group all but decides GRAIN's step",
        )
    zero = int((~(grain.norms > 0)).sum())
    if not run.min_norm and zero:
        yield Finding(
            "conflicts",
            f"In {zero} of {len(grain.at)} records GRAIN would not have moved at all: the groups "
            "have no common direction. Average more examples per group, or set a cap.",
        )
    if len(grain.at) < len(run.steps):
        yield Finding(
            "weights", f"What GRAIN would have done is from {SOLVED} records, evenly over the run."
        )


def _noise(run: Run, batch: int | None) -> Iterator[Finding]:
    early, late = (run.noise_scale(part) for part in run.thirds())
    one = f"batches of one group ({batch} examples)" if batch else "batches of one group"
    differ = run.outliers or run.opposed_pairs
    caveat = " What sets groups apart, see above, counts as noise here." if differ else ""
    caveat += (
        " This number is a poor guide to the critical batch size (arXiv 2505.23971): take it for a "
        "hint, and try."
    )
    if not math.isfinite(late):
        yield Finding(
            "noise",
            "Late in the run the gradient noise scale is too large to tell: the mean gradient is "
            f"lost in noise, far more than the {run.n} {one} of a step average out. A larger "
            f"batch may cut the number of steps.{caveat}",
        )
        return
    examples = f", {late * batch:.3g} examples" if batch else ""
    if late > 2 * run.n:
        said = "Most of the step is noise: a larger batch may cut the number of steps"
    elif late < run.n / 2:
        said = "The batch may be larger than it needs to be: a smaller one could do as well"
    else:
        said = "The batch is about as large as that suggests"
    start = f"{early:.3g}" if math.isfinite(early) else "too large to tell"
    yield Finding(
        "noise",
        f"The gradient noise scale is {late:.3g} {one}{examples} late in the run (early: {start}); "
        f"a step uses {run.n}. {said}.{caveat}",
    )


def numbers(run: Run) -> dict[str, tuple[str, str]]:
    """Early and late, by name."""
    parts, total, grain = run.thirds(), len(run.steps), run.grain
    name = "GRAIN" if run.min_norm else "GRAIN, if it had been in charge"

    def both(values: Array, reduced: Any) -> tuple[str, str]:
        early, late = (shown(reduced(values[part])) for part in parts)
        return early, late

    def of_grain(values: Array, reduced: Any) -> tuple[str, str]:
        early, late = (shown(reduced(v)) for v in parts_of(values, grain.at, total, parts))
        return early, late

    return {
        "norm of a group's gradient, median": both(run.norms, np.median),
        "norm of the mean": both(run.norm_mean, np.median),
        f"norm of {name}": of_grain(grain.norms, np.median),
        "groups opposed by the mean": both(run.opposed, np.mean),
        f"groups opposed by {name}": of_grain(grain.opposed, np.mean),
        f"largest weight of {name}": of_grain(grain.weights.max(1), np.mean),
        "noise scale, batches of one group": (
            shown(run.noise_scale(parts[0])),
            shown(run.noise_scale(parts[1])),
        ),
        "duality gap over mean squared norm, largest": both(run.gaps, np.max),
    }


def count(number: int, what: str) -> str:
    """Of 2, "record": "2 records"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
