"""Scalars for the services that people watch their runs with."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from grain_ddp._math.record import Array, StepRecord, named
from grain_ddp._math.status import Status

Sink = Callable[[StepRecord], None]

CURVES = 32
"""With more groups than this, no service gets curves of single groups."""

MEMORY = 0.95
"""Of the smoothed noise scale from one record to the next: the last 20 or so count."""


def tensorboard(to: Any) -> Sink:
    """Scalars for TensorBoard, under ``grain/``.

    Args:
        to: a folder, or a ``torch.utils.tensorboard.SummaryWriter`` that you have. A state that is
            pickled needs the folder.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    if isinstance(to, (str, Path)) and writes():
        _summary_writer(to)
    return partial(_to_tensorboard, to, _Smooth())


def wandb(run: Any = None) -> Sink:
    """Scalars for Weights & Biases, under ``grain/``, with ``grain/step`` as their axis.

    Args:
        run: what ``wandb.init()`` returned. None: the run that is active when a record comes.

    Raises:
        ModuleNotFoundError: wandb is not installed.
        RuntimeError: no run is given, and on rank 0 none is active: from the first record.
    """
    if run is None and writes():
        _package("wandb", "Weights & Biases")
    return partial(_to_wandb, run, _Smooth())


def mlflow(run_id: str | None = None) -> Sink:
    """Metrics for MLflow, under ``grain/``, at the record's step.

    Args:
        run_id: of a run that exists. None: the run that is active when a record comes.

    Raises:
        ModuleNotFoundError: mlflow is not installed.
        RuntimeError: no run is given, and on rank 0 none is active: from the first record.
    """
    if writes():
        _package("mlflow", "MLflow")
    return partial(_to_mlflow, run_id, _Smooth())


def opentelemetry(meter: Any = None) -> Sink:
    """Gauges for OpenTelemetry, named ``grain.norm_mean`` and so on, and ``grain.step``.

    What is of a single group has the attribute ``group``. Where they go, and how often, is the
    business of the meter provider that your program sets up.

    Args:
        meter: an ``opentelemetry.metrics.Meter``. None: the one named "grain_ddp" of the global
            provider. A state that is pickled needs None.

    Raises:
        ModuleNotFoundError: opentelemetry-api is not installed.
    """
    if meter is None and writes():
        _package("opentelemetry", "OpenTelemetry")
    return partial(_to_opentelemetry, meter, _Smooth())


def log(logger: logging.Logger | None = None) -> Sink:
    """One line per record at level INFO, to a logger or to the one named "grain_ddp".

    Python shows that level only after, for example, ``logging.basicConfig(level=logging.INFO)``.
    """
    return partial(_to_logger, logger or logging.getLogger("grain_ddp"))


def scalars(record: StepRecord) -> dict[str, float]:
    """What the services get of a record: its finite readings, by name.

    With `CURVES` groups or fewer also the weight, the norm and the cosine to the sum of the others
    of each one. With ``scope="bucket"`` a weight is the mean over the buckets, a gap their sum.
    ``suspects`` is how many there are, where there are any.
    The sinks add ``noise_scale_smooth``: the ratio of moving averages of what `noise_scale` divides
    (McCandlish et al. 2018, appendix A.1), since that of a single step is mostly chance.
    """
    n = record.gramian.shape[-1]
    with np.errstate(all="ignore"):  # gradients that are not finite
        weights = record.weights.reshape(-1, n).mean(0)
        values = {
            "norm_aggregate": record.norm_aggregate,
            "norm_mean": record.norm_mean,
            "conflicts_aggregate": record.conflicts_aggregate,
            "conflicts_mean": record.conflicts_mean,
            "noise_scale": record.noise_scale,
            "gap": float(np.sum(record.gap)),
            "weight_max": weights.max(),
            "weight_min": weights.min(),
        }
        if record.suspects:
            values["suspects"] = len(record.suspects)
        if n <= CURVES:
            each = {"weight": weights, "norm": record.norms, "cosine": record.cosine_to_others}
            for name, found in each.items():
                values |= {f"{name}/{i}": value for i, value in enumerate(found)}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def readings(record: StepRecord) -> dict[str, float]:
    """`scalars` under ``grain/``, without those of single groups: for a framework's own logs."""
    return {f"grain/{k}": v for k, v in scalars(record).items() if "/" not in k}


