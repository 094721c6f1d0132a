"""MPI: a program of five ranks and one of two, started by mpiexec; their results are judged here.

MPIEXEC names another mpiexec than the one of this Python's environment.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import min_norm_point, min_norm_weights

ROOT = Path(__file__).resolve().parents[1]
RANKS = 5
LENGTH = 20_011  # a prime: no number of ranks divides it
DEADLINE = 120  # seconds
BOUNDS = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-12}


def gradient(rank: int, dtype: str = "float32") -> Any:
    """Correlated between ranks, of different norms: no corner of the simplex."""
    common = np.random.default_rng(100).standard_normal(LENGTH)
    own = np.random.default_rng(rank).standard_normal(LENGTH)
    return ((0.3 * common + own) * (1 + rank / 4)).astype(dtype)


# What the ranks do: each function is a case, and what it returns is judged by its test.


def case_sizes(world: Any) -> Any:
    from grain_ddp.mpi import reduce_gradient

    found = {}
    for n in range(1, RANKS + 1):
        comm = world.Split(0 if world.rank < n else 1)
        for dtype in BOUNDS:
            array = gradient(comm.rank, dtype)
            record = reduce_gradient(array, comm)
            found[n, dtype] = (array, record) if world.rank < n else None
        comm.Free()
    return found


def case_options(world: Any) -> Any:
    import torch

    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    found = {}
    for name, options in {
        "cap": {"cap": 1.5},
        "bucket": {"scope": "bucket"},
        "bf16": {"wire_dtype": torch.bfloat16},
        "fp16": {"wire_dtype": torch.float16},
        "sketch": {"sketch": LENGTH},
        "groups": {"groups": 2},
        "sketch and groups": {"sketch": LENGTH, "groups": 2},
    }.items():
        array = gradient(world.rank).reshape(-1, 1)
        found[name] = array, reduce_gradient(array, world, GrainState(**options))
    return found


def case_mean(world: Any) -> Any:
    """The second of two steps makes no record, and is a plain all-reduce."""
    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    found = {}
    for dtype in BOUNDS:
        state = GrainState(weighting="mean", record_every=2)
        for step in range(2):
            array = gradient(world.rank, dtype)
            record = reduce_gradient(array, state=state)
            assert (record is None) == (step == 1)
            found[dtype, step] = array
    expected = np.empty(LENGTH, "float32")
    world.Allreduce(gradient(world.rank), expected)
    return found, expected / RANKS


def case_absent(world: Any) -> Any:
    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    some = gradient(world.rank) * (world.rank not in (1, 3))
    record = reduce_gradient(some)
    none = np.zeros(7)
    reduce_gradient(none)
    broken = gradient(world.rank)
    if world.rank == 2:
        broken[5] = np.nan
    dropping = reduce_gradient(broken, state=GrainState(nonfinite="drop"))
    spread = broken * 1
    spread[0] = np.inf if world.rank == 2 else 1
    reduce_gradient(spread)
    return some, record, none, broken, dropping, spread


def case_state(world: Any) -> Any:
    """Steps are counted per communicator, or in the state that is given."""
    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    half = world.Split(world.rank % 2)
    state = GrainState()
    steps = []
    for _ in range(2):
        steps.append(reduce_gradient(gradient(world.rank), half).step)
        steps.append(reduce_gradient(gradient(world.rank), half, state).step)
    copy = state.owner.aggregation.wire.comm
    half.Free()
    from mpi4py import MPI

    return steps, state.step, copy == MPI.COMM_NULL


def case_soak(world: Any) -> Any:
    """What has grown in a hundred steps."""
    sys.path.append(str(ROOT / "docs/benchmarks"))
    import soak

    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    state, array = GrainState(), gradient(world.rank)[:700].copy()
    found = soak.soak(lambda step: reduce_gradient(array + step, world, state) and None, 100)
    return soak.grown(*found, mib=4)


def case_another_order(world: Any) -> Any:
    """Two states of one communicator, and one rank takes the second first: the error."""
    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    states = [GrainState(), GrainState()]
    for state in states:
        reduce_gradient(gradient(world.rank), world, state)
    try:
        reduce_gradient(gradient(world.rank), world, states[world.rank == 1])
    except ValueError as error:
        return str(error)
    return "no error"


def case_errors(world: Any) -> Any:
    """Every way to be wrong, on one rank or on all: the errors; then a step that is right."""
    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    one = world.rank == 1
    good = gradient(world.rank)
    used, elsewhere, grouped = GrainState(), GrainState(), GrainState(groups=[[0, 1]])
    reduce_gradient(good.copy(), state=used)
    half = world.Split(world.rank % 2)
    reduce_gradient(good.copy(), half, elsewhere)
    fixed = good.copy()
    fixed.flags.writeable = False
    attempts = {
        "options": (good, GrainState(cap=2.0 if one else None)),
        "lengths": (good[: 7 if one else None], None),
        "dtypes": (good.astype("float64") if one else good, None),
        "one strided": (good[::2] if one else good[: LENGTH // 2 + 1], None),
        "all strided": (good[::2], None),
        "integers": (np.arange(10), None),
        "swapped": (good.astype(">f4"), None),
        "fixed": (fixed, None),
        "empty": (good[:0], None),
        "list": ([1.0, 2.0], None),
        "one new state": (good, GrainState() if one else used),
        "another communicator": (good, elsewhere),
        "groups": (good, grouped),
    }
    found = {}
    for name, (array, state) in attempts.items():
        try:
            reduce_gradient(array, None, state)
        except ValueError as error:
            found[name] = str(error)
        else:
            found[name] = "no error"
    untouched = np.array_equal(good, gradient(world.rank))
    reduce_gradient(good, state=used)
    return found, untouched, good


def case_groups(world: Any) -> Any:
    """Four ranks in two groups; and two passes of two ranks, which leave as many rows."""
    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    found = []
    four = world.Split(0 if world.rank < 4 else 1)
    if world.rank < 4:
        array = gradient(world.rank)
        record = reduce_gradient(array, four, GrainState(groups=[[0, 2], [1, 3]]))
        found.append((array, record.weights))
    two = world.Split(0 if world.rank < 2 else 1)
    if world.rank < 2:
        state = GrainState(microbatches=2)
        for i in range(2):
            array = gradient(2 * world.rank + i)
            record = reduce_gradient(array, two, state)
            assert (record is None) == (i == 0)
        found.append((array, record.weights))
    return found


def case_traffic(world: Any) -> Any:
    """Bytes that this rank sends; and a message of the program's own that waits meanwhile."""
    from mpi4py import MPI

    from grain_ddp.mpi import MpiWire, reduce_gradient

    sent = []
    exchange = MpiWire.exchange

    def counting(self: MpiWire, send: Any, receive: Any, *what: Any) -> Any:
        sent.append(sum(t.nbytes for j, t in enumerate(send) if j != self.rank))
        return exchange(self, send, receive, *what)

    mail = np.zeros(1)
    request = world.Irecv(mail, MPI.ANY_SOURCE, MPI.ANY_TAG)
    MpiWire.exchange = counting  # type: ignore[method-assign]
    try:
        reduce_gradient(gradient(world.rank))
    finally:
        MpiWire.exchange = exchange  # type: ignore[method-assign]
    world.Send(np.array([7.0]), (world.rank + 1) % RANKS)
    request.Wait()
    return sum(sent), mail[0]


