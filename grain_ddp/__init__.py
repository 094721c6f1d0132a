"""GRAIN for data-parallel training: the min-norm point of the workers' gradients, not their mean.

model = DistributedDataParallel(model)
state = GrainState()
model.register_comm_hook(state, grain_hook)
"""

from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

from grain_ddp.ddp import grain_hook
from grain_ddp.loop import reduce_gradients
from grain_ddp.record import StepRecord
from grain_ddp.solver import Solution, min_norm
from grain_ddp.state import GrainState

__version__ = "0.1.0"
__all__ = [
    "GrainState",
    "Solution",
    "StepRecord",
    "grain_hook",
    "min_norm",
    "noop_hook",
    "reduce_gradients",
]
