"""A worker whose gradient, replica or machine is not as the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WHAT = {
    "nonfinite": "has a NaN or inf in its gradient",
    "peak": "has an entry in its gradient that is far too large",
    "norm": "has a gradient of unusual length",
    "zero": "has a gradient that is zero",
    "stale": "has the same gradient again, number for number",
    "replica": "has other parameters than the others",
    "replay": "does not compute what others compute, or what it computed before",
}
"""What each kind of suspect says of its rank."""


@dataclass(frozen=True)
class Suspect:
    """A rank that stood out in a step: a reason to look at its machine and its data, not a proof.

    Attributes:
        step: number of the step, counted from 0.
        rank: in the process group.
        host: the name of the machine that it runs on.
        device: "cpu", or "cuda:" with the device's index and its UUID.
        kind: a key of `WHAT`.
        tensor: the name of the tensor where it shows most. None: it is of the whole gradient.
        score: -log of the chance that a sound rank stands out as far. inf where that is none.
        strikes: how often this rank was found in this run, this time included.
    """

    step: int
    rank: int
    host: str
    device: str
    kind: str
    tensor: str | None
    score: float
    strikes: int

    def __str__(self) -> str:
        where = f", most so in {self.tensor}" if self.tensor else ""
        again = f", for the {_ordinal(self.strikes)} time" if self.strikes > 1 else ""
        return (
            f"rank {self.rank} ({self.device} of {self.host}) is suspect: at step {self.step} it "
            f"{WHAT.get(self.kind, self.kind)}{where} (score {self.score:.0f}){again}."
        )


def _ordinal(number: int) -> str:
    last = 0 if number % 100 in (11, 12, 13) else number % 10
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(last, 'th') }"


class FaultyWorker(RuntimeError):
    """With ``guard="raise"``: raised on every rank before a parameter has changed.

    Attributes:
        suspects: the ranks that stand out.
    """

    def __init__(self, suspects: Sequence[Suspect]) -> None:
        super().__init__(
            "grain_ddp: "
            + " ".join(map(str, suspects))
            + " No parameter has changed in this step. Run the step again, or grain_ddp.replay to "
            "tell the machine from the batch; then drain the machine, or look at its data."
        )
        self.suspects = tuple(suspects)

    def __reduce__(self) -> tuple[type[FaultyWorker], tuple[tuple[Suspect, ...]]]:
        return FaultyWorker, (self.suspects,)
