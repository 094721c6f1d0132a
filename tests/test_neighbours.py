"""Ranks of one host: they read each other's memory, where that is possible, and lose nobody."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from ranks import same_everywhere
from test_aggregation import limited
from test_sharded import every_cut

import grain_ddp._wire.memory as memory
import grain_ddp._wire.neighbours as module
import grain_ddp._wire.torch_wire as wire_module
from grain_ddp import GrainState
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._wire.torch_wire import TorchWire


def allowed() -> bool:
    """Whether a process may read another's memory here: a container may forbid it."""
    code = "import ctypes; x = ctypes.c_long(7); print(ctypes.addressof(x), flush=True); input()"
    if not hasattr(os, "memfd_create"):
        return False
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        found, address = torch.zeros(1, dtype=torch.int64), int(other.stdout.readline())
        with contextlib.suppress(OSError):
            memory.copy(other.pid, address, found.data_ptr(), found.nbytes)
        other.communicate("\n")
    return found.item() == 7


pytestmark = pytest.mark.skipif(not allowed(), reason="may not read another process's memory")

CPU = torch.device("cpu")


def met() -> TorchWire:
    wire = TorchWire(dist.group.WORLD)
    wire.meet({})
    return wire


def near(wire: TorchWire) -> list[int]:
    found = wire._near()
    return sorted(found.others) if found else []


def step(wire: TorchWire) -> bool:
    """A step's result, large enough for several pieces, is right and the same everywhere."""
    torch.manual_seed(dist.get_rank())
    gradient = torch.randn(100_003)
    rows = [torch.empty_like(gradient) for _ in range(wire.size)]
    dist.all_gather(rows, gradient)
    aggregation = Aggregation(GrainState(), wire)
    aggregation.push(gradient)
    record = aggregation.finish()
    assert record is not None
    exact = torch.tensor(record.weights) @ torch.stack(rows).double()
    return same_everywhere(gradient) and bool((gradient - exact).norm() <= 1e-6 * exact.norm())


def spoil(what: dict[int, str]) -> None:
    """Something is wrong on some ranks."""
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    match what.get(dist.get_rank()):
        case "switched off":
            os.environ[module.SWITCH] = "0"
        case "may not read":

            def forbid(*_: Any) -> None:
                raise PermissionError("Operation not permitted")

            memory.copy = forbid
        case "no memory":

            def no_file(_: str, flags: int = 0) -> int:
                raise OSError("Function not implemented")

            os.memfd_create = no_file  # type: ignore[assignment]
        case "may not read from the last rank":
            copy = memory.copy

            def forbid_one(process: int, *rest: Any) -> None:
                if process == pids[-1]:
                    raise PermissionError("Operation not permitted")
                copy(process, *rest)

            memory.copy = forbid_one
        case "another process namespace":  # where this number is that of another process
            parent = os.getppid()
            os.getpid = lambda: parent
        case "another host":
            setattr(TorchWire, "host", lambda _: ("another",))  # noqa: B010
        case "another kind of machine":
            memory._FUTEX.clear()


def who(what: dict[int, str]) -> tuple[list[int], bool, bool]:
    """Whom this rank reads from."""
    spoil(what)
    wire = met()
    return near(wire), wire.shares_memory(CPU), step(wire)


SPOILT = [
    "switched off",
    "may not read",
    "no memory",
    "another process namespace",
    "another host",
    "another kind of machine",
]


def test_all_of_them_share_memory() -> None:
    assert run(3, who, {}) == [([1, 2], True, True), ([0, 2], True, True), ([0, 1], True, True)]


@pytest.mark.parametrize("what", SPOILT)
def test_one_of_them_does_not(what: str) -> None:
    assert run(3, who, {1: what}) == [([2], False, True), ([], False, True), ([0], False, True)]


def test_all_agree_on_whether_they_share_memory() -> None:
    """Rank 0 reads from both others, and they from it, but not from each other."""
    every = run(3, who, {1: "may not read from the last rank"})
    assert every == [([1, 2], False, True), ([0], False, True), ([0], False, True)]


