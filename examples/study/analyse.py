"""Tables and pictures from results/: the statistics are those of protocol.md.

    python examples/study/analyse.py    # fills the pages' tables, draws docs/images/study-*.png

A page has its tables between ``<!-- results: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from grain_ddp._tools.dominance import MANY

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs/does-it-help.md", ROOT / "docs/benchmarks/study.md"]

Block = tuple[str, int, int, str]  # task, workers, batch per worker, optimizer
Line = dict[str, Any]
Settings = dict[str, dict[str, Line]]  # by setting and method

DIGITS, MINILM = ("digits", 8, 4, "sgd"), ("minilm", 8, 4, "adamw")
DIABETES = ("diabetes", 8, 4, "sgd")
TASKS = {"digits": "digits", "minilm": "MiniLM", "diabetes": "diabetes, R² × 100"}
SETTINGS = {
    "clean": "clean",
    "wrong labels": "30 % wrong labels",
    "heavy tails": "heavy-tailed targets",
    "bad worker": "one worker's labels permuted",
    "flipped worker": "one worker sends −g",
    "by class": "shards sorted by class",
    "minority domain": "one worker has another domain",
    "long-tailed": "rare classes",
}
METHODS = {
    "min_norm": "`min_norm`",
    "cap 2": "`cap=2`",
    "cap 1.5": "`cap=1.5`",
    "normalize": "`normalize`",
    "upgrad": "`upgrad`",
    "multi-krum": "`multi_krum`",
    "robust loss": "mean, robust loss",
    "cap 2, robust loss": "`cap=2`, robust loss",
    "early": "mean, early stopping",
}


def read() -> dict[Block, Settings]:
    """Lines by block, setting and method; in points (accuracy and R² × 100)."""
    found: dict[Block, Settings] = {}
    for path in sorted((HERE / "results").glob("*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            cell = line["cell"]
            block = cell["task"], cell["workers"], cell["batch"], cell["optimizer"]
            for name in ("test", "worst", "early", "one split"):
                if name in line:
                    line[name] = 100 * np.array(line[name])
            found.setdefault(block, {}).setdefault(cell["setting"], {})[cell["method"]] = line
    for settings in found.values():
        for methods in settings.values():
            mean = methods["mean"]
            methods["early"] = {**mean, "test": mean["early"], "one split": None}
    return found


# --- statistics ---------------------------------------------------------------------------------


def paired(line: Line, mean: Line, name: str = "test") -> tuple[float, float, float]:
    """Difference from the mean, half its 95 % interval, and p; two seeds of a split are one."""
    differences = (line[name] - mean[name]).reshape(-1, 2).mean(1)
    error = differences.std(ddof=1) / len(differences) ** 0.5
    if error == 0:
        return float(differences.mean()), 0.0, 1.0
    freedom = len(differences) - 1
    p = 2 * stats.t.sf(abs(differences.mean()) / error, freedom)
    return float(differences.mean()), float(stats.t.ppf(0.975, freedom) * error), float(p)


def holm(ps: list[float]) -> list[float]:
    """Adjusted p values (Holm 1979)."""
    order = np.argsort(ps)
    factors = len(ps) - np.arange(len(ps))
    adjusted = np.maximum.accumulate(np.minimum(np.array(ps)[order] * factors, 1))
    return [float(v) for v in adjusted[np.argsort(order)]]


def compared(settings: Settings, method: str, name: str = "test") -> dict[str, str]:
    """By setting: the difference from the mean ± half its interval, bold if Holm's p < 0.05."""
    there = {s: m for s, m in settings.items() if method in m}
    results = [paired(m[method], m["mean"], name) for m in there.values()]
    sure = holm([p for _, _, p in results])
    texts = dict.fromkeys(settings, "")
    for setting, (difference, half, _), p in zip(there, results, sure, strict=True):
        text = f"{signed(difference)} ± {half:.1f}"
        texts[setting] = f"**{text}**" if p < 0.05 else text
    return texts


def signed(value: float) -> str:
    return f"{value + 0.0:+.1f}".replace("-0.0", "+0.0").replace("-", "−")


# --- tables -------------------------------------------------------------------------------------


