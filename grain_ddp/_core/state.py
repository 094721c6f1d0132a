"""The options that users type, and what a run remembers from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from grain_ddp._math.record import StepRecord
from grain_ddp._math.weighting import RULES, Weighting

_CHOICES = {"scope": ("global", "bucket"), "nonfinite": ("propagate", "drop")}
_TRANSIENT = ("process_group", "_runtime")


class GrainState:
    """Options and memory of one model's gradient aggregation.

    Pass it to ``model.register_comm_hook(state, grain_hook)`` or to `reduce_gradients`. Use one
    state per model, with the same options on every rank.

    Args:
        process_group: the ranks to aggregate over. None: those of the DDP model that the state is
            registered with, or the default group.
        scope: "global": one weight vector per step, the paper's method. "bucket": one per bucket.
        groups: which ranks form one group, whose mean gradient is one row: "rank", each rank;
            "node", the ranks of a host; an int k, blocks of k ranks in order; or lists of ranks.
        microbatches: how many backward passes make one step, each pass of each rank a group of its
            own (n·m groups, rank by rank). Run the passes without ``no_sync``: the first m - 1
            leave ``.grad`` at zero, the last leaves the aggregate.
        weighting: "min_norm", "mean", "inverse_norm" (wᵢ ∝ 1/‖gᵢ‖²), or a callable from a float64
            CPU Gramian ``[n, n]`` to weights ``[n]``. See `grain_ddp.weighting.weigh`.
        cap: with "min_norm", no group weighs more than cap/n. None: no bound; 1: the mean.
        wire_dtype: torch.bfloat16 or torch.float16: what travels, for gradients that are wider.
            None: the gradient's own dtype. Sums are accumulated in fp32 or better.
        warmup_steps: plain averaging for that many first steps.
        nonfinite: "propagate" a NaN or inf to every rank alike, or "drop" its group.
        record_every: a `StepRecord` every that many steps.
        on_step: called with the `StepRecord` of each recorded step, on every rank, when the step's
            gradients are complete. `grain_ddp.sinks` has some to write files and logs.

    Attributes:
        step: steps completed so far.
        last: the latest `StepRecord`, or None before the first.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        scope: str = "global",
        groups: str | int | Sequence[Sequence[int]] = "rank",
        microbatches: int = 1,
        weighting: Weighting = "min_norm",
        cap: float | None = None,
        wire_dtype: torch.dtype | None = None,
        warmup_steps: int = 0,
        nonfinite: str = "propagate",
        record_every: int = 1,
        on_step: Callable[[StepRecord], object] | None = None,
    ) -> None:
        self.process_group = process_group
        self.scope = scope
        self.groups = groups
        self.microbatches = microbatches
        self.weighting = weighting
        self.cap = cap
        self.wire_dtype = wire_dtype
        self.warmup_steps = warmup_steps
        self.nonfinite = nonfinite
        self.record_every = record_every
        self.on_step = on_step
        self.step = 0
        self.last: StepRecord | None = None
        self._runtime: Any = None  # what the integration in use keeps from call to call
        self._validate()

    def _validate(self) -> None:
        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                found = getattr(self, name)
                raise ValueError(f"grain_ddp: {name} must be {expected}, but it is {found!r}.")

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        for name, choices in _CHOICES.items():
            require(getattr(self, name) in choices, name, " or ".join(map(repr, choices)))
        require(
            self.groups in ("rank", "node")
            if isinstance(self.groups, str)
            else (whole(self.groups) and self.groups >= 1)  # type: ignore[operator]
            or (
                isinstance(self.groups, Sequence)
                and len(self.groups) > 0
                and all(isinstance(group, Sequence) and len(group) > 0 for group in self.groups)
                and all(whole(rank) for group in self.groups for rank in group)
            ),
            "groups",
            '"rank", "node", an int >= 1, or a list of lists of ranks',
        )
        require(whole(self.microbatches) and self.microbatches >= 1, "microbatches", "an int >= 1")
        if self.microbatches > 1 and self.groups != "rank":
            raise ValueError(
                'grain_ddp: microbatches needs groups="rank" (each pass of each rank is a group), '
                f"but groups is {self.groups!r}."
            )
        require(
            callable(self.weighting)
            or (isinstance(self.weighting, str) and self.weighting in RULES),
            "weighting",
            f"one of {', '.join(map(repr, RULES))}, or a callable from a Gramian to weights",
        )
        # It would take the Gramian for gradients, and what it returns has the length of weights.
        require(
            all(kind.__name__ != "Aggregator" for kind in type(self.weighting).__mro__),
            "weighting",
            "a weighting, which takes a Gramian (UPGradWeighting()), and not a TorchJD aggregator, "
            "which takes gradients",
        )
        require(
            self.cap is None
            or (
                isinstance(self.cap, (int, float))
                and not isinstance(self.cap, bool)
                and math.isfinite(self.cap)
                and self.cap >= 1
            ),
            "cap",
            "None or a number of at least 1 (1 is the mean)",
        )
        if self.cap is not None and self.weighting != "min_norm":
            raise ValueError(
                f'grain_ddp: cap needs weighting="min_norm", but weighting is {self.weighting!r}.'
            )
        require(
            self.wire_dtype in (None, torch.bfloat16, torch.float16),
            "wire_dtype",
            "None, torch.bfloat16 or torch.float16",
        )
        require(whole(self.warmup_steps) and self.warmup_steps >= 0, "warmup_steps", "an int >= 0")
        require(whole(self.record_every) and self.record_every >= 1, "record_every", "an int >= 1")
        require(
            self.on_step is None or callable(self.on_step),
            "on_step",
            "None or a function that takes a StepRecord",
        )

    def agreed(self) -> dict[str, Any]:
        """What must be equal on every rank, by name: plain values."""
        values = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        for name in ("process_group", "on_step", "last"):
            del values[name]
        values["wire_dtype"] = None if self.wire_dtype is None else str(self.wire_dtype)
        if callable(self.weighting):
            kind = (
                self.weighting if hasattr(self.weighting, "__qualname__") else type(self.weighting)
            )
            values["weighting"] = f"{kind.__module__}.{kind.__qualname__}"
        return values

    @property
    def recording(self) -> bool:
        """Whether the current step makes a record."""
        return self.step >= self.warmup_steps and self.step % self.record_every == 0

    @property
    def averaging(self) -> bool:
        """Whether the current step is a plain mean that needs no Gramian."""
        return self.step < self.warmup_steps or (
            self.weighting == "mean" and self.nonfinite == "propagate" and not self.recording
        )

    def advance(self, record: StepRecord | None) -> None:
        """Complete a step. Called by the aggregation, when the gradients are in place."""
        self.step += 1
        if record is not None:
            self.last = record
            if self.on_step is not None:
                self.on_step(record)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _TRANSIENT}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values, process_group=None, _runtime=None)

    def state_dict(self) -> dict[str, Any]:
        """Options and step as plain values, without the process group, callables and records."""
        values = self.__getstate__()
        del values["last"], values["on_step"]
        if callable(self.weighting):
            del values["weighting"]
        return values

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, on every rank. Callables and process group stay.

        Raises:
            ValueError: an unknown name, or a value that the constructor would not take.
        """
        unknown = set(state_dict) - set(self.__getstate__()) - {"weighting"}
        if unknown:
            raise ValueError(f"grain_ddp: not part of a GrainState: {', '.join(sorted(unknown))}.")
        previous = dict(vars(self))
        vars(self).update(state_dict, _runtime=None)  # None: the ranks compare their options anew
        try:
            self._validate()
        except ValueError:
            vars(self).update(previous)
            raise
