"""What users hold: the options of a run, and what it remembers from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist

from grain_ddp._core.batches import Batch, Batches
from grain_ddp._core.options import NAMES, Kind, Options
from grain_ddp._math.record import StepRecord
from grain_ddp._math.weighting import Weighting
from grain_ddp._wire.wire import Wire

in_use: WeakSet[GrainState] = WeakSet()
"""The states that serve, or served, an owner."""


class Owner(Protocol):
    """An integration at work for one model. Its `str` says which, in words."""

    @property
    def gone(self) -> bool:
        """Whether its model is no more."""


class GrainState:
    """Options and memory of one model's gradient aggregation.

    Pass it to ``model.register_comm_hook(state, grain_hook)`` or to `reduce_gradients`. Use one
    state per model, with the same options on every rank.

    Options can be assigned until the state is first used, and are fixed from then on. To change one
    later, on every rank and between two steps::

        state.load_state_dict({**state.state_dict(), "cap": 2})

    Args:
        process_group: the ranks to aggregate over. None: those of the DDP model that the state is
            registered with, or the default group.
        scope: "global": one weight vector per step, the paper's method. "bucket": one per bucket.
        groups: which ranks form one group, whose mean gradient is one row: "rank", each rank;
            "node", the ranks of a host; an int k, blocks of k ranks in order; lists of ranks; or
            "label", those that give `batch` the same label.
        microbatches: how many backward passes make one step, each pass of each rank a group of its
            own (n·m groups, rank by rank). Run the passes without ``no_sync``: the first m - 1
            leave ``.grad`` at zero, the last leaves the aggregate.
        weighting: "min_norm", "mean", "inverse_norm" (wᵢ ∝ 1/‖gᵢ‖²), "upgrad" (each gradient
            projected so that it opposes none, then the mean), "krum" (one gradient, the one nearest
            to the others) and "multi_krum" (the mean of all but one, which is the farthest from the
            others: for one broken group of at least five), or a callable from a float64 CPU Gramian
            ``[n, n]`` to weights ``[n]``. See `grain_ddp.weighting.weigh`.
        cap: with "min_norm", no group weighs more than cap/n. None: no bound; 1: the mean.
        normalize: with "min_norm", the hull of unit gradients: its weights over the norms, scaled
            to sum to one. A `cap` is then a bound on both sides of 1/n.
        sketch: None: the exact Gramian, for which ranks exchange all of their gradients. An int k
            (2**20 is a good one): that of k random sums of each gradient, with an error of about
            1/√k; the bytes on every link are those of plain averaging, and k numbers. With "mean",
            4 million parameters or more, and ranks that do not read each other's memory, 2**18 is
            the default.
        wire_dtype: torch.bfloat16 or torch.float16, or "bf16" or "fp16": what travels, for
            gradients that are wider. None: their own dtype. Sums are accumulated in fp32 or better.
        warmup_steps: plain averaging for that many first steps.
        nonfinite: "propagate" a NaN or inf to every rank alike, or "drop" its group.
        guard: what happens when one rank's gradient stands out from the others' and from the past:
            "warn", in ``last.suspects`` and the log; "drop", also weight 0 in that step for its
            group; "raise", a `FaultyWorker` on every rank before a parameter changes. None: nobody
            looks. See the page "Faulty workers" of the documentation.
        check_replicas: every that many steps the ranks compare checksums of the model, and one that
            differs is a suspect. 0: never.
        record_every: a `StepRecord` every that many steps.
        on_step: called with the `StepRecord` of each recorded step, on every rank, when the step's
            gradients are complete. `grain_ddp.sinks` has some to write files and logs.

    Attributes:
        options: all of the above but process_group.
        step: steps completed so far.
        last: the latest `StepRecord`, or None before the first.

    Raises:
        ValueError: an option is out of range, or is changed after the state's first use.
        AttributeError: there is no option of that name.
    """

    options: Options
    process_group: dist.ProcessGroup | None
    step: int
    last: StepRecord | None

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        scope: str = "global",
        groups: str | int | Sequence[Sequence[int]] = "rank",
        microbatches: int = 1,
        weighting: Weighting = "min_norm",
        cap: float | None = None,
        normalize: bool = False,
        sketch: int | None = None,
        wire_dtype: torch.dtype | str | None = None,
        warmup_steps: int = 0,
        nonfinite: str = "propagate",
        guard: str | None = None,
        check_replicas: int = 0,
        record_every: int = 1,
        on_step: Callable[[StepRecord], object] | None = None,
    ) -> None:
        options = Options(
            scope=scope,
            groups=groups,
            microbatches=microbatches,
            weighting=weighting,
            cap=cap,
            normalize=normalize,
            sketch=sketch,
            wire_dtype=wire_dtype,
            warmup_steps=warmup_steps,
            nonfinite=nonfinite,
            guard=guard,
            check_replicas=check_replicas,
            record_every=record_every,
            on_step=on_step,
        )
        self.__setstate__({"options": options, "step": 0, "last": None})
        vars(self)["process_group"] = process_group

    # Options, as attributes.

    def __getattr__(self, name: str) -> Any:
        if name in NAMES and "options" in vars(self):
            return getattr(self.options, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("step", "last"):
            vars(self)[name] = value
            return
        if name not in (*NAMES, "process_group"):
            raise AttributeError(
                f"grain_ddp: GrainState has no option {name!r}. There are: {', '.join(NAMES)}."
            )
        if self._owner is not None:
            raise ValueError(
                f"grain_ddp: {name} cannot be changed any more: this GrainState serves "
                f"{self._owner}, and the ranks have agreed on its options. To change one on all "
                "ranks, call on each of them, between two steps: "
                f'state.load_state_dict({{**state.state_dict(), "{name}": ...}}). '
                "Another process group needs another GrainState."
            )
        if name == "process_group":
            vars(self)[name] = value
        else:
            vars(self)["options"] = replace(self.options, **{name: value})
            vars(self)["batches"] = Batches(self.options.microbatches)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in NAMES)
        return f"GrainState({options}; step {self.step})"

    def batch(
        self, label: str | None = None, samples: float | None = None, loss: Any = None
    ) -> None:
        """Say what the next backward pass is of: before each one, on every rank; or never.

        Args:
            label: what kind of batch it is, for ``groups="label"``: ranks, and micro-batches, with
                the same label are one group.
            samples: over how many samples, or tokens, its gradient is a mean. A group's gradient is
                then the mean over its samples, and "mean" that over all. 0: it does not count.
            loss: its loss, for the record; a number or a tensor with one.

        Passes whose gradients add up before they are aggregated have their samples added.

        Raises:
            ValueError: a value is none of these, or other ones than in the first step are given.
        """
        self.batches.add(Batch(label, samples, loss))

    @property
    def kind(self) -> Kind:
        """What the step under way does."""
        return self.options.kind(self.step, "samples" in self.batches.told)

    # Its one owner.

    @property
    def owner(self) -> Any:
        """The integration that this state serves. None before its first use."""
        return self._owner

    def bind(self, owner: Owner, wire: Wire) -> None:
        """Give this state to an owner, over the ranks of the wire. Collective.

        Every integration calls it once, before anything else moves: the ranks compare options and
        find out which of them share a host. From here on the options are fixed.

        Raises:
            ValueError: the state serves another owner; or, on every rank, the ranks' options or
                owners differ.
        """
        held = self._owner
        if held is not None and held is not owner and not held.gone:
            raise ValueError(
                f"grain_ddp: this GrainState serves {held}, and cannot serve {owner} too. Make a "
                "GrainState for each model."
            )
        wire.meet(
            {"the owner of the state": str(owner), **self.options.agreed(), "step": self.step}
        )
        vars(self)["_owner"] = owner
        in_use.add(self)

    # Steps.

    def advance(self, record: StepRecord | None) -> None:
        """Complete a step. Called by the aggregation, when the gradients are in place."""
        self.step += 1
        self.batches.clear()
        if record is not None:
            self.last = record
            if self.options.on_step is not None:
                self.options.on_step(record)

    # Checkpoints.

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "step": self.step, "last": self.last}

    def __setstate__(self, values: dict[str, Any]) -> None:
        batches = Batches(values["options"].microbatches)
        vars(self).update(values, process_group=None, _owner=None, batches=batches)

    def state_dict(self) -> dict[str, Any]:
        """Options and step as plain values, without the process group, callables and records."""
        values = {name: getattr(self.options, name) for name in NAMES if name != "on_step"}
        if callable(self.options.weighting):
            del values["weighting"]
        return {**values, "step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, on every rank. Callables and process group stay.

        Raises:
            ValueError: an unknown name, or a value that the constructor would not take.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                "grain_ddp: expected what GrainState.state_dict() returns, but found "
                f"{type(state_dict).__name__}."
            )
        known = {*NAMES, "step"} - {"on_step"}
        unknown = sorted(str(name) for name in state_dict if name not in known)
        if unknown:
            raise ValueError(f"grain_ddp: not part of a GrainState: {', '.join(unknown)}.")
        values = dict(state_dict)
        step = values.pop("step", self.step)
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"grain_ddp: step must be an int >= 0, but it is {step!r}.")
        options = replace(self.options, **values)
        if options != self.options:
            # The ranks compare them anew. The labels keep their places in the records.
            batches = Batches(options.microbatches)
            batches.labels = self.batches.labels
            vars(self).update(options=options, _owner=None, batches=batches)
        self.step = step
