"""The wires, as one battery: what is sent arrives, sums are equal everywhere, and disagreement, or
a rank that is lost, is told everywhere."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from ranks import SIZES
from ways import MPI_RANKS, WAYS, end_mpi, play, values

import grain_ddp
import grain_ddp._wire.torch_wire as torch_wire
import grain_ddp._wire.wire as module
from grain_ddp import GrainState
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._wire.thread_wire import run as run_threads
from grain_ddp._wire.torch_wire import TorchWire
from grain_ddp._wire.wire import Wire

CPU = torch.device("cpu")
CASES = [(way, n) for way in WAYS for n in SIZES if way != "mpi" or n <= MPI_RANKS]


@pytest.fixture(scope="module", autouse=True)
def _mpi() -> Iterator[None]:
    yield
    end_mpi()


@contextmanager
def setting(where: Any, name: str, value: Any) -> Iterator[None]:
    """For ranks that are threads, or serve several tests."""
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def exchanged(wire: Wire) -> bool:
    """Of different lengths, empty ones too, and several at once, waited for in another order."""
    wire.meet({})
    rank, n = wire.rank, wire.size
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        pending = []
        for k in range(3):
            send = [torch.full((3 * i + k * rank,), 100 * rank + i).to(dtype) for i in range(n)]
            receive = [torch.full((3 * rank + k * i,), -1).to(dtype) for i in range(n)]
            pending.append((wire.exchange(send, receive), receive, k))
        for transfer, receive, k in reversed(pending):
            transfer.wait()
            for i, found in enumerate(receive):
                value = -1 if i == rank else 100 * i + rank
                assert torch.equal(found, torch.full((3 * rank + k * i,), value).to(dtype))
    return wire.shares_memory(CPU)


@pytest.mark.parametrize(("way", "n"), CASES)
def test_exchange(way: str, n: int) -> None:
    assert values(way, n, exchanged) == [way == "memory" and n > 1] * n


def gathered(wire: Wire) -> bool:
    """At once, and by a ring where there is one; over all ranks and over some."""
    wire.meet({})
    me = wire.rank
    half = wire.among([2, 0] if me % 2 == 0 else [1, 3], 1)
    assert half.whole is wire
    for least in (1, 1 << 30):
        with setting(torch_wire, "RING_BYTES", least):
            for some in (wire, half):
                own = torch.full((1000,), float(some.ranks[some.rank]))
                parts = [torch.zeros(1000) for _ in range(some.size)]
                parts[some.rank] = own
                transfer = some.gather(own, parts)
                while transfer.advance():
                    pass
                transfer.wait()
                for rank, part in zip(some.ranks, parts, strict=True):
                    assert torch.equal(part, torch.full((1000,), float(rank)))
    return True


@pytest.mark.parametrize("way", WAYS)
def test_gather(way: str) -> None:
    assert values(way, 4, gathered) == [True] * 4


def total(wire: Wire, limit: int) -> Any:
    wire.meet({})
    generator = torch.Generator().manual_seed(wire.rank)
    mine = torch.randn(10, dtype=torch.float64, generator=generator) ** 3
    rows = None
    with setting(module, "_GATHER_LIMIT", limit):
        transfer, rows = wire.sum(mine.clone())
        transfer.wait()
        same = [wire.same(text) for text in ("x", str(wire.rank), str(wire.rank == wire.size - 1))]
    return mine.numpy(), rows.sum(0).numpy(), same


@pytest.mark.parametrize(("way", "n"), CASES)
@pytest.mark.parametrize("limit", [1, 32])  # 1: by an all-reduce
def test_sum_and_same(way: str, n: int, limit: int) -> None:
    every = values(way, n, total, limit)
    exact = torch.stack([torch.tensor(mine) for mine, _, _ in every]).sum(0)
    for _, summed, same in every:
        assert summed.tobytes() == every[0][1].tobytes()
        torch.testing.assert_close(torch.tensor(summed), exact)
        assert same == ([True] * 3 if n == 1 else [True, False, False])


def agreed(wire: Wire, version: bool) -> None:
    with setting(grain_ddp, "__version__", "0.0.1" if version and wire.rank == 1 else "0.1.0"):
        wire.meet({"fine": 1, "second": wire.rank // 2, "first": wire.rank})


@pytest.mark.parametrize("way", WAYS)
def test_the_first_difference_is_told_on_every_rank(way: str) -> None:
    if way != "threads":  # whose module is one
        for outcome in play(way, 3, agreed, True):
            words = "the version of grain_ddp must be the same on every rank, but it is rank 0: "
            assert words + "'0.1.0', rank 1: '0.0.1'" in str(outcome.error)
    for outcome in play(way, 3, agreed, False):
        words = "second must be the same on every rank, but it is rank 0: 0, rank 1: 0, rank 2: 1"
        assert words in str(outcome.error)
        assert f"this is rank {outcome.rank}" in str(outcome.error)


def many(wire: Wire) -> None:
    wire.agree({"thing": wire.rank > 7})


def test_of_many_ranks_the_first_of_each_value_is_told() -> None:
    for outcome in play("threads", 12, many):
        assert "but it is rank 0: False, rank 8: True (this is" in str(outcome.error)


def objects(wire: Wire) -> Any:
    wire.meet({})
    every = wire.gather_objects(["x" * 1000 * wire.rank, wire.rank])
    assert [len(text) for text, _ in every] == [1000 * j for j in range(3)]
    wire.gather_objects(1, "the first thing" if wire.rank else "the second thing")


@pytest.mark.parametrize("way", WAYS)
def test_objects_and_ranks_at_different_places(way: str) -> None:
    for outcome in play(way, 3, objects):
        assert "the place in the program must be the same" in str(outcome.error)
        assert "rank 0: 'the second thing', rank 1: 'the first thing'" in str(outcome.error)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "bucket", "wire_dtype": torch.bfloat16},
    {"groups": [[0, 2], [1, 3]]},
    {"weighting": "mean"},
]


def steps(wire: Wire) -> bytes:
    found = []
    for options in OPTIONS:
        generator = torch.Generator().manual_seed(wire.rank)
        aggregation = Aggregation(GrainState(**options), wire)
        buckets = [torch.randn(length, generator=generator) for length in (1003, 10)]
        for bucket in buckets:
            aggregation.push(bucket)
        aggregation.finish()
        found += [bucket.numpy() for bucket in buckets]
    return pickle.dumps(found)


def test_a_step_is_the_same_on_every_wire() -> None:
    """Bit by bit."""
    assert len({found for way in WAYS for found in values(way, 4, steps)}) == 1


# GRAIN_DEBUG


def debugged(wire: Wire, what: str) -> None:
    os.environ[module.DEBUG] = "1"
    wire.meet({})
    os.environ.pop(module.DEBUG, None)  # another rank may be a thread, or a test come after this
    n, one = wire.size, wire.rank == 1
    length = 4 if one and what == "shape" else 3
    dtype = torch.float64 if one and what == "dtype" else torch.float32
    send, receive = ([torch.zeros(k, dtype=dtype)] * n for k in (3, length))
    assert wire.checking
    wire.exchange([torch.ones(2)] * n, [torch.zeros(2) for _ in range(n)], "the first").wait()
    if one and what == "kind":
        wire.all_reduce(torch.zeros(3), "the second").wait()
    elif one and what == "skip":
        wire.exchange(send, receive, "the third").wait()
    else:
        wire.exchange(send, receive, "the second").wait()


WORDS = {
    "shape": "rank 0 sends rank 1 a tensor of shape (3,), but that expects (4,), in exchange 2 of",
    "dtype": "the second, torch.float32', rank 1: 'exchange 2 of model",
    "kind": "the second, torch.float32', rank 1: 'sum 2 of model",
    "skip": "the second, torch.float32', rank 1: 'exchange 2 of model",
}


@pytest.mark.parametrize("way", WAYS)
def test_debugging(way: str) -> None:
    assert values(way, 3, debugged, "") == [None] * 3
    for what, words in WORDS.items():
        for outcome in play(way, 3, debugged, what):
            assert "grain_ddp: " in str(outcome.error)
            assert words in str(outcome.error), (what, outcome.error)


def two_models() -> None:
    os.environ[module.DEBUG] = "1"
    wires = [TorchWire(dist.group.WORLD) for _ in range(2)]
    for wire in wires:
        wire.meet({})
    for wire in wires if dist.get_rank() == 0 else reversed(wires):
        wire.exchange([torch.ones(2)] * 2, [torch.zeros(2) for _ in range(2)], "columns").wait()


def test_debugging_of_models_in_another_order() -> None:
    for outcome in launch(2, two_models):
        words = "it is rank 0: 'exchange 1 of model 1, columns, torch.float32', rank 1: 'exchange 1"
        assert f"{words} of model 2, columns" in str(outcome.error)


# A rank that is lost


def losing(wire: Wire, where: str) -> Any:
    if where != "meet":
        wire.meet({})
        wire.same("")  # it has begun on every rank
    if wire.rank == 1:
        if isinstance(wire, TorchWire):
            os._exit(3)
        return None
    tensors = [torch.zeros(9)] * 3, [torch.zeros(9)] * 3
    call = {
        "meet": lambda: wire.meet({}),
        "exchange": lambda: wire.exchange(*tensors, "columns of bucket 3").wait(),
        "same": lambda: wire.same("x"),
        "objects": lambda: wire.gather_objects(1, "something"),
        "sum": lambda: wire.sum(torch.zeros(3))[0].wait(),
        "reduce": lambda: wire.all_reduce(torch.zeros(3), "the mean").wait(),
        "gather": lambda: wire.gather(torch.zeros(9), tensors[1]).wait(),
    }[where]
    with pytest.raises(RuntimeError) as found:
        call()
    return str(found.value)


NAMES = {
    "meet": "the comparison of options",
    "exchange": "columns of bucket 3",
    "same": "a comparison",
    "objects": "something",
    "sum": "the Gramian",
    "reduce": "the mean",
    "gather": "a gather",
}


@pytest.mark.parametrize("where", NAMES)
@pytest.mark.parametrize("way", ["threads", "memory", "network"])
def test_a_lost_rank_is_named(way: str, where: str) -> None:
    how = {"threads": "it has ended", "memory": "it has died.", "network": "it has died or hangs"}
    if where == "meet":  # nobody knows the others yet
        how["memory"] = how["network"]
    options = {} if way == "threads" else {"timeout": 9}
    outcomes = play(way, 3, losing, where, **options)
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        assert f"rank 1: {how[way]}" in outcomes[rank].value
        assert f"Rank {rank} waited for it in {NAMES[where]}." in outcomes[rank].value


# Threads


def all_wait(wire: Wire) -> None:
    receive = [torch.zeros(0)] * 3
    receive[(wire.rank + 1) % 3] = torch.zeros(2)
    wire.exchange([torch.zeros(0)] * 3, receive, "the test").wait()


def test_threads_that_all_wait_end_at_once() -> None:
    errors = [str(error) for error in run_threads(3, all_wait)]
    assert any("it hangs, or is elsewhere in the program. " in error for error in errors)
    assert all("in the test" in error for error in errors)


def hangs(wire: Wire, event: Any) -> None:
    event.wait()


def test_threads_have_a_deadline() -> None:
    import threading

    event = threading.Event()
    with pytest.raises(TimeoutError, match=r"not done by the deadline(?s:.*)in hangs"):
        run_threads(2, hangs, event, deadline=0.3)
    event.set()


# Groups of torch.distributed


def new_group() -> Any:
    parent = dist.new_group([0, 2, 1], timeout=timedelta(seconds=7))
    made = torch_wire.new_group(parent, [2, 1])
    cpu = made._get_backend(CPU)
    reduced = torch.ones(1)
    dist.all_reduce(reduced, group=made)
    config = dist.get_backend_config
    found = dist.get_process_group_ranks(made), cpu.options._timeout, reduced.item()
    return *found, made.group_desc, config(made) == config(parent)


def test_a_group_takes_what_its_parent_has() -> None:
    """Of three ranks, whose parent has another order, two make one."""
    for rank, found in enumerate(run(3, in_new_group)):
        if rank:
            assert found == ([1, 2], timedelta(seconds=7), 2.0, "grain_ddp exchange", True)


def in_new_group() -> Any:
    if dist.get_rank() == 0:
        dist.new_group([0, 2, 1], timeout=timedelta(seconds=7))
        return None
    return new_group()