@dataclass
class _Smooth:
    """`scalars` with the smoothed noise scale: the mean Gramian of the latest records has one."""

    gramian: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def __call__(self, record: StepRecord) -> dict[str, float]:
        n = record.gramian.shape[-1]
        values, whole = scalars(record), record.gramian.reshape(-1, n, n).sum(0)
        if np.isfinite(whole).all():
            same = self.gramian.shape == whole.shape
            self.gramian = MEMORY * self.gramian + (1 - MEMORY) * whole if same else whole
            smooth = StepRecord(0, self.gramian, np.zeros(n), 0.0, Status.MEAN, (), ()).noise_scale
            if math.isfinite(smooth):
                values["noise_scale_smooth"] = smooth
        return values


def writes() -> bool:
    """Whether this is rank 0; before torch.distributed starts, by the launcher's word."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def _package(name: str, service: str, module: str = "") -> Any:
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"grain_ddp: the {service} sink needs {name}: pip install 'grain-ddp[{name}]'."
        ) from error


# A sink itself holds what can be pickled only, so that a state with it can be.


@cache
def _summary_writer(folder: str | Path) -> Any:
    return _package("tensorboard", "TensorBoard", "torch.utils.tensorboard").SummaryWriter(
        str(folder)
    )


def _to_tensorboard(to: Any, read: _Smooth, record: StepRecord) -> None:
    if writes():
        writer = _summary_writer(to) if isinstance(to, (str, Path)) else to
        for name, value in read(record).items():
            writer.add_scalar(f"grain/{name}", value, record.step)


def _to_wandb(run: Any, read: _Smooth, record: StepRecord) -> None:
    if not writes():
        return
    active = run or _package("wandb", "Weights & Biases").run
    if active is None:
        raise RuntimeError(
            "grain_ddp: expected an active Weights & Biases run on rank 0, but found none. "
            "Call wandb.init() there before the first step, or give the run: wandb(run)."
        )
    # The axis of its own leaves the step counter of the user's own logging alone.
    active.define_metric("grain/step")
    active.define_metric("grain/*", step_metric="grain/step")
    active.log({"grain/step": record.step} | {f"grain/{k}": v for k, v in read(record).items()})


def _to_mlflow(run_id: str | None, read: _Smooth, record: StepRecord) -> None:
    if not writes():
        return
    service = _package("mlflow", "MLflow")
    if run_id is None and service.active_run() is None:  # it would start one, and never end it
        raise RuntimeError(
            "grain_ddp: expected an active MLflow run on rank 0, but found none. Call "
            "mlflow.start_run() there before the first step, or give its id: mlflow(run_id)."
        )
    values = {f"grain/{name}": value for name, value in read(record).items()}
    service.log_metrics(values, step=record.step, run_id=run_id)


@cache
def _gauge(meter: Any, name: str) -> Any:
    metrics = _package("opentelemetry", "OpenTelemetry", "opentelemetry.metrics")
    return (meter or metrics.get_meter("grain_ddp")).create_gauge(name)


def _to_opentelemetry(meter: Any, read: _Smooth, record: StepRecord) -> None:
    if writes():
        for name, value in {"step": record.step, **read(record)}.items():
            what, _, group = name.partition("/")
            _gauge(meter, f"grain.{what}").set(value, {"group": int(group)} if group else None)


def _to_logger(logger: logging.Logger, record: StepRecord) -> None:
    if not writes() or not logger.isEnabledFor(logging.INFO):
        return
    n, dropped = record.gramian.shape[-1], named(record.dropped)
    with np.errstate(all="ignore"):
        weights = record.weights.reshape(-1, n).mean(0)
        logger.info(
            "step %d: norm %.3g (of the mean: %.3g), opposes %d of %d groups (the mean: %d), "
            "weights %.2g to %.2g, noise scale %.3g, gap %.1e%s",
            record.step,
            record.norm_aggregate,
            record.norm_mean,
            record.conflicts_aggregate,
            n,
            record.conflicts_mean,
            weights.min(),
            weights.max(),
            record.noise_scale,
            float(np.sum(record.gap)),
            f", dropped groups {sorted(dropped)}" if dropped else "",
        )
