"""The plan in tables, in a picture and in a sentence: what to take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from grain_ddp._tools import output
from grain_ddp._tools.cost import SCOPES, Choice, Job, cost, overhead, watching
from grain_ddp._tools.network import Cluster
from grain_ddp._tools.quantities import bytes_words, count_words, overhead_words, seconds_words

GROWTH = tuple(2**k for k in range(1, 15))
"""Numbers of ranks in tables and pictures: up to 16,384."""

KINDS = {"ddp": "DDP", "zero1": "ZeRO 1", "zero2": "ZeRO 2", "zero3": "ZeRO 3", "fsdp": "FSDP2"}

_COLUMNS = """step: seconds of one optimizer step. overhead: how much longer than plain averaging.
sent per rank, out of a host: bytes of gradient in a step that leave a rank, and a host.
memory: of a rank, beyond plain averaging's. solve: seconds in the solver, part of the step."""


OFFERED: dict[str, tuple[tuple[str, ...], bool]] = {
    "ddp": (SCOPES, True),
    "zero1": (SCOPES, False),
    "zero2": (SCOPES, False),
    "zero3": (SCOPES, False),
    "fsdp": (("bucket",), False),
}
"""What each integration does: its scopes, and whether groups of several ranks save it bytes without
a sketch; with one all have them."""

SKETCH = 1 << 20
"""The size of the sketch that is offered."""


def sizes(cluster: Cluster, job: Job, ranks: int) -> Iterator[int]:
    """Ranks in a group, finest first, as long as there are more than two groups.

    Two rows of about the same length are weighed nearly equally: nearly the mean.
    """
    size = 1
    while size * 2 < ranks or size == 1 < ranks:
        if ranks % size == 0:
            yield size
        size = cluster.per_host if size == 1 < cluster.per_host else size * 4


def choices(cluster: Cluster, job: Job, ranks: int) -> Iterator[Choice]:
    """What can be chosen, the paper's method first: finer groups, then global, then own dtype."""
    scopes, saves = OFFERED[job.kind]
    for size in sizes(cluster, job, ranks):
        for scope in scopes if saves or size == 1 else ():
            for itemsize in (None, 2) if job.itemsize > 2 else (None,):
                yield Choice(scope, size, itemsize)
        for scope in scopes:
            yield Choice(scope, size, sketch=SKETCH)


def recommend(cluster: Cluster, job: Job, ranks: int, budget: float) -> str:
    """A sentence or two: the finest groups and the first scope within the budget of overhead."""
    options = list(choices(cluster, job, ranks))
    if not options:
        return "Alone: there is nothing to aggregate, and nothing to pay."
    options = [choice for choice in options if _fits(cluster, job, ranks, choice)] or options
    found = {choice: overhead(cluster, job, ranks, choice) for choice in options}
    own = [choice for choice in options if choice.itemsize is None]
    within = [choice for choice in own if found[choice] <= budget]
    within = within or [choice for choice in options if found[choice] <= budget]
    best = within[0] if within else min(options, key=lambda choice: found[choice])
    parts = [f'scope="{best.scope}"', f"groups={_groups(best, cluster)}"]
    if best.itemsize:
        parts.append("wire_dtype=torch.bfloat16")
    if best.sketch:
        parts.append("sketch=2**20")
    said = f"Take {', '.join(parts)}: {overhead_words(found[best])} over plain averaging, "
    said += "within" if within else "the least there is, and more than"
    said += f" the {100 * budget:g} % allowed."
    if best != own[0]:
        method = ", the paper's method," if own[0].scope == "global" else ""
        said += (
            f' scope="{own[0].scope}" with groups="rank"{method} would cost '
            f"{overhead_words(found[own[0]])}."
        )
        if best.group > 1:
            here, there = (cost(cluster, job, ranks, choice) for choice in (own[0], best))
            rows = ranks // best.group
            said += (
                f" Groups of {best.group} make {rows} rows out of {ranks}: as many messages per "
                f"bucket, and {seconds_words(cluster.solve(rows))} to solve instead of "
                f"{seconds_words(cluster.solve(ranks))}"
            )
            if here.out > 1.01 * there.out:
                less, more = bytes_words(there.out), bytes_words(here.out)
                said += f"; {less} leave a host per step instead of {more}"
            said += "."
    narrow = replace(best, itemsize=2)
    if narrow in found and found[narrow] < found[best] - 0.01:
        said += f" With wire_dtype=torch.bfloat16 it would be {overhead_words(found[narrow])}."
    if not within:
        said += _nothing_within(cluster, job, ranks)
    return said