def test_two_hosts() -> None:
    every = run(4, who, {1: "another host", 3: "another host"})
    assert [ranks for ranks, _, _ in every] == [[2], [3], [0], [1]]
    assert all(right and not shares for _, shares, right in every)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "bucket"},
    {"wire_dtype": torch.bfloat16},
    {"scope": "bucket", "wire_dtype": torch.bfloat16},
    {"weighting": "mean"},
    {"groups": 2},
    {"groups": [[0, 2], [1, 3]], "scope": "bucket", "wire_dtype": torch.bfloat16},
    {"groups": 4},
]


def every_option(what: dict[int, str], ring_bytes: int) -> list[list[torch.Tensor]]:
    spoil(what)
    wire_module.RING_BYTES = ring_bytes
    return [limited(options, 1 << 14, 3 << 16)[0] for options in OPTIONS]


@pytest.mark.parametrize("ring_bytes", [1, 1 << 30])
@pytest.mark.parametrize("elsewhere", [{0, 1, 2, 3}, {1, 3}, {2, 3}, {0}], ids=str)
def test_the_way_makes_no_difference(elsewhere: set[int], ring_bytes: int) -> None:
    """Bit by bit."""
    by_memory = run(4, every_option, {}, ring_bytes)
    how = "switched off" if len(elsewhere) == 4 else "another host"
    otherwise = run(4, every_option, dict.fromkeys(elsewhere, how), ring_bytes)
    for one, other in zip(by_memory, otherwise, strict=True):
        for results, expected, options in zip(one, other, OPTIONS, strict=True):
            for found, same in zip(results, expected, strict=True):
                assert torch.equal(found, same), options


def sharded(what: dict[int, str]) -> float:
    spoil(what)
    few = {"SLACK": 0, "MESSAGE_BYTES": 256, "SCRATCH_BYTES": 2000}
    return every_cut([{"scope": "global"}, {"scope": "bucket"}], [few])


@pytest.mark.parametrize("elsewhere", [{0, 1, 2}, {1}], ids=str)
def test_shards_by_another_way(elsewhere: set[int]) -> None:
    assert max(run(3, sharded, dict.fromkeys(elsewhere, "switched off"))) < 1e-5


def laps() -> None:
    """More exchanges than the ring has slots, out of order; then too many at once."""
    module.SLOTS = 4
    wire = met()
    me, other = wire.rank, 1 - wire.rank
    for k in range(10):
        pending = []
        for i in range(4):
            send, receive = torch.full((2, 2), 100.0 * me + 10 * k + i), torch.zeros(2, 2)
            pending.append((wire.exchange(list(send), list(receive)), receive, 10 * k + i))
        for transfer, receive, value in reversed(pending):
            transfer.arrive()
            assert receive[other].tolist() == [100.0 * other + value] * 2
        for transfer, _, _ in pending:
            transfer.wait()
    wires = [wire.among([0, 1], 1), wire.among([0, 1], 2), wire]  # each counts its own
    held = []
    for each in wires:
        for _ in range(4):
            each.exchange([torch.zeros(1)] * 2, [torch.zeros(1)] * 2)  # dropped, as by an error
        for _ in range(4):
            held.append(each.exchange([torch.zeros(1)] * 2, [torch.zeros(1)] * 2))
    for each in wires:
        with pytest.raises(RuntimeError, match=f"more than 4 messages.*{module.SWITCH}=0"):
            each.exchange([torch.zeros(1)] * 2, [torch.zeros(1)] * 2)


def test_laps_of_exchanges() -> None:
    run(2, laps)


def out_of_step() -> str:
    wire = met()
    length = 3 + wire.rank
    with pytest.raises(RuntimeError) as found:
        wire.exchange([torch.zeros(length)] * 2, [torch.zeros(length)] * 2, "the test").wait()
    return str(found.value)


