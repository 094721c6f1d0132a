"""The study's table and pictures, from results/*.jsonl: see protocol.md.

python examples/study/analyse.py            # docs/images/study-*.png, and the tables as Markdown
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
NAMES = {"early": "mean, early stopping"}
Block = tuple[str, int, int, str]  # task, workers, batch per worker, optimizer


def read() -> dict[Block, dict[str, dict[str, dict[str, Any]]]]:
    """Lines by block, setting and method; in percentage points (R² × 100)."""
    found: dict[Block, dict[str, dict[str, dict[str, Any]]]] = {}
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


def paired(line: dict[str, Any], mean: dict[str, Any], name: str) -> tuple[float, float, float]:
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


def table(settings: dict[str, dict[str, dict[str, Any]]], name: str) -> list[str]:
    """Rows are methods, columns settings; bold where Holm's p is below 0.05."""
    skipped = ("mean",) if name == "test" else ("mean", "early")
    methods = [m for m in next(iter(settings.values())) if m not in skipped]
    lines = ["| method | " + " | ".join(settings) + " |", "|---" * (len(settings) + 1) + "|"]
    means = [f"{methods_['mean'][name].mean():.1f}" for methods_ in settings.values()]
    lines.append("| *mean* | " + " | ".join(means) + " |")
    for method in methods:
        there = {s: m for s, m in settings.items() if method in m}
        results = [paired(m[method], m["mean"], name) for m in there.values()]
        sure = holm([p for _, _, p in results])
        texts = dict.fromkeys(settings, "")
        for setting, (difference, half, _), p in zip(there, results, sure, strict=True):
            text = f"{difference:+.1f} ± {half:.1f}".replace("-", "−")
            texts[setting] = f"**{text}**" if p < 0.05 else text
        lines.append(f"| {NAMES.get(method, method)} | " + " | ".join(texts.values()) + " |")
    return lines


