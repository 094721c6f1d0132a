"""Where the records of a run go: ``GrainState(on_step=jsonl("run.jsonl"))``.

Each function here returns a callable for `on_step`. It may be given on every rank: rank 0 of all
ranks writes, the others do nothing. For several at once, call them from a function of your own.
"""

from grain_ddp.sinks._files import jsonl, read_jsonl
from grain_ddp.sinks._services import (
    CURVES,
    Sink,
    log,
    mlflow,
    opentelemetry,
    readings,
    scalars,
    tensorboard,
    wandb,
)

__all__ = [
    "CURVES",
    "Sink",
    "jsonl",
    "log",
    "mlflow",
    "opentelemetry",
    "read_jsonl",
    "readings",
    "scalars",
    "tensorboard",
    "wandb",
]
