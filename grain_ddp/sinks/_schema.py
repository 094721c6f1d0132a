"""What a line of a log is: the one place where a record is written as JSON, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from typing import Any, NoReturn

import numpy as np

from grain_ddp._math.record import Array, StepRecord
from grain_ddp._math.status import Status
from grain_ddp._math.suspect import Suspect

FIELDS = {
    field.name: MISSING if field.default_factory is MISSING else field.default_factory()
    for field in fields(StepRecord)
}
"""Of a record, with their defaults: a log may lack a field that has one."""

_NAMED = {"nan", "inf", "-inf"}  # JSON has no NaN and no infinity


def line_of(record: StepRecord, run: str) -> str:
    """One line, with the name of the run that writes it."""
    values = {name: _plain(getattr(record, name)) for name in FIELDS}
    values["suspects"] = [asdict(suspect) for suspect in record.suspects]
    for name, default in FIELDS.items():  # most records have none of these
        if default is not MISSING and values[name] in (None, []):
            del values[name]
    values = {"step": values.pop("step"), "run": run, **values}
    try:
        return json.dumps(values, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_spelled(values)) + "\n"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spelled(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse(line: str, where: str) -> tuple[StepRecord, str | None] | None:
    """The record of a line and the run's name, if it has one; None: a line that was broken off.

    Args:
        line: the text.
        where: the file and the line's number, for the error.

    Raises:
        ValueError: it is something else, in a sentence with the field, what is expected in it and
            what was found.
    """
    text = line.strip(" \t\r\n\0")  # a machine that goes down leaves zeros
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        if not text or text.startswith("{"):
            return None
        _fail(where, "", "a record, which is a JSON object in UTF-8", text)
    except RecursionError:
        _fail(where, "", "a record", text)
    except ValueError:  # Python's limit: its default is 4300 digits
        _fail(where, "", "numbers within the range of float64", "one of thousands of digits")
    required = [name for name, default in FIELDS.items() if default is MISSING]
    if not isinstance(values, dict) or not set(required) <= set(values):
        _fail(where, "", f"a record with the fields {', '.join(required)}", text)
    return _record(values, where), values.get("run") if isinstance(values.get("run"), str) else None


def _record(values: dict[str, Any], where: str) -> StepRecord:
    step = values["step"]
    if not _whole(step, 2**53):
        _fail(where, "step", "a whole number from 0", step)
    gramian = _numbers(values, "gramian", where)
    shape = gramian.shape
    if len(shape) not in (2, 3) or shape[-1] != shape[-2] or 0 in shape:
        expected = "inner products [n, n], or [buckets, n, n]"
        _fail(where, "gramian", expected, f"an array {list(shape)}")
    if (np.diagonal(gramian, axis1=-2, axis2=-1) < 0).any():
        _fail(where, "gramian", "squares on the diagonal", "a negative number")
    n, buckets = shape[-1], shape[0] if len(shape) == 3 else None
    arrays = {}
    for name, wanted in (("weights", shape[:-1]), ("gap", shape[:-2])):
        arrays[name] = _numbers(values, name, where)
        if arrays[name].shape != wanted:
            expected = f"an array {list(wanted)}" if wanted else "a number"
            found = f"an array {list(arrays[name].shape)}" if arrays[name].shape else "a number"
            _fail(where, name, f"{expected}, as the gramian is {list(shape)}", found)

    def each(name: str, kind: str, holds: Any) -> Any:
        """The field, or its tuple with one entry for each bucket."""
        value = values[name]
        if buckets is None and holds(value):
            return tuple(value) if isinstance(value, list) else value
        if buckets and isinstance(value, list) and len(value) == buckets and all(map(holds, value)):
            return tuple(tuple(v) if isinstance(v, list) else v for v in value)
        _fail(where, name, kind if buckets is None else f"a list of {buckets}, each {kind}", value)

    def groups(value: Any) -> bool:
        return isinstance(value, list) and all(_whole(i, n) for i in value)

    gap = arrays["gap"]
    return StepRecord(
        step=step,
        gramian=gramian,
        weights=arrays["weights"],
        gap=gap if buckets else float(gap),
        status=_status(each("status", "words", lambda value: isinstance(value, str))),
        active=each("active", f"a list of groups from 0 to {n - 1}", groups),
        dropped=each("dropped", f"a list of groups from 0 to {n - 1}", groups),
        suspects=_suspects(values.get("suspects", FIELDS["suspects"]), where),
        sketch_error=_said(values, "sketch_error", (), where),
        labels=_labels(values.get("labels"), n, where),
        samples=_said(values, "samples", (None,), where),
        losses=_said(values, "losses", (None,), where),
    )


def _said(values: dict[str, Any], name: str, shape: tuple[int | None, ...], where: str) -> Any:
    """A number, or a row of them; or None."""
    if values.get(name) is None:
        return None
    found = _numbers(values, name, where)
    if found.ndim != len(shape):
        _fail(where, name, "a list of numbers" if shape else "a number", values[name])
    return found if shape else float(found)


def _labels(value: Any, n: int, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    whole = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if not whole or len(value) != n:
        _fail(where, "labels", f"a list of {n} texts", value)
    return tuple(value)


_SUSPECT: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: _whole(value, 2**53),
    "rank": lambda value: _whole(value, 2**31),
    "host": lambda value: isinstance(value, str),
    "device": lambda value: isinstance(value, str),
    "kind": lambda value: isinstance(value, str),
    "tensor": lambda value: value is None or isinstance(value, str),
    "score": lambda value: (
        (isinstance(value, (int, float)) and not isinstance(value, bool))
        or (isinstance(value, str) and value in _NAMED)
    ),
    "strikes": lambda value: _whole(value, 2**53),
}
"""The fields of a suspect, and what each holds."""


def _suspects(found: Any, where: str) -> tuple[Suspect, ...]:
    whole = isinstance(found, (list, tuple)) and all(
        isinstance(one, dict) and all(holds(one.get(name)) for name, holds in _SUSPECT.items())
        for one in found
    )
    if not whole:
        _fail(where, "suspects", f"a list of objects with {', '.join(_SUSPECT)}", found)
    return tuple(
        Suspect(**{**{name: one[name] for name in _SUSPECT}, "score": float(one["score"])})
        for one in found
    )


def _status(found: Any) -> Any:
    """The status with these words, or the words of another version's log."""
    if isinstance(found, tuple):
        return tuple(map(_status, found))
    return Status(found) if found in {str(status) for status in Status} else found


def _whole(value: object, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _numbers(values: dict[str, Any], name: str, where: str) -> Array:
    value = values[name]
    try:
        found = np.array(value)
        if found.dtype.kind in "fi":
            return np.asarray(found, dtype=np.float64)
        leaves = np.array(value, dtype=object)
    except ValueError:
        _fail(where, name, "rows of equal length", value)
    for leaf in leaves.flat:
        number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
        if not (number or (isinstance(leaf, str) and leaf in _NAMED)):
            _fail(where, name, "numbers only", leaf)
    try:
        return leaves.astype(np.float64)
    except OverflowError:
        _fail(where, name, "numbers within the range of float64", value)


def _fail(where: str, field: str, expected: str, found: object) -> NoReturn:
    said = found if isinstance(found, str) else json.dumps(found)
    said = said if len(said) <= 60 else said[:60] + "…"
    said = said if not isinstance(found, str) or said.isprintable() else repr(said)
    at = f'{where}, field "{field}"' if field else where
    raise ValueError(
        f"grain_ddp: {at}: expected {expected}, but found {said or 'nothing'}. "
        "Give a file that grain_ddp.sinks.jsonl wrote."
    ) from None
