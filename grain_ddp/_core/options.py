"""The options that users type, and what they make of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch

from grain_ddp._core.fingerprint import describe
from grain_ddp._math.record import StepRecord
from grain_ddp._math.weighting import RULES, Weighting

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
"""Names of a `wire_dtype`, as configs write it."""


class Kind(Enum):
    """What a step does with its gradients. Fixed at its first bucket, alike on every rank.

    | kind                | Gramian | a bucket's rows are weighed                  |
    |---------------------|---------|----------------------------------------------|
    | PLAIN_MEAN          | none    | by 1/n, as soon as they are there            |
    | RECORDED_MEAN       | summed  | by 1/n, as soon as they are there            |
    | WEIGHTS_PER_BUCKET  | summed  | when the bucket's own sum is there           |
    | WEIGHTS_PER_STEP    | summed  | when the sum over all of the step is there   |
    """

    PLAIN_MEAN = "plain mean"
    RECORDED_MEAN = "recorded mean"
    WEIGHTS_PER_BUCKET = "weights per bucket"
    WEIGHTS_PER_STEP = "weights per step"

    @property
    def averages(self) -> bool:
        """Whether the weights are known before the Gramian, which is only recorded, if at all."""
        return self in (Kind.PLAIN_MEAN, Kind.RECORDED_MEAN)

    @property
    def has_gramian(self) -> bool:
        return self is not Kind.PLAIN_MEAN


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `GrainState` takes, which says what each of them means.

    Raises:
        ValueError: an option is out of range, or does not go with another one.
    """

    scope: str = "global"
    groups: str | int | Sequence[Sequence[int]] = "rank"
    microbatches: int = 1
    weighting: Weighting = "min_norm"
    cap: float | None = None
    normalize: bool = False
    sketch: int | None = None
    wire_dtype: Any = None  # a torch.dtype or None; a name becomes the dtype
    warmup_steps: int = 0
    nonfinite: str = "propagate"
    guard: str | None = None
    check_replicas: int = 0
    record_every: int = 1
    on_step: Callable[[StepRecord], object] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.wire_dtype, str) and self.wire_dtype in DTYPES:
            object.__setattr__(self, "wire_dtype", DTYPES[self.wire_dtype])
        for name, (holds, expected) in _EXPECTED.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"grain_ddp: {name} must be {expected}, but it is {short(value)}.")
        if self.microbatches > 1 and self.groups not in ("rank", "label"):
            raise ValueError(
                'grain_ddp: microbatches needs groups="rank" (each pass of each rank is a group), '
                f'or "label", but groups is {short(self.groups)}.'
            )
        if self.sketch is not None and (self.microbatches > 1 or self.wire_dtype is not None):
            name = "microbatches" if self.microbatches > 1 else "wire_dtype"
            raise ValueError(
                f"grain_ddp: sketch does not go with {name}, which is {getattr(self, name)!r}: the "
                "gradients themselves go through the backend's own reduction. Leave out one of "
                "them."
            )
        if self.groups == "label" and self.weighting in ("krum", "multi_krum"):
            raise ValueError(
                f"grain_ddp: weighting={self.weighting!r} needs five groups in every step, and "
                'groups="label" may have fewer. Take groups="rank".'
            )
        for name in ("cap", "normalize"):
            if getattr(self, name) and self.weighting != "min_norm":
                raise ValueError(
                    f'grain_ddp: {name} needs weighting="min_norm", but weighting is '
                    f"{short(self.weighting)}."
                )

    def agreed(self) -> dict[str, Any]:
        """What must be equal on every rank, by name: plain values."""
        values = vars(self).copy()
        del values["on_step"]
        values["wire_dtype"] = None if self.wire_dtype is None else str(self.wire_dtype)
        if not isinstance(self.weighting, str):
            values["weighting"] = describe(self.weighting)
        return values

    @property
    def watches(self) -> bool:
        """Whether the training is that of plain averaging, with records beside it."""
        return self.weighting == "mean" and self.nonfinite == "propagate"

    def records(self, step: int) -> bool:
        """Whether the step of that number makes a record."""
        return step >= self.warmup_steps and step % self.record_every == 0

    def kind(self, step: int, counted: bool = False) -> Kind:
        """What the step of that number does; `counted`: the mean is one over samples."""
        weighed = counted or self.guard == "drop"
        if step < self.warmup_steps and not weighed:
            return Kind.PLAIN_MEAN
        if self.watches and not weighed:
            return Kind.RECORDED_MEAN if self.records(step) else Kind.PLAIN_MEAN
        per_step = self.scope == "global"
        return Kind.WEIGHTS_PER_STEP if per_step else Kind.WEIGHTS_PER_BUCKET

    def narrow(self, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype in which gradients of that dtype travel, where it is a narrower one."""
        narrow: torch.dtype | None = self.wire_dtype
        return narrow if narrow is not None and narrow.itemsize < dtype.itemsize else None


def short(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def _whole(least: int) -> Callable[[object], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _are_groups(value: object) -> bool:
    if isinstance(value, str):
        return value in ("rank", "node", "label")
    if isinstance(value, Sequence):
        lists = all(isinstance(g, Sequence) and not isinstance(g, str) and len(g) for g in value)
        return len(value) > 0 and lists and all(_whole(0)(rank) for g in value for rank in g)
    return _whole(1)(value)


def _is_weighting(value: object) -> bool:
    return callable(value) or (isinstance(value, str) and value in RULES)


def _is_no_aggregator(value: object) -> bool:
    # It would take the Gramian for gradients, and what it returns has the length of weights.
    return all(kind.__name__ != "Aggregator" for kind in type(value).__mro__)


def _is_cap(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and 1 <= value <= 1e300)  # type: ignore[operator]


def _one_of(*values: object) -> Callable[[object], bool]:
    return lambda v: any(v is one or (type(v) is type(one) and v == one) for one in values)


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "scope": (_one_of("global", "bucket"), "'global' or 'bucket'"),
    "groups": (
        _are_groups,
        '"rank", "node", "label", an int >= 1, or a list of lists of ranks',
    ),
    "microbatches": (_whole(1), "an int >= 1"),
    "weighting": (
        lambda v: _is_weighting(v) and _is_no_aggregator(v),
        f"one of {', '.join(map(repr, RULES))}, or a callable from a Gramian to weights (a "
        "weighting such as UPGradWeighting(), and not a TorchJD aggregator, which takes gradients)",
    ),
    "cap": (_is_cap, "None or a number of at least 1 (1 is the mean)"),
    "normalize": (_one_of(True, False), "True or False"),
    "sketch": (lambda v: v is None or _whole(1)(v), "None or an int >= 1, such as 2**20"),
    "wire_dtype": (
        _one_of(None, torch.bfloat16, torch.float16),
        f"None, torch.bfloat16, torch.float16 or one of {', '.join(map(repr, DTYPES))}",
    ),
    "warmup_steps": (_whole(0), "an int >= 0"),
    "nonfinite": (_one_of("propagate", "drop"), "'propagate' or 'drop'"),
    "guard": (_one_of(None, "warn", "drop", "raise"), "None, 'warn', 'drop' or 'raise'"),
    "check_replicas": (_whole(0), "an int >= 0"),
    "record_every": (_whole(1), "an int >= 1"),
    "on_step": (lambda v: v is None or callable(v), "None or a function that takes a StepRecord"),
}

NAMES = tuple(field.name for field in fields(Options))