def spread(settings: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Standard deviations over 60 seeds on one split, and Brown–Forsythe's p against the mean."""
    lines = ["| setting | method | s.d. | mean's | p |", "|---|---|---|---|---|"]
    for setting, methods in settings.items():
        mean = methods["mean"].get("one split")
        for method, line in methods.items():
            values = line.get("one split")
            if method in ("mean", "early") or mean is None or values is None or not mean.std():
                continue  # all at the bound of R²
            p = stats.levene(values, mean, center="median").pvalue
            row = f"| {setting} | {method} | {values.std(ddof=1):.2f} | {mean.std(ddof=1):.2f} "
            lines.append(row + f"| {p:.3f} |")
    return lines


def monitored(found: dict[Block, Any]) -> list[str]:
    """What the records of a run show, per block and setting."""
    lines = [
        "| block | setting | mean opposes a worker | length of min_norm's step | largest weight"
    ]
    lines[0] += " | min_norm − mean | upgrad − mean |"
    lines.append("|---" * 7 + "|")
    for block, settings in found.items():
        words = "{}, n={}, b={}, {}".format(*block)
        for setting, methods in settings.items():
            if not {"min_norm", "upgrad"} <= set(methods):
                continue
            seen, least = methods["mean"]["seen"], methods["min_norm"]["seen"]
            row = f"| {words} | {setting} | {seen['conflict']:.2f} | {least['shorter']:.2f} "
            row += f"| {least['largest']:.2f} "
            for method in ("min_norm", "upgrad"):
                row += f"| {paired(methods[method], methods['mean'], 'test')[0]:+.1f} ".replace(
                    "-", "−"
                )
            lines.append(row + "|")
    return lines


def bars(settings: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Differences from the mean for the main methods, one group of bars per setting."""
    shown = ["min_norm", "cap 2", "normalize", "upgrad", "multi-krum", "robust loss"]
    colors = ["tab:blue", "tab:cyan", "tab:purple", "tab:green", "tab:brown", "tab:orange"]
    figure, axes = plt.subplots(figsize=(9, 3.6))
    for i, (method, color) in enumerate(zip(shown, colors, strict=True)):
        values = [paired(m[method], m["mean"], "test") for m in settings.values()]
        at = np.arange(len(values)) + (i - 2.5) * 0.14
        heights = [v[0] for v in values]
        halves = [v[1] for v in values]
        axes.bar(at, heights, 0.13, yerr=halves, color=color, label=method, ecolor="0.3")
    axes.set_yscale("symlog", linthresh=4)
    axes.set_yticks(
        [-40, -20, -10, -4, -2, 0, 2, 4], ["−40", "−20", "−10", "−4", "−2", "0", "2", "4"]
    )
    axes.axhline(0, color="0.2", lw=0.8)
    axes.set_xticks(range(len(settings)), [s.replace(" ", "\n", 1) for s in settings])
    axes.legend(ncols=6, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    save(figure, path)


def points_axis(axis: Any, what: str) -> None:
    """Linear near zero, logarithmic beyond: gains are small and losses large."""
    ticks = [-40, -20, -10, -4, -2, 0, 2, 4, 10]
    (axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale)("symlog", linthresh=4)
    low, high = axis.get_view_interval()
    axis.set_ticks(ticks, labels=[str(t).replace("-", "−") for t in ticks])
    axis.set_ticks([], minor=True)
    axis.set_view_interval(low, high, ignore=True)
    line = axis.axes.axhline if axis.axis_name == "y" else axis.axes.axvline
    line(0, color="0.2", lw=0.8)
    axis.set_label_text(f"{what} against the mean's (points)")


def caps(settings: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """The cap as a dial from the mean to min-norm."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    order = ["mean", "cap 1.5", "cap 2", "cap 4", "min_norm"]
    for setting, methods in settings.items():
        values = [paired(methods[m], methods["mean"], "test") for m in order]
        axes.errorbar(
            range(5), [v[0] for v in values], [v[1] for v in values], marker="o", label=setting
        )
    axes.set_yscale("symlog", linthresh=4)
    axes.set_yticks(
        [-40, -20, -10, -4, -2, 0, 2, 4], ["−40", "−20", "−10", "−4", "−2", "0", "2", "4"]
    )
    axes.axhline(0, color="0.2", lw=0.8)
    axes.set_xticks(range(5), ["1 (mean)", "1.5", "2", "4", "none\n(min_norm)"])
    axes.set_xlabel("cap")
    axes.legend(fontsize=7, frameon=False)
    save(figure, path)


def worst(settings: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """The worst class or domain against the average."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    shown = {"min_norm": "tab:blue", "cap 2": "tab:cyan", "upgrad": "tab:green"}
    shown["robust loss"] = "tab:orange"
    marks = "osD^v<>"
    for mark, (setting, methods) in zip(marks, settings.items(), strict=False):
        for method, color in shown.items():
            at = [paired(methods[method], methods["mean"], name)[0] for name in ("test", "worst")]
            axes.plot(*at, mark, color=color, ms=7, alpha=0.8)
        axes.plot([], [], mark, color="0.5", label=setting)
    for method, color in shown.items():
        axes.plot([], [], "s", color=color, label=method)
    points_axis(axes.xaxis, "average accuracy")
    points_axis(axes.yaxis, "worst class or domain")
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    found = read()
    for block, settings in found.items():
        task, n, b, optimizer = block
        print(f"\n## {task}, n = {n}, {b} per worker, {optimizer}\n")
        print("\n".join(table(settings, "test")))
        if task != "diabetes":
            print("\nWorst class or domain:\n")
            print("\n".join(table(settings, "worst")))
        if any("one split" in m["mean"] for m in settings.values()):
            print("\nStandard deviation over 60 seeds on one split:\n")
            print("\n".join(spread(settings)))
    print("\n## What the records show\n")
    print("\n".join(monitored(found)))
    main_block = found["digits", 8, 4, "sgd"]
    bars(main_block, IMAGES / "study-settings.png")
    caps(main_block, IMAGES / "study-caps.png")
    worst(main_block, IMAGES / "study-worst.png")


if __name__ == "__main__":
    main()
