"""The panels as one picture, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from grain_ddp._tools.history import Run
from grain_ddp._tools.output import canvas, save
from grain_ddp._tools.panels import Heat, Lines, Matrices, bounds, panels

_LOOK: dict[str, dict[str, Any]] = {
    "group": {"color": "tab:gray", "lw": 0.8, "alpha": 0.6},
    "mark0": {"color": "tab:red", "lw": 1.5},
    "mark1": {"color": "tab:orange", "lw": 1.5},
    "mark2": {"color": "tab:purple", "lw": 1.5},
    "mark3": {"color": "tab:brown", "lw": 1.5},
    "mean": {"color": "black", "lw": 2, "ls": "--"},
    "grain": {"color": "tab:blue", "lw": 2},
    "noise": {"color": "tab:green", "lw": 2},
    "limit": {"color": "black", "lw": 1.5, "ls": ":"},
    "zero": {"color": "black", "lw": 0.8},
}


def draw(run: Run, path: Path, title: str = "") -> None:
    """Draw a run to an image file; the name's ending says of which kind.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: every record has a NaN or inf, the name's ending is unknown, or the file cannot
            be written.
    """
    drawn = panels(run)
    if not drawn:
        raise ValueError("grain_ddp: nothing to draw: every record has a gradient with NaN or inf.")
    figure = canvas(path, (13, 17))
    axes = iter(figure.subplots(4, 2).flat)
    for panel in drawn.values():
        if isinstance(panel, Lines):
            _lines(next(axes), panel)
        elif isinstance(panel, Heat):
            _heat(next(axes), panel)
        else:
            _matrices(axes, panel)
    # A file's name may have bytes that are no text; and a "$" in it is one.
    figure.suptitle(title.encode(errors="backslashreplace").decode(), parse_math=False)
    save(figure, path)


def _lines(axis: Any, panel: Lines) -> None:
    axis.set_title(panel.title, fontsize="medium")
    axis.set(xlabel="step", ylabel=panel.unit)
    if panel.note:
        axis.text(0.5, 0.5, panel.note, ha="center", transform=axis.transAxes)
        return
    if panel.band is not None:
        axis.fill_between(panel.x, *panel.band, color="tab:gray", alpha=0.3, lw=0)
    for series in panel.series:
        label = {"label": series.label} if series.label else {}
        axis.plot(panel.x, series.y, **_LOOK[series.role], **label)
    if panel.log:
        axis.set_yscale("log")
    axis.set_ylim(*bounds(panel))
    if any(series.label for series in panel.series):  # under the axis, where it covers no curve
        axis.legend(
            fontsize="small",
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            frameon=False,
        )


def _heat(axis: Any, panel: Heat) -> None:
    n, (first, last) = len(panel.values), panel.steps
    image = axis.imshow(
        panel.values,
        aspect="auto",
        interpolation="nearest",
        cmap="PuOr_r",
        vmin=-1,
        vmax=1,
        extent=(first - 0.5, last + 0.5, n - 0.5, -0.5),
    )
    bar = axis.figure.colorbar(image, ax=axis, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(panel.keys)
    axis.set_title(panel.title, fontsize="medium")
    axis.set(xlabel="step", ylabel="group")
    axis.yaxis.get_major_locator().set_params(integer=True)


def _matrices(axes: Any, panel: Matrices) -> None:
    for (name, values), axis in zip(panel.values.items(), axes, strict=False):
        image = axis.imshow(values, cmap="PuOr", vmin=-1, vmax=1)
        axis.figure.colorbar(image, ax=axis)
        if len(values) <= 8:
            for i, j in np.ndindex(values.shape):
                color = "white" if abs(values[i, j]) > 0.6 else "black"
                axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=color)
        axis.set_title(f"{panel.title}, {name}", fontsize="medium")
        axis.set(xlabel="group", ylabel="group")
        for side in (axis.xaxis, axis.yaxis):
            side.get_major_locator().set_params(integer=True)