def case_process_group(world: Any) -> Any:
    """A step of a DDP model, after an address that cannot be reached."""
    import ranks
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from grain_ddp import GrainState, grain_hook
    from grain_ddp.mpi import init_process_group

    os.environ["MASTER_ADDR"] = "host.invalid"
    with pytest.raises(RuntimeError, match=r"not every rank reaches rank 0.*host\.invalid"):
        init_process_group()
    del os.environ["MASTER_ADDR"]
    init_process_group()
    variables = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    variables += [str(dist.get_world_size()), dist.get_backend()]
    net = ranks.network()
    model = DistributedDataParallel(net)
    model.register_comm_hook(GrainState(), grain_hook)
    rows = ranks.local_gradients(net, 0)
    ranks.loss(model, 0).backward()
    found = ranks.flat(p.grad for p in net.parameters())
    dist.barrier()
    dist.destroy_process_group()
    return variables, rows.numpy(), found.numpy()


def program(folder: str, *cases: str) -> None:
    """What a rank does. Results go to a file, as two MPIs differ in how they forward output."""
    faulthandler.dump_traceback_later(DEADLINE - 10, exit=True)
    import torch
    from mpi4py import MPI

    import grain_ddp._core.transposed as transposed

    torch.set_num_threads(1)
    transposed.MESSAGE_BYTES = 1 << 12  # several messages per slice
    world = MPI.COMM_WORLD
    found: dict[str, Any] = {}
    for case in cases:
        try:
            found[case] = globals()[f"case_{case}"](world)
        except Exception:  # the other ranks may wait for this one
            traceback.print_exc()
            world.Abort(1)
    Path(folder, str(world.rank)).write_bytes(pickle.dumps(found))


# What is expected of them.


def mpiexec() -> str:
    beside = Path(sys.executable).with_name("mpiexec")
    return os.environ.get("MPIEXEC") or (str(beside) if beside.exists() else "mpiexec")


