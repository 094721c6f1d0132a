"""The harness can fail: it tells errors, deaths and hangs apart, rank by rank."""

import os
import time

import pytest
import torch.distributed as dist
from harness import RanksFailed, launch, run


def ranks() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("planted")


def one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def one_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def waits_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_values_come_in_rank_order() -> None:
    assert run(3, ranks) == [(0, 3), (1, 3), (2, 3)]


def test_an_error_fails_with_its_rank_and_traceback() -> None:
    with pytest.raises(
        RanksFailed, match=r"rank 1: (?s:.*)in one_raises(?s:.*)KeyError: 'planted'"
    ):
        run(2, one_raises, timeout=3)


def test_a_death_is_told_from_an_error() -> None:
    outcomes = launch(2, one_dies, timeout=3)
    assert outcomes[1].exitcode == 7
    assert outcomes[1].error == "died with exit code 7"


def test_a_hang_ends_at_the_deadline() -> None:
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1: hung(?s:.*)in one_hangs"):
        run(2, one_hangs, deadline=8, timeout=1)
    assert time.monotonic() - begin < 60


def test_a_collective_that_nobody_joins_times_out() -> None:
    outcomes = launch(2, waits_for_nobody, timeout=2)
    assert outcomes[0].failed