def test_ranks_out_of_step() -> None:
    """The rank that sees it first says what it is, and the other one that that one has given up."""
    found = " ".join(run(2, out_of_step))
    assert re.search(r"expected 1[26] bytes from rank [01], but found 1[26], in the test", found)
    found = found.replace("an error broke off its step", "not at the same place in the program")
    assert found.count("not at the same place in the program") == 2


def losing(how: str) -> float:
    """Seconds until this rank knows that rank 1 is lost."""
    wire = met()
    assert wire.shares_memory(CPU)
    dist.barrier()
    tensors = [torch.zeros(9)] * 3, [torch.zeros(9)] * 3
    if wire.rank == 1:
        if how == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "dies later":
            wire.exchange(*tensors)
        os._exit(3)
    begin = time.monotonic()
    words = "it hangs, or is elsewhere" if how == "is stopped" else "it has died"
    with pytest.raises(RuntimeError, match=f"lost the connection to rank 1: {words}"):
        wire.exchange(*tensors).wait()
    return time.monotonic() - begin


@pytest.mark.parametrize("how", ["dies", "dies later"])
def test_a_dead_rank_is_missed_at_once(how: str) -> None:
    outcomes = launch(3, losing, how, timeout=9)
    assert outcomes[1].exitcode == 3
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        assert outcomes[rank].value < 7


def test_a_rank_that_hangs_is_missed_after_the_timeout() -> None:
    outcomes = launch(3, losing, "is stopped", timeout=3, deadline=11)
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        assert 3 <= outcomes[rank].value < 8


def patience() -> None:
    """The timeout that counts is the process group's, also when it is changed later."""
    wire = met()
    found = wire._near()
    assert found is not None
    assert found.timeout() == 20
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=7), dist.group.WORLD)
    assert found.timeout() == 7


def test_the_process_groups_timeout() -> None:
    run(2, patience)


def in_parts() -> bool:
    """As the kernel does from 2 GiB on: a call copies only a part."""
    libc = memory._libc()

    class Partial:
        def process_vm_readv(self, process: int, here: Any, _: int, there: Any, *rest: int) -> int:
            here._obj.length = there._obj.length = min(here._obj.length, 1000)
            return int(libc.process_vm_readv(process, here, 1, there, *rest))

        def __getattr__(self, name: str) -> Any:
            return getattr(libc, name)

    memory._libc = Partial  # type: ignore[assignment]
    wire = met()
    return wire.shares_memory(CPU) and step(wire)


def test_a_message_copied_in_parts() -> None:
    assert run(2, in_parts) == [True, True]


def leaving(how: str) -> str:
    wire = met()
    dist.barrier()
    if wire.rank == 1:
        if how == "fails":
            sys.last_value = ValueError("as Python has it after a traceback")
        if how == "gives up":
            transfer = wire.exchange([torch.zeros(9)] * 2, [torch.zeros(8)] * 2)
            with pytest.raises(RuntimeError):
                transfer.wait()
            del transfer
        elif how == "is dropped":
            del wire
        else:
            wire.close()
        return ""
    with pytest.raises(RuntimeError) as found:
        wire.exchange([torch.zeros(9)] * 2, [torch.zeros(9)] * 2, "the test").wait()
    return str(found.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("ends", "rank 1: it has ended, or has left this aggregation"),
        ("is dropped", "rank 1: it has ended, or has left this aggregation"),
        ("fails", "rank 1: it has ended with an error of its own"),
        ("gives up", "rank 1: an error broke off its step"),
    ],
)
def test_who_leaves_is_told_from_who_dies(how: str, words: str) -> None:
    assert words in run(2, leaving, how)[0]


# Its rank 1 comes to its end before rank 0 does.
PROGRAM = """
import sys, torch, torch.distributed as dist
from grain_ddp._wire.torch_wire import TorchWire
rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
wire = TorchWire(dist.group.WORLD)
wire.meet({})
if rank == 0:
    wire.exchange([torch.zeros(1)] * 2, [torch.zeros(1)] * 2).wait()
if len(sys.argv) > 3:
    raise KeyError("planted")
"""


