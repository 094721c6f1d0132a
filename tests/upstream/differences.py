"""Where somebody else's test ends otherwise with the hook than without it, and why.

An entry whose test no longer differs fails, as does a test that differs and has no entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """What a test says with the hook, in either scope."""

    error: str  # a regular expression, found in the traceback
    reason: str


PYTORCH = {
    "test_ddp_comm_hook_logging": Difference(
        "'grain_hook' != ''", "It asks for the name of the model's hook and expects none."
    ),
    "test_ddp_profiling_torch_profiler": Difference(
        "_test_ddp_profiling(?s:.*)Expected 6 but got 0",
        "It counts the all-reduces of DDP in a profile; the hook's exchange has none.",
    ),
    "test_ddp_create_graph": Difference(
        "is a view and is being modified inplace",
        "A gradient of a gradient is not supported: the result is written into the bucket.",
    ),
    "test_ddp_grad_div_uneven_inputs": Difference(
        "test_ddp_grad_div_uneven_inputs(?s:.*)Tensor-likes are not close",
        "The hook divides by the world size, as divide_by_initial_world_size=True does.",
    ),
}
