"""What happens when a rank is lost, errs or goes another way: the same faults in every integration.

docs/faults.md says which of these tests shows what.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
import torch.distributed as dist
from harness import Outcome, launch, run
from ranks import loss, network
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grain_ddp import GrainState, grain_hook, reduce_gradients
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.agreement import Marks
from grain_ddp._core.state import GrainState as State
from grain_ddp._wire.neighbours import SWITCH
from grain_ddp._wire.thread_wire import run as run_threads
from grain_ddp._wire.torch_wire import TorchWire

TIMEOUT = 3.0
FAULTS = ("amid", "after", "between", "inside")
STOPPED = ("ddp", "fsdp")  # tests/test_deepspeed_faults.py stops ranks of DeepSpeed's


def available(name: str) -> bool:
    if name == "fsdp":
        return hasattr(FSDPModule, "set_custom_reduce_scatter")
    if name.startswith("zero"):
        deepspeed = pytest.importorskip("deepspeed")
        version = tuple(map(int, deepspeed.__version__.split(".")[:3]))
        return name != "zero3" or version >= (0, 19, 8)
    return True


# Integrations under faults. Every pair of ranks is a world of its own, and has a fault of its own.


def plant(fault: str, name: str, net: nn.Module, step: int) -> None:
    """Let this rank meet the fault in the third step."""
    kill, advance, exchange = signal.SIGKILL, State.advance, TorchWire.exchange
    if step != 2:
        return
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "amid":  # in the step's second exchange
        calls = iter((False, True))

        def dying(self: Any, *arguments: Any) -> Any:
            if next(calls):
                os.kill(os.getpid(), kill)
            return exchange(self, *arguments)

        TorchWire.exchange = dying  # type: ignore[method-assign]
    elif fault == "after":

        def last(self: Any, record: Any) -> None:
            advance(self, record)
            os.kill(os.getpid(), kill)

        State.advance = last  # type: ignore[method-assign]
    elif fault == "between":

        def planted(*_: Any) -> None:
            raise ArithmeticError("planted")

        if name.startswith("zero"):
            import deepspeed

            deepspeed.DeepSpeedEngine.step = planted
        else:
            register_optimizer_step_pre_hook(planted)
    elif fault == "inside":
        layer: Any = getattr(net, "module", net)[1]
        layer.register_forward_hook(lambda _m, _i, out: out.register_hook(fail) and None)


def fail(gradient: torch.Tensor) -> None:
    raise ArithmeticError("planted")


def stored(net: nn.Module) -> list[torch.Tensor]:
    """What this rank stores of the parameters, as bits: what pads a shard may be NaN."""
    found = []
    for unit in net.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    for p in net.parameters():
        one: Any = getattr(p, "ds_tensor", p)
        local = getattr(one, "to_local", lambda one=one: one)().detach()
        found.append(local.clone().view(torch.uint8))
    return found


def faulty(name: str, faults: list[str], folder: str) -> Any:
    """What the first rank of each pair saw: its error, after which time, and whether its parameters
    are those of before the step."""
    pair, rank = divmod(dist.get_rank(), 2)
    fault = faults[pair]
    dist.barrier()  # all have made it
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ[SWITCH] = "0" if fault in ("amid", "between") else "1"
    store = dist.FileStore(str(Path(folder, fault)), 2)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    processes: list[Any] = [None, None]
    dist.all_gather_object(processes, os.getpid())
    net, step = soak.made(name)
    before = stored(net)
    try:
        for number in range(4):
            before, start = stored(net), time.monotonic()
            if rank == 1:
                plant(fault, name, net, number)
            step(number)
    except (RuntimeError, ValueError) as error:
        if rank == 1:
            raise
        spent = time.monotonic() - start
        same = all(torch.equal(*both) for both in zip(before, stored(net), strict=True))
        return fault, number, str(error), spent, same
    finally:
        if fault == "stopped" and rank == 0:
            os.kill(processes[1], signal.SIGKILL)
    raise AssertionError(f"{fault}: the second rank is not missed")


NAMES = ["ddp", "loop", "fsdp", "zero0", "zero3"]  # stages 1 and 2 do as 3


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_is_lost(name: str, tmp_path: Path) -> None:
    """Killed in the exchange or after it, stopped, or by an exception of the user's: the others get
    an error within the timeout that says which rank, and no parameter of theirs has changed."""
    if not available(name):
        pytest.skip("not with this version")
    faults = [*FAULTS, *(["stopped"] if name in STOPPED else [])]
    outcomes = launch(2 * len(faults), faulty, name, faults, str(tmp_path), deadline=60)
    for first, second in zip(outcomes[::2], outcomes[1::2], strict=True):
        assert first.error is None, first.error
        fault, number, error, spent, same = first.value
        check_second(second, fault)
        assert spent < 3 * TIMEOUT, (fault, error)
        # FSDP and DeepSpeed have collectives of their own before or after those of gradients.
        own = name not in ("ddp", "loop") and fault not in ("amid", "inside")
        assert "rank 1: it " in error or own, (fault, error)
        if not (own and name.startswith("zero")):  # there DeepSpeed may have begun to step
            assert number == (3 if fault in ("after", "between") else 2), (fault, error)
            assert same, fault


def check_second(second: Outcome, fault: str) -> None:
    if fault in ("between", "inside"):
        assert "ArithmeticError: planted" in str(second.error)
    else:
        assert second.exitcode == -signal.SIGKILL, second.error


# Ranks that go another way


def in_another_order(memory: str) -> list[str]:
    """Two models, and at the second step one rank takes the second model first."""
    os.environ[SWITCH] = memory
    found = []
    for ddp, width in ((True, 30), (True, 41), (False, 30)):
        nets: list[Any] = [nn.Linear(50, 30), nn.Linear(50, width)]
        states = [GrainState() for _ in nets]
        if ddp:
            nets = [DistributedDataParallel(net) for net in nets]
            for net, state in zip(nets, states, strict=True):
                net.register_comm_hook(state, grain_hook)
        for number in range(2):
            pairs = list(zip(nets, states, strict=True))
            try:
                for net, state in pairs[::-1] if number and dist.get_rank() else pairs:
                    net(torch.ones(2, 50)).square().mean().backward()
                    if not ddp:
                        reduce_gradients(net.parameters(), state)
            except ValueError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("memory", ["1", "0"])
def test_models_in_another_order(memory: str) -> None:
    for found in run(2, in_another_order, memory, timeout=10):
        assert len(found) == 3
        words = "grain_ddp: the model must be the same on every rank, but it is rank 0: 'model "
        assert all(words in error for error in found)
        assert "the DDP model Linear of 1,530 parameters', rank 1: 'model " in found[0]
        assert "the DDP model Linear of 2,091 parameters' (this is rank" in found[1]
        assert "reduce_gradients of 2 parameters, 1,530 elements" in found[2]


def marked(wire: Any) -> tuple[bool, str]:
    """As on a GPU, one rank at another step: what the start of the next step says."""
    wire.meet({})
    marks = Marks(wire, "a model")
    marks.begin(3 + wire.rank)
    own = marks.numbers(torch.device("cpu"))
    transfer, rows = wire.sum(own)
    transfer.wait()
    marks.compare(own, rows.sum(0), later=True)
    with pytest.raises(ValueError, match="the number of the step differed between ranks") as error:
        marks.begin(9)
    marks.begin(9)
    return True, str(error.value)


def test_marks_that_are_looked_at_later() -> None:
    for rank, (_, error) in enumerate(run_threads(3, marked)):
        assert f"in step {3 + rank} (this is rank {rank})" in error


def other_layouts(wire: Any) -> None:
    """Messages of the same bytes."""
    one = wire.rank == 1
    aggregation = Aggregation(GrainState(), wire)
    aggregation.push(
        torch.ones(200 if one else 100, dtype=torch.bfloat16 if one else torch.float32)
    )
    aggregation.finish()


def test_buckets_that_differ() -> None:
    for error in run_threads(2, other_layouts):
        words = "the buckets of the step must be the same on every rank, but it is rank 0: ['100 x"
        assert words in str(error)


def alone(memory: str, ddp: bool, what: str) -> None:
    """The second rank goes without the hook, loads other options, or catches an exception of its
    own in the backward pass."""
    os.environ[SWITCH] = memory
    state, model, second = GrainState(), network(), dist.get_rank() == 1
    wrapped: Any = model
    if ddp:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.002)
        if not (second and what == "no hook"):
            wrapped.register_comm_hook(state, grain_hook)
    for number in range(3):
        if number == 2 and second and what == "loads":
            state.load_state_dict({**state.state_dict(), "cap": 2})
        if number == 2 and second and what == "catches":
            handle = model[1].register_forward_hook(
                lambda _m, _i, out: out.register_hook(fail) and None
            )
            with contextlib.suppress(ArithmeticError):
                loss(wrapped, number).backward()
            handle.remove()
            wrapped.reducer._reset_state()
        loss(wrapped, number).backward()
        if not ddp:
            reduce_gradients(model.parameters(), state)


@pytest.mark.parametrize(
    ("memory", "ddp", "what"),
    [
        ("1", True, "loads"),
        ("0", False, "loads"),
        ("1", True, "no hook"),
        ("0", True, "catches"),
    ],
)
def test_a_rank_that_goes_alone(memory: str, ddp: bool, what: str) -> None:
    first, second = launch(2, alone, memory, ddp, what, timeout=TIMEOUT)
    for outcome in (first,) if what == "no hook" else (first, second):
        assert "grain_ddp: lost the connection to rank " in str(outcome.error)
        assert "has loaded a state alone" in str(outcome.error)
    assert second.error is not None


# Another number of ranks after a restart

GROUPS: list[Any] = ["rank", 2, [[0, 2], [1, 3]]]


def grouped_step(wire: Any, saved: list[dict[str, Any]] | None) -> list[Any]:
    """For each kind of groups: the state after a step, or the error."""
    found: list[Any] = []
    for k, groups in enumerate(GROUPS):
        state = GrainState(groups=groups)
        if saved:
            state.load_state_dict(saved[k])
        try:
            aggregation = Aggregation(state, wire)
            aggregation.push(torch.arange(100.0) * (1 + wire.rank))
            record = aggregation.finish()
        except ValueError as error:
            found.append(str(error))
            continue
        assert record is not None
        found.append((state.state_dict(), len(record.weights), record.step))
    return found


def test_groups_after_a_restart_with_another_number_of_ranks() -> None:
    """They are built anew from what the option says, or refused with the reason."""
    before = run_threads(4, grouped_step, None)[0]
    assert [found[1:] for found in before] == [(4, 0), (2, 0), (2, 0)]
    saved = [state for state, _, _ in before]
    for n in (2, 3):
        for each, blocks, lists in run_threads(n, grouped_step, saved):
            assert each[1:] == (n, 1)
            assert blocks[1:] == (n - 1, 1)
            assert f"groups must name each of the {n} ranks once" in lists


# Many steps


def soaked(steps: int) -> None:
    gc.freeze()  # what was imported before is not looked at
    for name in NAMES:
        if available(name):
            grown = soak.grown(*soak.soak(soak.made(name)[1], steps), mib=4)
            assert not grown, (name, grown)


def test_nothing_grows() -> None:
    """docs/benchmarks/soak.md has 10,000 steps of each."""
    run(2, soaked, 100, deadline=120)
