"""Where the records of a run go: ``GrainState(on_step=jsonl("run.jsonl"))``.

Each function here returns a callable for `on_step`. It may be given on every rank: rank 0 of all
ranks writes, the others do nothing. For several at once, call them from a function of your own.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from grain_ddp._math.record import StepRecord, named
from grain_ddp._math.status import Status

Sink = Callable[[StepRecord], None]

CURVES = 32
"""With more groups than this, TensorBoard and W&B get no curves of single groups."""

_FIELDS = [field.name for field in fields(StepRecord)]


def jsonl(path: str | Path) -> Sink:
    """Append each record to a file, one JSON object per line; `read_jsonl` gives them back.

    Missing folders are made. Every line is complete on disk before training goes on. A file that
    exists is continued, so that a resumed run has one log. A line holds n² numbers of about 20
    bytes (times the buckets with ``scope="bucket"``): with many groups, raise `record_every`.

    A line that cannot be written (a full disk) is a warning, not the end of the training.

    Raises:
        OSError: the file cannot be opened for writing; from here, not during the training.
    """
    path = Path(path).absolute()  # absolute: also when the program changes its folder
    if _writes():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")  # the last run was broken off within a line
    return partial(_append, path)


def read_jsonl(path: str | Path) -> list[StepRecord]:
    """The records of a file that `jsonl` wrote, in the order of their steps.

    Steps that were run again, by a run that was resumed or started anew with the same file, count
    once: the later ones. Lines that are incomplete, because the run was broken off while it wrote
    them, are left out with a warning.

    Raises:
        OSError: there is no such file.
        ValueError: a line is something else than a record, or there is no record at all.
    """
    records: list[StepRecord] = []
    broken = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError:
                broken.append(number)
                continue
            if not isinstance(values, dict) or not set(_FIELDS) <= set(values):
                raise ValueError(
                    f"grain_ddp: {path}, line {number}: expected a record with the fields "
                    f"{', '.join(_FIELDS)}, but found {line.strip()[:60]!r}. "
                    "Give a file that grain_ddp.sinks.jsonl wrote."
                )
            record = _record(values)
            while records and records[-1].step >= record.step:
                records.pop()
            records.append(record)
    if not records:
        raise ValueError(
            f"grain_ddp: {path} has no records. Expected one JSON object per line, as "
            "grain_ddp.sinks.jsonl writes them; give that file, or train at least one step with "
            'GrainState(on_step=jsonl("run.jsonl")).'
        )
    if broken:
        where = "line" if len(broken) == 1 else "lines"
        warnings.warn(
            f"grain_ddp: {path}: left out {where} {', '.join(map(str, broken))}, which the run did "
            "not finish writing.",
            stacklevel=2,
        )
    return records


def tensorboard(to: Any) -> Sink:
    """Scalars for TensorBoard, under ``grain/``.

    Args:
        to: a folder, or a ``torch.utils.tensorboard.SummaryWriter`` that you have. A state that is
            pickled needs the folder.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    if isinstance(to, (str, Path)) and _writes():
        _summary_writer(to)
    return partial(_to_tensorboard, to)


def wandb(run: Any = None) -> Sink:
    """Scalars for Weights & Biases, under ``grain/``, with ``grain/step`` as their axis.

    Args:
        run: what ``wandb.init()`` returned. None: the run that is active when a record comes.

    Raises:
        ModuleNotFoundError: wandb is not installed.
        RuntimeError: no run is given, and on rank 0 none is active: from the first record.
    """
    if run is None and _writes():
        _import_wandb()
    return partial(_to_wandb, run)


def log(logger: logging.Logger | None = None) -> Sink:
    """One line per record at level INFO, to a logger or to the one named "grain_ddp".

    Python shows that level only after, for example, ``logging.basicConfig(level=logging.INFO)``.
    """
    return partial(_to_logger, logger or logging.getLogger("grain_ddp"))


def scalars(record: StepRecord) -> dict[str, float]:
    """What TensorBoard and Weights & Biases get: the finite readings of a record, by name.

    With `CURVES` groups or fewer also the weight, the norm and the cosine to the sum of the others
    of each one. With ``scope="bucket"`` a weight is the mean over the buckets, a gap their sum.
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
        if n <= CURVES:
            each = {"weight": weights, "norm": record.norms, "cosine": record.cosine_to_others}
            for name, found in each.items():
                values |= {f"{name}/{i}": value for i, value in enumerate(found)}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def readings(record: StepRecord) -> dict[str, float]:
    """`scalars` under ``grain/``, without those of single groups: for a framework's own logs."""
    return {f"grain/{k}": v for k, v in scalars(record).items() if "/" not in k}


def _writes() -> bool:
    """Whether this is rank 0; before torch.distributed starts, by the launcher's word."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def _append(path: Path, record: StepRecord) -> None:
    if not _writes():
        return
    values = {name: _plain(getattr(record, name)) for name in _FIELDS}
    try:
        line = json.dumps(values, allow_nan=False)
    except ValueError:
        line = json.dumps(_spelled(values))
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        warnings.warn(
            f"grain_ddp: step {record.step} is missing in {path}: {error.strerror}. The training "
            "goes on.",
            stacklevel=2,
        )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _spelled(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {name: _spelled(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _record(values: dict[str, Any]) -> StepRecord:
    gap = np.array(values["gap"], dtype=np.float64)
    nested = gap.ndim == 1  # one entry per bucket
    return StepRecord(
        values["step"],
        np.array(values["gramian"], dtype=np.float64),
        np.array(values["weights"], dtype=np.float64),
        gap if nested else float(gap),
        tuple(map(_status, values["status"])) if nested else _status(values["status"]),
        *(
            tuple(map(tuple, values[name])) if nested else tuple(values[name])
            for name in ("active", "dropped")
        ),
    )


def _status(text: str) -> Any:
    """The status with this text, or the text of another version's log."""
    try:
        return Status(text)
    except ValueError:
        return text


@cache  # the sink itself holds the folder only, so that a state with it can be pickled
def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "grain_ddp: the TensorBoard sink needs tensorboard: "
            "pip install 'grain-ddp[tensorboard]'."
        ) from error
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call, unused-ignore]


def _to_tensorboard(to: Any, record: StepRecord) -> None:
    if _writes():
        writer = _summary_writer(to) if isinstance(to, (str, Path)) else to
        for name, value in scalars(record).items():
            writer.add_scalar(f"grain/{name}", value, record.step)


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ModuleNotFoundError(
            "grain_ddp: the Weights & Biases sink needs wandb: pip install 'grain-ddp[wandb]'."
        ) from error
    return wandb


def _to_wandb(run: Any, record: StepRecord) -> None:
    if not _writes():
        return
    active = run or _import_wandb().run
    if active is None:
        raise RuntimeError(
            "grain_ddp: expected an active Weights & Biases run on rank 0, but found none. "
            "Call wandb.init() there before the first step, or give the run: wandb(run)."
        )
    # The axis of its own leaves the step counter of the user's own logging alone.
    active.define_metric("grain/step")
    active.define_metric("grain/*", step_metric="grain/step")
    active.log({"grain/step": record.step} | {f"grain/{k}": v for k, v in scalars(record).items()})


def _to_logger(logger: logging.Logger, record: StepRecord) -> None:
    if not _writes() or not logger.isEnabledFor(logging.INFO):
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
