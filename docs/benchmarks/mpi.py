"""Time of `grain_ddp.mpi.reduce_gradient` against MPI_Allreduce, as a Markdown table.

    python docs/benchmarks/mpi.py --ranks 2 4
    MPIEXEC=/path/to/mpiexec python docs/benchmarks/mpi.py    # with another MPI
    python docs/benchmarks/mpi.py --smoke                     # a run of seconds

All variants take turns in the same processes, on one float32 array. Times are medians over the
rounds, by rank 0's clock, from one barrier to the next; a ratio is the median of the ratios to the
Allreduce of the same round. CPU time is the least of all rounds, of rank 0: on a machine with other
work, where the ranks wait for a core more than for each other, it says what a variant itself takes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "mpiexec.sh"


def measure(length: int, rounds: int) -> None:
    """What each rank does."""
    import torch
    from mpi4py import MPI

    from grain_ddp import GrainState
    from grain_ddp.mpi import reduce_gradient

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    n, gradient = comm.size, np.random.default_rng(comm.rank).standard_normal(length, np.float32)
    array, other = gradient.copy(), np.empty_like(gradient)
    states = [GrainState(), GrainState(wire_dtype=torch.bfloat16), GrainState(weighting="mean")]
    share = length // n

    def transpose_and_gather() -> None:
        comm.Alltoall(array[: n * share], other[: n * share])
        comm.Allgather(array[:share], other[: n * share])

    variants = {
        "Allreduce": lambda: comm.Allreduce(array, other),
        "Allreduce, in place": lambda: comm.Allreduce(MPI.IN_PLACE, array),
        "Alltoall and Allgather": transpose_and_gather,
        "GRAIN": lambda: reduce_gradient(array, comm, states[0]),
        "GRAIN, bf16 on the wire": lambda: reduce_gradient(array, comm, states[1]),
        "monitor, every step": lambda: reduce_gradient(array, comm, states[2]),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    work: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name in list(variants)[:: 1 if round_ % 2 else -1]:  # nobody always goes first
            array[:] = gradient
            comm.Barrier()
            start, before = time.perf_counter(), time.process_time()
            variants[name]()
            spent = time.process_time() - before
            comm.Barrier()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - start)
                work[name].append(spent)
    if comm.rank == 0:
        library, version = MPI.get_vendor()
        library += " " + ".".join(map(str, version))
        for name, found in times.items():
            low, ratio, high = np.percentile(np.divide(found, times["Allreduce"]), [25, 50, 75])
            print(
                f"| {library} | {n} | {name} | {1e3 * np.median(found):.1f} | "
                f"{ratio:.2f} | {low:.2f} to {high:.2f} | {1e3 * min(work[name]):.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--length", type=int, default=10_000_000, help="elements")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    parser.add_argument("--started", action="store_true", help=argparse.SUPPRESS)  # by mpiexec
    options = parser.parse_args()
    if options.started:
        measure(options.length, options.rounds)
        return
    if options.smoke:
        options.ranks, options.length, options.rounds = [2], 10_001, 1
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = os.environ.get("MPIEXEC") or (str(beside) if beside.exists() else "mpiexec")
    print(f"{options.length} float32, {options.rounds} rounds, {os.cpu_count()} cores\n")
    print("| MPI | ranks | variant | ms | ratio | quartiles of the ratio | CPU ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for n in options.ranks:
        subprocess.run(
            [
                *("bash", LAUNCHER, sys.executable, __file__, "--started"),
                *("--length", str(options.length), "--rounds", str(options.rounds)),
            ],
            env={**os.environ, "PER_HOST": str(n), "MPIEXEC": mpiexec},
            check=True,
            timeout=600,
        )


if __name__ == "__main__":
    main()
