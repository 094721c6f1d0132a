"""Lightning under DDP: ``Trainer(strategy="ddp", callbacks=[GrainCallback(GrainState())])``."""

from __future__ import annotations

from typing import Any

from grain_ddp._core.state import GrainState
from grain_ddp._math.record import StepRecord
from grain_ddp.ddp import attach
from grain_ddp.sinks import readings

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        'grain_ddp.lightning needs lightning: pip install "grain-ddp[frameworks]".'
    ) from error


class GrainCallback(Callback):
    """Registers the hook when training starts, and logs each record with the module's metrics.

    Lightning registers the hook that `DDPStrategy` is given on CUDA only, and averages elsewhere
    without a word; this works everywhere, also beside that. ``state.step`` is the trainer's
    ``global_step``, also when it resumes from a checkpoint.

    Args:
        state: one for each trainer, with the same options on every rank.

    Raises:
        ValueError: when training starts: the strategy is not DDP, but DeepSpeed (whose config
            decides) or FSDP.
    """

    def __init__(self, state: GrainState) -> None:
        self.grain = state
        self._logged: StepRecord | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        attach(trainer.strategy.model, self.grain)
        self.grain.step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        record = self.grain.last
        if record is not None and record is not self._logged:
            self._logged = record
            values = readings(record)
            pl_module.log_dict(values, batch_size=1)  # the batch's size only matters to averages