@pytest.mark.parametrize("error", [[], ["error"]])
def test_a_program_that_ends(error: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), *error],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    words = "rank 1: it has ended with an error" if error else "rank 1: it has ended, or"
    assert words in said[0], said


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """What another process has where a board should be is not opened, nor changed."""
    mine, mark = os.getpid(), memory.Mark()
    right = memory.create(mark.value)
    opened = memory.open_theirs(mine, right, mark.value)
    memory.map_own(right, 4096)
    with pytest.raises(OSError, match="expected a file of 8192 bytes, but found 4096"):
        memory.map_theirs(opened, 8192)
    assert os.fstat(right).st_size == 4096
    with pytest.raises(TypeError):
        memory.map_theirs(opened, 4096)[0] = 1  # it is for reading
    other = memory.create(mark.value + 1)
    (tmp_path / "file").write_bytes(b"theirs")
    file, (pipe, end) = os.open(tmp_path / "file", os.O_RDWR), os.pipe()
    for wrong in (other, file, pipe):
        with pytest.raises(OSError, match="another file"):
            memory.open_theirs(mine, wrong, mark.value)
    assert os.fstat(other).st_size == 0
    assert (tmp_path / "file").read_bytes() == b"theirs"
    with pytest.raises(ProcessLookupError):
        memory.check_mark(mine, mark.address, mark.value + 1)
    for one in (right, opened, other, file, pipe, end):
        os.close(one)


def test_another_users_file(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = memory.Mark()
    file = memory.create(mark.value)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(OSError, match="another file"):
        memory.open_theirs(os.getpid(), file, mark.value)
    os.close(file)


def test_the_memory_of_a_board() -> None:
    """docs/clusters.md says so."""
    for ranks, megabytes in ((2, 0.2), (8, 0.6)):
        file = memory.create(memory.Mark().value)
        size = module._Board.size(ranks)
        board = module._Board(memory.map_own(file, size), ranks)
        board.posted[: module.SLOTS] = board.read[: module.SLOTS] = 1
        board.messages[: module.SLOTS] = 1
        assert os.fstat(file).st_blocks * 512 == pytest.approx(megabytes * 1e6, rel=0.2)
        assert size <= 3 * megabytes * 1e6
        os.close(file)


def under_yama(folder: str, asks: bool) -> None:
    """Whom this rank names to Yama: of two ranks and of three, and as their wires are closed."""
    told: list[int] = []
    libc = memory._libc()

    class Listening:
        def prctl(self, _: int, process: int, *rest: int) -> int:
            told.append(process)
            return 0

        def __getattr__(self, name: str) -> Any:
            return getattr(libc, name)

    memory._libc = Listening  # type: ignore[assignment]
    memory._YAMA = str(Path(folder, "scope"))
    if not asks:
        met().close()
        assert told == []
        return
    parent, everyone = os.getppid(), [0] * dist.get_world_size()
    dist.all_gather_object(everyone, os.getpid())
    two = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        near = TorchWire(two)
        near.meet({})
        assert near.shares_memory(CPU)
        assert told == [everyone[1 - dist.get_rank()]]
        near.close()
        assert told.pop() == 0
        told.clear()
    wire, other = met(), met()
    assert told == [parent] * 2
    wire.close()
    assert told[2:] == [parent]  # there is another one
    del other
    assert told[3:] == [0]


def test_memory_is_opened_to_the_ranks_while_the_wire_is_open(tmp_path: Path) -> None:
    (tmp_path / "scope").write_text("1\n")
    run(3, under_yama, str(tmp_path), True)


def test_where_yama_does_not_ask_nothing_is_opened(tmp_path: Path) -> None:
    (tmp_path / "scope").write_text("0\n")
    run(2, under_yama, str(tmp_path), False)


def test_ranks_without_a_launcher_in_common() -> None:
    assert memory._reader(frozenset([os.getpid()])) == os.getpid()
    assert memory._reader(frozenset([os.getpid(), os.getppid()])) == os.getppid()
    assert memory._reader(frozenset([os.getpid(), 2**22 + 1])) == -1  # anyone
