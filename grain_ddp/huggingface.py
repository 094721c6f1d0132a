"""Hugging Face's Trainer under DDP: ``Trainer(..., callbacks=[GrainCallback(GrainState())])``."""

from __future__ import annotations

from typing import Any

from grain_ddp._core.state import GrainState
from grain_ddp.ddp import attach
from grain_ddp.sinks import readings

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        'grain_ddp.huggingface needs transformers: pip install "grain-ddp[frameworks]".'
    ) from error


class GrainCallback(TrainerCallback):
    """Registers the hook when training begins, and adds each record to the Trainer's logs.

    The logs get `grain_ddp.sinks.readings`.
    ``state.step`` is the Trainer's ``global_step``, also when it resumes from a checkpoint.

    Args:
        state: one for each Trainer, with the same options on every rank.

    Raises:
        ValueError: when training begins: the Trainer does not use DDP, but DeepSpeed (whose config
            decides), FSDP, or `DataParallel`.
        RuntimeError: a step ended, and no gradient was aggregated.
    """

    def __init__(self, state: GrainState) -> None:
        self.grain = state
        self._attached = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"grain_ddp: expected one process for each GPU, but this one has {args.n_gpu}, and "
                "DataParallel averages over them. Start the script with torchrun."
            )
        self._attached = attach(kwargs["model"], self.grain)
        self.grain.step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attached and self.grain.step < state.global_step:
            raise RuntimeError(
                f"grain_ddp: {state.global_step} steps ended, but {self.grain.step} aggregated. "
                "Does the Trainer train another model than the one that DDP wraps?"
            )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs, record = kwargs["logs"], self.grain.last
        if "loss" in logs and record is not None:
            values = readings(record)
            logs.update(values)  # for the callbacks that come after this one: the console
            state.log_history[-1].update(values)