def start(*command: str, ranks: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch/mpiexec.sh"), *command],
        env={**os.environ, "MPIEXEC": mpiexec(), "PER_HOST": str(ranks)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def run(folder: Path, ranks: int, *cases: str) -> dict[str, list[Any]]:
    """What each case returned, by its name: a list in rank order."""
    assert shutil.which(mpiexec()), "no mpiexec: pip install mpich"
    done = start(sys.executable, __file__, str(folder), *cases, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    every = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(ranks)]
    return {case: [one[case] for one in every] for case in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases = "sizes", "options", "mean", "absent", "state", "errors", "groups", "traffic"
    cases += "soak", "another_order"
    return run(tmp_path_factory.mktemp("mpi"), RANKS, *cases)


def error(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found.astype("float64") - expected) / np.linalg.norm(expected))


def rows(n: int = RANKS, dtype: str = "float32") -> Any:
    return np.array([gradient(rank, dtype) for rank in range(n)], dtype="float64")


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("n", range(1, RANKS + 1))
def test_equals_an_independent_solver(results: Any, n: int, dtype: str) -> None:
    every = [ranks[n, dtype] for ranks in results["sizes"][:n]]
    array, record = every[0]
    assert array.dtype == dtype
    assert error(array, min_norm_point(rows(n, dtype))) <= BOUNDS[dtype]
    assert record.weights == pytest.approx(min_norm_weights(rows(n, dtype)), abs=1e-4)
    for other, theirs in every:
        assert other.tobytes() == array.tobytes()
        assert theirs.weights.tobytes() == record.weights.tobytes()


def test_no_group_is_conflicted_with(results: Any) -> None:
    d = results["sizes"][0][RANKS, "float32"][0].astype("float64")
    products = rows() @ d
    longest = np.linalg.norm(rows(), axis=1).max()
    assert (products >= d @ d - 1e-5 * np.linalg.norm(d) * longest).all()


def test_options(results: Any) -> None:
    every = results["options"]
    array, record = every[0]["cap"]
    assert record.weights.max() <= 1.5 / RANKS + 1e-12
    assert error(array.ravel(), record.weights @ rows()) <= 1e-5
    array, record = every[0]["bucket"]
    assert record.weights.shape == (1, RANKS)
    for name, bound in {"bucket": 1e-5, "bf16": 1e-2, "fp16": 1e-3, "sketch": 1e-5}.items():
        assert error(every[0][name][0].ravel(), min_norm_point(rows())) <= bound
        assert len({ranks[name][0].tobytes() for ranks in every}) == 1
    assert error(every[0]["bf16"][0].ravel(), min_norm_point(rows())) > 1e-4  # it was narrow
    means = [rows()[first : first + 2].mean(0) for first in range(0, RANKS, 2)]
    for name in ("groups", "sketch and groups"):
        assert error(every[0][name][0].ravel(), min_norm_point(means)) <= 1e-5
        assert len({ranks[name][0].tobytes() for ranks in every}) == 1


def test_mean_is_that_of_allreduce(results: Any) -> None:
    for found, allreduced in results["mean"]:
        for (dtype, _), array in found.items():
            expected = rows(dtype=dtype).mean(0)
            assert error(array, expected) <= BOUNDS[dtype]
        assert error(found["float32", 0], allreduced) <= 1e-6
        assert error(found["float32", 1], allreduced) <= 1e-6


def test_absent_and_broken_gradients(results: Any) -> None:
    some, record, none, broken, dropping, spread = results["absent"][0]
    present = rows()[[0, 2, 4]]
    assert error(some, min_norm_point(present)) <= 1e-5
    assert record.active == (0, 2, 4)
    assert list(np.flatnonzero(record.weights == 0)) == [1, 3]
    assert not none.any()
    assert error(broken, min_norm_point(np.delete(rows(), 2, axis=0))) <= 1e-5
    assert dropping.dropped == (2,)
    assert not np.isfinite(spread).all()
    assert len({one[-1].tobytes() for one in results["absent"]}) == 1


def test_the_state_lives_from_step_to_step(results: Any) -> None:
    assert results["state"] == [([0, 0, 1, 1], 2, True)] * RANKS


def test_nothing_grows(results: Any) -> None:
    assert results["soak"] == [[]] * RANKS


def test_states_in_another_order(results: Any) -> None:
    for found in results["another_order"]:
        assert "grain_ddp: state must be the same on every rank, but it is rank 0: 'in" in found


def test_errors_reach_every_rank(results: Any) -> None:
    words = {
        "options": "cap must be the same on every rank, but it is rank 0: None, rank 1: 2.0",
        "lengths": "array must be the same on every rank, but it is rank 0: 'float32 20011', "
        "rank 1: 'float32 7'",
        "dtypes": "rank 1: 'float64 20011'",
        "one strided": "rank 1: 'float32 10006, not contiguous'",
        "all strided": "found float32 10006, not contiguous on rank",
        "integers": "found int64 10 on rank",
        "swapped": "not in the machine's byte order",
        "fixed": "found float32 20011, read-only on rank",
        "empty": "found float32 0, empty on rank",
        "list": "found a list on rank",
        "one new state": "state must be the same on every rank, but it is rank 0: 'in use, number",
        "another communicator": "serves another communicator",
        "groups": f"groups must name each of the {RANKS} ranks once",
    }
    for found, untouched, after in results["errors"]:
        assert found.keys() == words.keys()
        for name, text in words.items():
            assert found[name].startswith("grain_ddp: "), (name, found[name])
            assert text in found[name]
        assert untouched
        assert error(after, min_norm_point(rows())) <= 1e-5


def test_groups_and_passes(results: Any) -> None:
    first, second = results["groups"][0]
    means = (rows(4)[[0, 1]] + rows(4)[[2, 3]]) / 2
    assert error(first[0], min_norm_point(means)) <= 1e-5
    assert len(first[1]) == 2
    assert error(second[0], min_norm_point(rows(4))) <= 1e-5
    assert len(second[1]) == 4
    for other in results["groups"][1:4]:
        assert other[0][0].tobytes() == first[0].tobytes()


def test_bytes_are_those_of_an_allreduce(results: Any) -> None:
    allreduce = 2 * (RANKS - 1) / RANKS * LENGTH * 4
    for sent, _ in results["traffic"]:
        assert 0.99 * allreduce <= sent <= 1.01 * allreduce + 8 * RANKS**3


def test_messages_of_the_program_stay_its_own(results: Any) -> None:
    assert [mail for _, mail in results["traffic"]] == [7.0] * RANKS


def test_torch_distributed_under_mpiexec(tmp_path: Path) -> None:
    found = run(tmp_path, 2, "process_group")["process_group"]
    for rank, (variables, local, aggregate) in enumerate(found):
        assert variables == [str(rank), str(rank), "2", "2", "gloo"]
        assert error(aggregate, min_norm_point(local)) <= 1e-5


LOSING = """
import os, signal, sys
import numpy as np
from mpi4py import MPI
from grain_ddp.mpi import reduce_gradient
for step in range(4):
    if step == 2 and MPI.COMM_WORLD.rank == 1:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("planted")
    reduce_gradient(np.ones(1000) * (1 + MPI.COMM_WORLD.rank))
print("not missed")
"""


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_is_lost(how: str, tmp_path: Path) -> None:
    """mpiexec ends all ranks of a program that `python -m mpi4py` runs."""
    script = tmp_path / "losing.py"
    script.write_text(LOSING)
    done = start(sys.executable, "-m", "mpi4py", str(script), how, ranks=2)
    assert done.returncode != 0
    assert "not missed" not in done.stdout
    assert ("ArithmeticError: planted" in done.stdout + done.stderr) == (how == "raises")


def alone(code: str) -> str:
    """The last line that a Python without mpiexec ends with."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_an_mpiexec_of_another_mpi_is_told() -> None:
    """Each rank would be alone, and keep its own gradient."""
    last = alone(
        "import os, numpy, grain_ddp.mpi; os.environ['PMI_SIZE'] = '2';"
        "grain_ddp.mpi.reduce_gradient(numpy.ones(3))"
    )
    assert last.startswith("RuntimeError: grain_ddp: mpiexec started 2 ranks, but mpi4py found one")


def test_without_mpi4py() -> None:
    last = alone("import sys; sys.modules['mpi4py'] = None; import grain_ddp.mpi")
    assert last.startswith("ImportError: grain_ddp.mpi needs mpi4py")
    assert 'pip install "grain-ddp[mpi]"' in last


def test_addresses() -> None:
    """Loopback is no address for others; one that answers is told from one that does not."""
    code = (
        "import socket; from grain_ddp.mpi import _addresses, _reaches;"
        "s = socket.create_server(('127.0.0.1', 0)); port = s.getsockname()[1];"
        "found = _reaches('127.0.0.1', port); s.close();"
        "print(found, _reaches('127.0.0.1', port), _addresses()[-1] == socket.gethostname(),"
        "any(a.startswith('127.') for a in _addresses()))"
    )
    assert alone(code) == "True False True False"


if __name__ == "__main__":
    program(*sys.argv[1:])
