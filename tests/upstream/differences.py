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
    "test_ddp_grad_div_uneven_inputs": Difference(
        r"ValueError: grain_ddp: join\(divide_by_initial_world_size=False\)",
        "A hook is not told how many ranks are still there, and refuses to divide by them.",
    ),
    "test_ddp_sink_noclone": Difference(
        r"gather_objects(?s:.*)clone encountered!",
        "It forbids every clone. The ranks' first comparison of options clones a short message; "
        "no gradient is cloned.",
    ),
}
