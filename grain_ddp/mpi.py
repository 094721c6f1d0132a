"""MPI: gradients in numpy arrays without torch.distributed, and torch.distributed under mpiexec."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.state import GrainState
from grain_ddp._math.record import StepRecord

try:
    from mpi4py import MPI

    from grain_ddp._wire.mpi_wire import MpiWire
except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but no MPI library
    raise ImportError(
        'grain_ddp.mpi needs mpi4py and an MPI library: pip install "grain-ddp[mpi]", and MPICH or '
        f"Open MPI from your system or by pip install mpich. ({error})"
    ) from error

DTYPES = ("float16", "float32", "float64")

_CONNECT = 5.0  # seconds for a first connection between two hosts


def reduce_gradient(
    array: NDArray[Any], comm: MPI.Intracomm | None = None, state: GrainState | None = None
) -> StepRecord | None:
    """Aggregate a gradient in place over the ranks of an MPI communicator.

    Call it on every rank of the communicator, with arrays of one shape and dtype: each rank's
    gradient before, the aggregate after, bit by bit the same on all ranks. One array is one bucket.
    Where there are several arrays, let them be views of one.

    Args:
        array: contiguous and writeable, of float16, float32 or float64, of any shape.
        comm: an mpi4py intracommunicator. None: ``MPI.COMM_WORLD``.
        state: options, and what is kept from step to step. None: the defaults, in a state that the
            communicator keeps.

    Returns:
        The step's record: None on the steps that make none (`record_every`, `warmup_steps`), and
        before the last of several `microbatches`.

    Raises:
        ValueError: on every rank: the array is of another kind, arrays or options differ between
            ranks, or the state serves something else.
        RuntimeError: mpiexec is of another MPI than mpi4py, so that each rank is alone.
    """
    wire, default = _attached(_world() if comm is None else comm)
    state = default if state is None else state
    arrays, use = _kind(array), _use(state, wire)
    # Seldom is anything wrong: two numbers tell.
    if not wire.same(repr((arrays, use)), what="the comparison of arrays"):
        wire.agree({"array": arrays, "state": use}, "the comparison of arrays, one by one")
    if not arrays.startswith(DTYPES) or "," in arrays:
        raise ValueError(
            f"grain_ddp: expected a contiguous and writeable array of {', '.join(DTYPES)} with at "
            f"least one element, but found {arrays} on rank {wire.rank}. "
            "numpy.ascontiguousarray(array, dtype) makes one."
        )
    if not use.startswith(("new", "in use")):
        raise ValueError(f"grain_ddp: this GrainState {use} (seen on rank {wire.rank}).")
    owner = state.owner
    if owner is None:
        owner = _Owner(state, wire)
    aggregation: Aggregation = owner.aggregation
    with torch.no_grad():
        aggregation.push(torch.from_numpy(array.reshape(-1)))
        return aggregation.finish()


def _world() -> MPI.Intracomm:
    started = max(int(os.environ.get(name, 1)) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if MPI.COMM_WORLD.size == 1 < started:
        raise RuntimeError(
            f"grain_ddp: mpiexec started {started} ranks, but mpi4py found one, and it uses "
            f"{MPI.get_vendor()[0]}. Take the mpiexec of that MPI, or set MPI4PY_LIBMPI to the "
            "libmpi.so of the other."
        )
    return MPI.COMM_WORLD


def _kind(array: object) -> str:
    """In words: dtype and shape; and after a comma what is wrong with it."""
    if not isinstance(array, np.ndarray):
        return f"a {type(array).__name__}"
    kind = f"{array.dtype} {'x'.join(map(str, array.shape))}"
    kind += "" if array.dtype.isnative else ", not in the machine's byte order"
    kind += "" if array.flags.c_contiguous else ", not contiguous"
    kind += "" if array.flags.writeable else ", read-only"
    return kind if array.size else f"{kind}, empty"


def _use(state: GrainState, wire: MpiWire) -> str:
    """In words: whether the state can be used for this communicator."""
    if state.process_group is not None:
        return "has a process_group, and MPI has a communicator: leave process_group at None"
    if state.owner is None:
        return "new"
    if isinstance(state.owner, _Owner) and state.owner.aggregation.wire.whole is wire:
        return f"in use, number {state.owner.number}"
    return f"serves another communicator or model ({state.owner}): make one for each"


class _Owner:
    """What `reduce_gradient` keeps from step to step."""

    gone = False

    def __init__(self, state: GrainState, wire: MpiWire) -> None:
        self.aggregation = Aggregation(state, wire, self)
        self.number = wire.number

    def __str__(self) -> str:
        return "reduce_gradient"


@dataclass
class _Attached:
    """What a communicator carries."""

    wire: MpiWire
    state: GrainState


def _free(comm: MPI.Comm, key: int, attached: _Attached) -> None:
    attached.wire.comm.Free()


_KEY = MPI.Comm.Create_keyval(delete_fn=_free)


def _attached(comm: MPI.Intracomm) -> tuple[MpiWire, GrainState]:
    """The communicator's own copy, for messages that cannot meet the program's; and its state."""
    found: Any = comm.Get_attr(_KEY)
    if found is None:
        if comm.Is_inter():
            raise ValueError("grain_ddp: expected an intracommunicator, but found one between two.")
        found = _Attached(MpiWire(comm.Dup()), GrainState())
        comm.Set_attr(_KEY, found)
    attached: _Attached = found
    return attached.wire, attached.state


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """``torch.distributed.init_process_group`` for a program that was started by mpiexec.

    Sets the variables that torchrun would set: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT. Rank 0 listens on a free port; the ranks choose the first of its
    addresses that all of them reach. A MASTER_ADDR that is already set is the only one tried.

    Args:
        backend: of torch.distributed. None: "nccl" where every rank has a GPU, else "gloo".
        options: further ones, such as ``timeout``.

    Raises:
        RuntimeError: on every rank: no address of rank 0 is reached by all, or mpiexec is of
            another MPI than mpi4py.
    """
    world = _world()
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    if backend is None:
        gpus = world.allreduce(torch.cuda.is_available(), MPI.LAND)
        backend = "nccl" if gpus else "gloo"
    store = addresses = None
    if world.rank == 0:
        # The store itself takes the port, so that nobody else can.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        alone = host.size == world.size
        given = os.environ.get("MASTER_ADDR")
        addresses = [given] if given else ["127.0.0.1"] if alone else _addresses()
    port = world.bcast(store.port if store else None)
    addresses = world.bcast(addresses)
    reached = np.array([_reaches(address, port) for address in addresses])
    world.Allreduce(MPI.IN_PLACE, reached, MPI.LAND)
    if not reached.any():
        raise RuntimeError(
            f"grain_ddp: not every rank reaches rank 0, which listens at port {port} of "
            f"{', '.join(addresses)} (this is rank {world.rank}). Set MASTER_ADDR to an address of "
            "its host that the other hosts reach, and see that no firewall closes the port."
        )
    address = addresses[int(reached.argmax())]
    if store is None:
        store = TCPStore(address, port, is_master=False)
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(host.rank),
        LOCAL_WORLD_SIZE=str(host.size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    host.Free()
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, **options)


def _addresses() -> list[str]:
    """The addresses of this host's interfaces but loopback, and its name."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                import fcntl

                request = struct.pack("256s", name.encode())
                found.append(socket.inet_ntoa(fcntl.ioctl(s, 0x8915, request)[20:24]))
            except (ImportError, OSError):  # not on Linux; or it has no IPv4 address
                continue
    return [a for a in found if not a.startswith("127.")] + [socket.gethostname()]


def _reaches(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), _CONNECT):
            return True
    except OSError:
        return False