def _nothing_within(cluster: Cluster, job: Job, ranks: int) -> str:
    coarse = ranks // 2
    said = ""
    if ranks > 2 and ranks % 2 == 0 and coarse >= cluster.per_host:
        said += (
            f" Groups of {coarse} would make two rows, whose weights are nearly the mean's: they "
            "are not offered."
        )
    return (
        f'{said} To watch only, with weighting="mean" and record_every=10, costs '
        f"{overhead_words(watching(cluster, job, ranks) / 10)}."
    )


def _fits(cluster: Cluster, job: Job, ranks: int, choice: Choice) -> bool:
    """Whether a GPU has the memory, where that is known; what activations take is not."""
    needed = job.states(ranks) + cost(cluster, job, ranks, choice).memory
    return cluster.capacity is None or needed <= cluster.capacity


def _too_large(cluster: Cluster, job: Job, ranks: int) -> Iterator[str]:
    """A sentence if parameters, gradients and Adam's states are more than a GPU has."""
    needed = job.states(ranks)
    if cluster.capacity is None or needed <= cluster.capacity:
        return
    said = (
        f"It does not fit: parameters, gradients and Adam's states take {bytes_words(needed)} of a "
        f"GPU with {KINDS[job.kind]}, before any activation, and it has "
        f"{bytes_words(cluster.capacity)}."
    )
    others = (replace(job, kind=kind) for kind in ("zero1", "zero2", "zero3"))
    fits = next((j for j in others if j.states(ranks) <= cluster.capacity), None)
    if fits:
        flag = f"--zero {fits.kind[-1]}" + " or --fsdp" * (fits.kind == "zero3")
        said += f" With {flag} it takes {bytes_words(fits.states(ranks))}."
    elif job.sharded == 3:
        enough = -(-job.states(1) // cluster.capacity)
        said += f" That takes more than {enough:,.0f} of them."
    yield said + "\n"


def _ranks(cluster: Cluster) -> str:
    return "GPUs" if cluster.gpu else "ranks"


def _groups(choice: Choice, cluster: Cluster) -> str:
    if choice.group == 1:
        return '"rank"'
    return '"node"' if choice.group == cluster.per_host else str(choice.group)


def report(cluster: Cluster, job: Job, ranks: int, budget: float) -> str:
    """Tables and a recommendation, as Markdown."""
    plain = cost(cluster, job, ranks)
    half = "reduce-scatter" if job.sharded else "all-reduce"
    hosts = -(-ranks // cluster.per_host)
    lines = [
        *_too_large(cluster, job, ranks),
        f"{count_words(job.parameters)} parameters, {ranks} {_ranks(cluster)} on {hosts} host"
        f"{'s' if hosts > 1 else ''}, {KINDS[job.kind]}, "
        f"{job.buckets} buckets of {bytes_words(job.size / job.buckets)}, "
        f"{seconds_words(job.compute)} of computing per step.",
        "",
        "| scope, groups | step | overhead | sent per rank | out of a host | memory | solve |",
        "|---|---|---|---|---|---|---|",
        f"| plain {half} | {seconds_words(plain.seconds)} | | {bytes_words(plain.sent)} | "
        f"{bytes_words(plain.out)} | | |",
    ]
    for choice in choices(cluster, job, ranks):
        found = cost(cluster, job, ranks, choice)
        memory = bytes_words(found.memory)
        memory += "" if _fits(cluster, job, ranks, choice) else ", does not fit"
        lines.append(
            f"| {choice.name(cluster.per_host)} | {seconds_words(found.seconds)} | "
            f"{overhead_words(found.seconds / plain.seconds - 1)} | {bytes_words(found.sent)} | "
            f"{bytes_words(found.out)} | {memory} | "
            f"{seconds_words(found.solve)} |"
        )
    lines += ["", _COLUMNS]
    curves = growth(cluster, job, ranks)
    sizes = sorted({n for curve in curves.values() for n in curve})
    if sizes:
        lines += [
            "",
            "Overhead as the cluster grows, where there are three groups or more:",
            "",
            f"| {_ranks(cluster)} | {' | '.join(curves)} |",
        ]
        lines += ["|---" * (len(curves) + 1) + "|"]
        for n in sizes:
            cells = (overhead_words(curve[n]) if n in curve else "" for curve in curves.values())
            lines.append(f"| {n} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", recommend(cluster, job, ranks, budget)])


def growth(cluster: Cluster, job: Job, ranks: int) -> dict[str, dict[int, float]]:
    """Overhead by number of GPUs for the groupings that matter, up to 16,384 or that many ranks.

    Sizes that do not fill hosts, and links that were not measured, are left out.
    """
    k = cluster.per_host
    scopes, saves = OFFERED[job.kind]
    sizes = sorted({1, k, 16 * k})
    kinds = [Choice(scope, g) for g in (sizes if saves else [1]) for scope in scopes]
    kinds += [Choice("bucket", g, sketch=SKETCH) for g in sizes]
    curves: dict[str, dict[int, float]] = {}
    for choice in kinds:
        for n in sorted({*GROWTH, ranks}):
            if n > k and (cluster.far is None or n % k):
                continue
            if n % choice.group == 0 and n // choice.group > (1 if choice.group == 1 else 2):
                name = choice.name(k)
                curves.setdefault(name, {})[n] = overhead(cluster, job, n, choice)
    return curves


def draw(cluster: Cluster, job: Job, ranks: int, path: Path) -> None:
    """Draw the overhead against the number of GPUs; a .png carries its figures, as text.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the file's ending is not that of a picture, or it cannot be written.
    """
    figure = output.canvas(path, (9, 5))
    axis = figure.subplots()
    colors = iter(("tab:red", "tab:blue", "tab:green"))
    color: dict[str, str] = {}  # by groups
    curves = growth(cluster, job, ranks)
    for name, curve in curves.items():
        scope, groups, *sketch = name.split(", ")
        color[groups] = color.get(groups) or next(colors)
        axis.plot(
            list(curve),
            [100 * max(value, 1e-3) for value in curve.values()],
            color=color[groups],
            ls=":" if sketch else "--" if scope == "bucket" else "-",
            marker="o",
            ms=4,
            label=name,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(1, 1000)  # what is off the top is out of the question
    axis.set(xlabel=_ranks(cluster), ylabel="% longer than plain averaging")
    axis.set_title(
        f"{count_words(job.parameters)} parameters, {KINDS[job.kind]}, "
        f"{cluster.per_host} {_ranks(cluster)} per host"
    )
    axis.grid(alpha=0.3)
    axis.legend(title="scope, groups", loc="upper left", bbox_to_anchor=(1.01, 1))
    output.save(figure, path, figures(curves))


def figures(curves: dict[str, dict[int, float]]) -> str:
    """What a picture shows, as JSON: percents, by curve and number of GPUs."""
    rounded = {
        name: {str(n): float(f"{100 * value:.4g}") for n, value in curve.items()}
        for name, curve in curves.items()
    }
    return json.dumps(rounded)
