"""The three pictures of docs/does-it-help.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from analyse import DIABETES, DIGITS, MINILM, SETTINGS, TASKS, Block, Settings, paired
from matplotlib.axis import Axis

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TICKS = [-40, -20, -10, -4, -2, 0, 2, 4, 10, 60]
COLORS = {
    "min_norm": "tab:blue",
    "cap 2": "tab:cyan",
    "cap 1.5": "tab:purple",
    "upgrad": "tab:green",
    "multi-krum": "tab:brown",
    "robust loss": "tab:orange",
}
LINES = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7"]


def draw(found: dict[Block, Settings], watched: list[tuple[Block, str, Any]], folder: Path) -> None:
    bars(found[DIGITS], folder / "study-settings.png")
    caps(found[DIGITS], folder / "study-caps.png")
    monitor(found, watched, folder / "study-monitor.png")


def points(axis: Axis) -> None:
    """Linear near zero, logarithmic beyond: gains are small and losses large."""
    axis.axes.set_yscale("symlog", linthresh=4)
    low, high = axis.get_view_interval()
    shown = [t for t in TICKS if low <= t <= high]
    axis.set_ticks(shown, labels=[f"{t:+d}".replace("-", "−").replace("+0", "0") for t in shown])
    axis.set_ticks([], minor=True)
    axis.axes.axhline(0, color="0.2", lw=0.8)


def bars(settings: Settings, path: Path) -> None:
    """One group of bars per setting."""
    figure, axes = plt.subplots(figsize=(9, 3.8))
    shown = [s for s in SETTINGS if s in settings]
    for i, (method, color) in enumerate(COLORS.items()):
        values = [paired(settings[s][method], settings[s]["mean"]) for s in shown]
        at = np.arange(len(shown)) + (i - 2.5) * 0.14
        halves = [half for _, half, _ in values]
        heights = [difference for difference, _, _ in values]
        name = method if method != "robust loss" else "mean with a robust loss"
        axes.bar(at, heights, 0.13, yerr=halves, color=color, label=name, ecolor="0.3")
    axes.set_ylim(-50, 8)
    points(axes.yaxis)
    axes.set_ylabel("points of accuracy\nagainst the mean")
    axes.set_xticks(range(len(shown)), [wrapped(SETTINGS[s]) for s in shown], fontsize=8)
    axes.tick_params(axis="x", length=0)
    for edge in np.arange(len(shown) - 1) + 0.5:
        axes.axvline(edge, color="0.9", lw=0.8, zorder=0)
    axes.legend(ncols=6, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    save(figure, path)


def wrapped(name: str) -> str:
    """At the space nearest to its middle."""
    spaces = [i for i, letter in enumerate(name) if letter == " "]
    if not spaces:
        return name
    middle = min(spaces, key=lambda i: abs(i - len(name) / 2))
    return name[:middle] + "\n" + name[middle + 1 :]


def caps(settings: Settings, path: Path) -> None:
    """The cap as a dial from the mean to min-norm."""
    figure, axes = plt.subplots(figsize=(7, 3.8))
    order = ["mean", "cap 1.5", "cap 2", "cap 4", "min_norm"]
    for setting, color in zip((s for s in SETTINGS if s in settings), LINES, strict=True):
        methods = settings[setting]
        values = [paired(methods[m], methods["mean"]) for m in order]
        heights, halves = [v[0] for v in values], [v[1] for v in values]
        axes.errorbar(range(5), heights, halves, marker="o", color=color, label=SETTINGS[setting])
    axes.set_ylim(-50, 6)
    points(axes.yaxis)
    axes.set_ylabel("points of accuracy\nagainst the mean")
    axes.set_xticks(range(5), ["1 (mean)", "1.5", "2", "4", "none\n(min_norm)"])
    axes.set_xlabel("cap")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def monitor(
    found: dict[Block, Settings], watched: list[tuple[Block, str, Any]], path: Path
) -> None:
    """What monitor mode shows against what came of min-norm."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    marks = dict(zip(SETTINGS, "osP*<D^v", strict=True))
    colors = {"digits": "tab:blue", "minilm": "tab:orange", "diabetes": "tab:gray"}
    for block, setting, seen in watched:
        methods = found[block][setting]
        if "min_norm" not in methods:
            continue
        difference, half, _ = paired(methods["min_norm"], methods["mean"])
        color = colors[block[0]]
        face = color if block in (DIGITS, MINILM, DIABETES) else "white"
        style = {"marker": marks[setting], "color": color, "mfc": face, "ms": 7}
        axes.errorbar(100 * seen["ruled"], difference, half, ls="", **style)
    for task, color in colors.items():
        axes.plot([], [], "s", color=color, label=TASKS[task])
    for setting, mark in marks.items():
        axes.plot([], [], mark, color="0.5", label=SETTINGS[setting])
    axes.set_ylim(-50, 90)
    axes.set_xlim(-2, None)
    axes.axvline(100 / 3, color="0.6", lw=0.8, ls="--")
    points(axes.yaxis)
    axes.set_ylabel("what min_norm did:\npoints against the mean")
    what = "one group all but decides GRAIN's step, %"
    axes.set_xlabel(f"what monitor mode shows: records in which\n{what}")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
