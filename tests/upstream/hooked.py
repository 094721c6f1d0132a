"""Gives every DDP model that has no hook ours, with the weighting "mean": nothing may change.

Also a command, for scripts that torchrun starts: hooked.py SCOPE SCRIPT [ARGUMENTS]. The scope
"plain" is DDP without a hook.
"""

from __future__ import annotations

import os
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


def ignore_device_ids() -> None:
    """Tests name a GPU for each model even where all is on the CPU, which DDP refuses."""
    plain = DistributedDataParallel.__init__

    def init(self: Any, module: Any, device_ids: Any = None, *rest: Any, **options: Any) -> None:
        options.pop("output_device", None)
        plain(self, module, None, *rest, **options)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


if __name__ == "__main__":
    ignore_device_ids()
    if sys.argv[1] in SCOPES:
        hook_every_model(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: gloo's threads sometimes abort in an orderly exit, plain DDP too