def rows_of(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def situations(
    found: dict[Block, Settings], blocks: list[Block], methods: list[str], only: Any = SETTINGS
) -> str:
    """Rows are settings, columns methods."""
    rows = []
    for block in blocks:
        settings = found[block]
        columns = [compared(settings, method) for method in methods]
        for setting in (s for s in SETTINGS if s in settings and s in only):
            mean = settings[setting]["mean"]["test"].mean()
            row = [f"{TASKS[block[0]]}: {SETTINGS[setting]}", f"{mean:.1f}".replace("-", "−")]
            rows.append(row + [column[setting] for column in columns])
    return rows_of(["data", "mean", *(METHODS[m] for m in methods)], rows)


def worst(found: dict[Block, Settings]) -> str:
    """The worst class or domain, beside the average of `situations`."""
    methods = ["min_norm", "cap 2", "upgrad", "robust loss"]
    settings = found[DIGITS]
    columns = [compared(settings, method, "worst") for method in methods]
    rows = []
    for setting in (s for s in SETTINGS if s in settings):
        mean = settings[setting]["mean"]["worst"].mean()
        rows.append([SETTINGS[setting], f"{mean:.1f}", *(c[setting] for c in columns)])
    return rows_of(["digits, worst class or domain", "mean", *(METHODS[m] for m in methods)], rows)


def monitor(found: dict[Block, Settings]) -> str:
    """What the reports of the mean's trainings say, and what came of min-norm."""
    rows = []
    for block, setting, seen in watched():
        if block not in (DIGITS, MINILM, DIABETES):
            continue
        least = compared(found[block], "min_norm")[setting]
        shares = [f"{100 * seen[n]:.0f} %" for n in ("ruled", "pairs", "outlier", "length")]
        rows.append([f"{TASKS[block[0]]}: {SETTINGS[setting]}", *shares, least])
    header = ["data", "one group all but decides (share of records)"]
    header += [f"{what} (share of runs)" for what in ("pairs that oppose", "an outlier")]
    header += ["a length that stands out (share of runs)", "`min_norm`, points"]
    return rows_of(header, rows)


def limit(found: dict[Block, Settings]) -> str:
    """How min-norm fared on both sides of the report's limit, in classification."""
    counts = np.zeros((2, 2, 3), int)  # [below or not, before or after, lost, neither, won]
    for block, setting, seen in watched():
        methods = found[block][setting]
        if block[0] == "diabetes" or "min_norm" not in methods:
            continue
        difference, half, _ = paired(methods["min_norm"], methods["mean"])
        outcome = 1 + int(np.sign(difference)) * (abs(difference) > half)
        counts[int(seen["ruled"] < MANY), int(block not in (DIGITS, MINILM)), outcome] += 1
    names = ["in a third of the records or more", "in fewer"]
    words = [[" / ".join(map(str, cell)) for cell in row] for row in counts]
    header = ["one group all but decides", "limit set from these: lost / neither / won"]
    header.append("watched later: lost / neither / won")
    return rows_of(header, [[name, *row] for name, row in zip(names, words, strict=True)])


def watched() -> list[tuple[Block, str, dict[str, float]]]:
    found = []
    for entry in json.loads((HERE / "results" / "watched.json").read_text()):
        cell = entry["cell"]
        block = cell["task"], cell["workers"], cell["batch"], cell["optimizer"]
        found.append((block, cell["setting"], entry))
    return found


def through_ddp() -> str:
    """The real hook's accuracies beside the simulated ones."""
    rows = []
    for entry in json.loads((HERE / "results" / "through_ddp.json").read_text()):
        real, simulated = (np.array(entry[name]) for name in ("through ddp", "simulated"))
        row = [entry["cell"]["method"], str(len(real)), f"{100 * real.mean():.2f}"]
        rows.append(
            [*row, f"{100 * simulated.mean():.2f}", f"{100 * abs(real - simulated).max():.2f}"]
        )
    return rows_of(["method", "seeds", "through DDP", "simulated", "largest difference"], rows)


def theory() -> str:
    found = json.loads((HERE / "results" / "theory.json").read_text())
    steps = found.pop("steps")
    rows = []
    for method, seen in found.items():
        squares = " / ".join(f"{v:.2f}" for v in seen["average of squares over bound"])
        drift = " / ".join(f"{v:.2f}" for v in seen["drift"])
        rows.append([method, squares, f"{100 * seen['losses that rise']:.0f} %", drift])
    at = " / ".join(map(str, steps))
    header = [
        "method",
        f"(1/T) Σ ‖d‖² over its bound, T = {at}",
        "group losses that rise in a step",
    ]
    return rows_of([*header, "drift after as many steps"], rows)


def everything(found: dict[Block, Settings]) -> str:
    """Every method in every setting."""
    parts = []
    for block, settings in found.items():
        task, n, b, optimizer = block
        name = {"sgd": "SGD", "adamw": "AdamW"}[optimizer]
        parts.append(f"## {TASKS[task]}, {n} workers, {b} per worker and step, {name}")
        parts.append(by_method(settings, "test"))
        if task != "diabetes":
            parts += ["Worst class or domain:", by_method(settings, "worst")]
        if any("one split" in m["mean"] for m in settings.values()):
            parts += ["Standard deviation over 60 seeds on one split:", spread(settings)]
    return "\n\n".join(parts)


def by_method(settings: Settings, name: str) -> str:
    """Rows are methods, columns settings."""
    skipped = ("mean",) if name == "test" else ("mean", "early")
    methods = dict.fromkeys(m for s in settings.values() for m in s if m not in skipped)
    means = [f"{m['mean'][name].mean():.1f}".replace("-", "−") for m in settings.values()]
    rows = [["*mean*", *means]]
    for method in methods:
        label = "mean, early stopping" if method == "early" else method
        rows.append([label, *compared(settings, method, name).values()])
    return rows_of(["method", *settings], rows)


def spread(settings: Settings) -> str:
    """Standard deviations over 60 seeds on one split; bold if Brown and Forsythe's p, by Holm over
    the settings, is below 0.05."""
    there = {s: m for s, m in settings.items() if "one split" in m["mean"]}
    rows = [["*mean*", *(f"{m['mean']['one split'].std(ddof=1):.2f}" for m in there.values())]]
    for method in (m for m in next(iter(there.values())) if m not in ("mean", "early")):
        texts, ps = dict.fromkeys(there, ""), {}
        for setting, methods in there.items():
            values = methods.get(method, {}).get("one split")
            mean = methods["mean"]["one split"]
            if values is not None and mean.std():  # else all are at the bound of R²
                texts[setting] = f"{values.std(ddof=1):.2f}"
                ps[setting] = float(stats.levene(values, mean, center="median").pvalue)
        for setting, p in zip(ps, holm(list(ps.values())), strict=True):
            texts[setting] = f"**{texts[setting]}**" if p < 0.05 else texts[setting]
        if ps:
            rows.append([method, *texts.values()])
    return rows_of(["method", *there], rows)


def tables() -> dict[str, str]:
    """What the pages have, by name."""
    found = read()
    main = [DIGITS, MINILM, DIABETES]
    few = ["clean", "wrong labels", "bad worker", "by class", "long-tailed"]
    alike = ["clean", "wrong labels", "bad worker"]
    columns = ["min_norm", "cap 2", "cap 1.5", "upgrad", "multi-krum", "robust loss"]
    return {
        "main": situations(found, main, columns),
        "short": situations(found, main[:2], ["min_norm", "cap 2", "upgrad", "robust loss"], few),
        "robust": situations(
            found, main[:2], ["min_norm", "cap 2", "robust loss", "cap 2, robust loss"], alike
        ),
        "worst": worst(found),
        "monitor": monitor(found),
        "limit": limit(found),
        "through ddp": through_ddp(),
        "theory": theory(),
        "everything": everything(found),
    }


def filled(text: str, contents: dict[str, str]) -> str:
    """A page with its tables as the results have them."""
    return re.sub(
        r"(<!-- results: ([\w ]+) -->\n\n).*?(\n\n<!-- end -->)",
        lambda m: m[1] + contents[m[2]] + m[3],
        text,
        flags=re.S,
    )


def main() -> None:
    from pictures import draw

    contents = tables()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), contents), encoding="utf-8")
    draw(read(), watched(), ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
