"""What is said when a rank is lost: which, how, in what exchange, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

DIED = "it has died"
FAILED = "it has ended with an error of its own"
ENDED = "it has ended, or has left this aggregation (its state was dropped, or was loaded anew)"
GAVE_UP = "an error broke off its step"
ELSEWHERE = "it hangs, or is elsewhere in the program"
UNKNOWN = "it has died or hangs, or the network is cut"

_ALIVE = (ENDED, ELSEWHERE, UNKNOWN)  # it may be


class Gone(OSError):
    """A rank that is waited for is lost, and it is known how."""

    def __init__(self, rank: int, how: str, detail: str = "") -> None:
        super().__init__(detail)
        self.rank, self.how = rank, how


class OutOfStep(OSError):
    """A rank sends something else than is expected."""


def lost(me: int, what: object, ranks: Sequence[int], how: str, error: BaseException) -> str:
    """The sentences for a user. No `ranks`: it is not known which."""
    if isinstance(error, OutOfStep):
        return (
            f"grain_ddp: the ranks are not at the same place in the program: {error}, in {what} "
            f"(this is rank {me}). No parameter of this rank has changed in this step. Does every "
            "rank take the same steps, with the same model? GRAIN_DEBUG=1 on every rank tells "
            "where they part."
        )
    who = " and ".join(f"rank {rank}" for rank in ranks) or "another rank"
    hint = says = ""
    if how in _ALIVE:
        hint = (
            " If all ranks live, one runs without the hook, has skipped a step, or has loaded a "
            "state alone."
        )
    if str(error):
        says = f" The backend says: {error}"
    return (
        f"grain_ddp: lost the connection to {who}: {how}. Rank {me} waited for it in {what}. "
        "No parameter of this rank has changed in this step. Look for the first error of all "
        f"ranks, and resume from a checkpoint.{hint}{says}"
    )
