"""GRAIN for data-parallel training: the min-norm point of the workers' gradients, not their mean.

model = DistributedDataParallel(model)
state = GrainState()
model.register_comm_hook(state, grain_hook)
"""

import importlib
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

from grain_ddp._core.replay import Replay, replay
from grain_ddp._core.state import GrainState
from grain_ddp._math.record import StepRecord
from grain_ddp._math.solver import Solution, min_norm
from grain_ddp._math.status import Status
from grain_ddp._math.suspect import FaultyWorker, Suspect
from grain_ddp.ddp import grain_hook
from grain_ddp.loop import reduce_gradients

__version__ = "0.1.0"
__all__ = [
    "FaultyWorker",
    "GrainState",
    "Replay",
    "Solution",
    "Status",
    "StepRecord",
    "Suspect",
    "grain_hook",
    "min_norm",
    "noop_hook",
    "reduce_gradients",
    "replay",
]

# Imported when they are first asked for: some need a package that is optional, and DeepSpeed is
# changed by being imported.
_MODULES = frozenset(
    {"deepspeed", "fsdp", "huggingface", "lightning", "mpi", "simulation", "sinks", "weighting"}
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"grain_ddp.{name}")
    raise AttributeError(f"module 'grain_ddp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
