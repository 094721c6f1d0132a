"""Gives every DDP model that has no hook ours, with the weighting "mean": nothing may change.

Also a command, for scripts that torchrun starts: hooked.py SCOPE SCRIPT [ARGUMENTS].
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook

SCOPES = ["global", "bucket"]


def hook_every_model(scope: str) -> None:
    """From now on, in this process; at a model's first forward, so that it may have its own."""
    plain = DistributedDataParallel.forward

    def forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        if "comm_hook" not in self._get_ddp_logging_data():
            self.register_comm_hook(GrainState(weighting="mean", scope=scope), grain_hook)
        return plain(self, *inputs, **kwargs)

    DistributedDataParallel.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    hook_every_model(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
