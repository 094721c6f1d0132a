"""The picture of a run's records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from grain_ddp._math.record import Array
from grain_ddp._tools.report import Run, grain_weights, norms_of, opposed

MEAN, GRAIN = "tab:gray", "tab:blue"
STANDS_OUT = ("tab:red", "tab:orange", "tab:purple", "tab:brown")


def draw(run: Run, path: str | Path, title: str = "") -> None:
    """Draw a run to an image file; the name's ending says of which kind.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: every record has a NaN or inf, or the name's ending is unknown.
    """
    if not run.finite:
        raise ValueError("grain_ddp: nothing to draw: every record has a gradient with NaN or inf.")
    figure = canvas(path, (18, 8.5))
    axes = figure.subplots(2, 4)
    for panel, axis in zip(
        (_weights, _norms, _early, _late, _conflicts, _to_others, _noise, _gap),
        axes.flat,
        strict=True,
    ):
        panel(axis, run)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def canvas(path: str | Path, size: tuple[float, float]) -> Any:
    """An empty figure of that size in inches, which can be saved under that name.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the name's ending is unknown.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError as error:
        raise ModuleNotFoundError(
            "grain_ddp: the picture needs matplotlib: pip install 'grain-ddp[plot]'."
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    if Path(path).suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(
            f"grain_ddp: {path}: expected a picture's name, ending in .png, .svg or .pdf."
        )
    return figure


def _weights(axis: Any, run: Run) -> None:
    weights = grain_weights(run)
    edges = np.linspace(0, len(weights), min(len(weights), 150) + 1).astype(int)
    means = np.add.reduceat(weights, edges[:-1]) / np.diff(edges)[:, None]
    image = axis.imshow(
        means.T,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        extent=(run.steps[0] - 0.5, run.steps[-1] + 0.5, run.n - 0.5, -0.5),
    )
    axis.figure.colorbar(image, ax=axis, label=f"weight (equal shares: {1 / run.n:.3g})")
    axis.set(xlabel="step", ylabel="group", title=f"Weights {_did(run, 'gave', 'given')}")
    axis.yaxis.get_major_locator().set_params(integer=True)


def _norms(axis: Any, run: Run) -> None:
    _groups(axis, run, np.where(run.present, run.norms, np.nan), run.outliers[: len(STANDS_OUT)])
    mean, grain = norms_of(run)
    axis.plot(run.steps, _smooth(mean), color="black", lw=2, ls="--", label="mean")
    axis.plot(run.steps, _smooth(grain), color=GRAIN, lw=2, label="GRAIN")
    if (mean > 0).any():
        axis.set_yscale("log")
    axis.legend(fontsize="small")
    axis.set(xlabel="step", ylabel="norm", title="Length of the gradients and of the step")


def _early(axis: Any, run: Run) -> None:
    _cosine(axis, run, run.thirds()[0], "first")


def _late(axis: Any, run: Run) -> None:
    _cosine(axis, run, run.thirds()[1], "last")


def _cosine(axis: Any, run: Run, part: slice, name: str) -> None:
    cosines = run.cosines[part]
    count = np.isfinite(cosines).sum(0)
    mean = np.divide(
        np.nansum(cosines, 0), count, out=np.full((run.n, run.n), np.nan), where=count > 0
    )
    image = axis.imshow(mean, cmap="RdBu", vmin=-1, vmax=1)
    axis.figure.colorbar(image, ax=axis)
    if run.n <= 8:
        for i, j in np.ndindex(mean.shape):
            color = "white" if abs(mean[i, j]) > 0.6 else "black"
            axis.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", color=color)
    axis.set(xlabel="group", ylabel="group", title=f"Cosine of two groups, {name} third")
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True)


def _conflicts(axis: Any, run: Run) -> None:
    for name, records, reading, color in (
        ("mean", run.finite, "conflicts_mean", MEAN),
        ("GRAIN", run.grain, "conflicts_aggregate", GRAIN),
    ):
        axis.plot(
            run.steps, 100 * _smooth(opposed(records, reading), 10) / run.n, color=color, label=name
        )
    axis.legend(fontsize="small")
    axis.set(xlabel="step", ylabel="%", title="Groups that the step points against")
    axis.set_ylim(bottom=-0.5, top=max(axis.get_ylim()[1], 5))


def _to_others(axis: Any, run: Run) -> None:
    _groups(axis, run, run.cosine_to_others, run.outliers[: len(STANDS_OUT)])
    axis.axhline(0, color="black", lw=0.8)
    axis.legend(fontsize="small")
    axis.set(xlabel="step", ylabel="cosine", title="Each group against the sum of the others")


def _noise(axis: Any, run: Run) -> None:
    small = _smooth((run.norms**2).mean(1))
    big = _smooth(run.gramians.mean((1, 2)))
    axis.set(xlabel="step", ylabel="batches of one group", title="Gradient noise scale")
    if run.n == 1:
        axis.text(0.5, 0.5, "needs two groups", ha="center", transform=axis.transAxes)
        return
    # As in StepRecord.noise_scale, of the smoothed squares.
    signal, noise = (run.n * big - small) / (run.n - 1), (small - big) / (1 - 1 / run.n)
    scale = np.divide(noise, signal, out=np.full_like(noise, np.nan), where=signal > 0)
    axis.plot(run.steps, scale, color="tab:green", label="noise scale (gaps: too large to tell)")
    axis.set_xlim(run.steps[0] - 0.5, run.steps[-1] + 0.5)
    axis.axhline(run.n, color="black", ls=":", label=f"what a step uses: {run.n}")
    axis.set_yscale("log")
    axis.legend(fontsize="small")


def _gap(axis: Any, run: Run) -> None:
    gaps = np.where(run.gaps > 0, run.gaps, np.nan)
    axis.set(xlabel="step", ylabel="gap / mean squared norm", title="Distance from optimal weights")
    if np.isnan(gaps).all():
        axis.text(0.5, 0.5, "0 throughout", ha="center", transform=axis.transAxes)
        return
    axis.plot(run.steps, gaps, ".", ms=3, color=GRAIN if run.min_norm else MEAN)
    axis.set_yscale("log")
    if run.min_norm:
        axis.set_ylim(top=max(1e-6, axis.get_ylim()[1]))


def _did(run: Run, did: str, done: str) -> str:
    return f"that GRAIN {did}" if run.min_norm else f"that GRAIN would have {done}"


def _groups(axis: Any, run: Run, values: Array, marked: list[int]) -> None:
    """One thin line per group; those marked in colour and with a label."""
    for i, line in enumerate(_smooth(values).T):
        if i not in marked:
            axis.plot(run.steps, line, color="tab:gray", lw=0.8, alpha=0.6)
    axis.plot([], [], color="tab:gray", lw=0.8, label="a group" if not marked else "another group")
    for i, color in zip(marked, STANDS_OUT, strict=False):
        axis.plot(run.steps, _smooth(values[:, i]), color=color, lw=1.5, label=f"group {i}")


def _smooth(values: Array, share: int = 30) -> Array:
    """Centred moving average along the first axis, over 1/share of the records; NaN skipped."""
    width = len(values) // (2 * share)
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([0 * values[:1], np.where(finite, values, 0.0)]), 0)
    counts = np.cumsum(np.concatenate([0 * finite[:1], finite]), 0, dtype=np.float64)
    at = np.arange(len(values))
    low, high = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    mean: Array = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean
