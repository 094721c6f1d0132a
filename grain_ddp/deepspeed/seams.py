"""What is known of DeepSpeed's inside: the methods that are replaced, as they must look."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from grain_ddp._wire.torch_wire import default_group

try:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import groups, logger
    from deepspeed.utils.logging import print_dist
except ImportError as error:
    raise ImportError(
        'grain_ddp.deepspeed needs DeepSpeed: pip install "grain-ddp[deepspeed]", after torch.'
    ) from error

__all__ = [
    "SCATTER",
    "DeepSpeedEngine",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "check_version",
    "honour_timeout",
    "logger",
    "print_dist",
    "process_group",
    "version",
]

OLDEST = (0, 19, 1)

SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"

# What is replaced or called, with the parameters that are relied upon.
SEAMS: dict[type, dict[str, tuple[str, ...]]] = {
    DeepSpeedEngine: {"_reduce_non_expert_gradients": ("grads", "elements_per_buffer")},
    DeepSpeedZeroOptimizer: {
        "reduce_ready_partitions_and_remove_grads": ("param", "i"),
        "independent_gradient_partition_epilogue": (),
        "gradient_reduction_w_predivide": ("tensor", "communication_data_type"),
        "allreduce_bucket": ("bucket", "communication_data_type"),
        "get_gradient_for_reduction": ("param",),
    },
    DeepSpeedZeroOptimizer_Stage3: {
        "reduce_ready_partitions_and_remove_grads": ("param",),
        "independent_gradient_partition_epilogue": (),
        SCATTER: ("params_to_reduce", "communication_data_type"),
    },
}


def version() -> str:
    return str(deepspeed.__version__)


def check_version() -> None:
    """RuntimeError if this DeepSpeed is too old, or looks different where it is replaced."""
    if tuple(map(int, re.findall(r"\d+", version())[:3])) < OLDEST:
        raise RuntimeError(
            f"grain_ddp: needs DeepSpeed {'.'.join(map(str, OLDEST))} or newer, but this is "
            f"{version()}. Upgrade it."
        )
    for owner, methods in SEAMS.items():
        for name, expected in methods.items():
            parameters = _parameters(getattr(owner, name, None))[: len(expected)]
            if parameters != expected:
                raise RuntimeError(
                    f"grain_ddp: DeepSpeed {version()} has another {owner.__name__}.{name} than "
                    f"grain_ddp knows: expected the parameters {expected}, found {parameters}. "
                    "Use a version that grain_ddp supports."
                )


def _parameters(method: Any) -> tuple[str, ...]:
    if method is None:
        return ()
    if method.__name__ == "wrapped_fn":  # DeepSpeed's instrumentation, which hides the signature
        method = inspect.getclosurevars(method).nonlocals["func"]
    return tuple(inspect.signature(method).parameters)[1:]


def honour_timeout() -> None:
    """Let the ranks of DeepSpeed's world wait for each other as long as those of the real one.

    DeepSpeed makes a clone of the world, and PyTorch gives it a timeout of its own: 30 minutes on
    a CPU, 10 on GPUs. Collective, the first time.
    """
    if not deepspeed.comm.is_initialized():
        return
    for device in default_group()._device_types:
        options = getattr(default_group()._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if timeout is not None:  # gloo and NCCL
            _set_pg_timeout(timeout, groups._clone_world_group())


def process_group(engine: Any) -> dist.ProcessGroup:
    """The ranks that the engine's gradients are aggregated over."""
    group = engine.seq_data_parallel_group
    # On gloo, point-to-point messages keep the timeout that their group was made with.
    clone = group is groups._WORLD_GROUP and torch.device(engine.device).type == "cpu"
    return default_group() if group is None or clone else group
