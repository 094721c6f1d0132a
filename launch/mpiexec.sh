#!/usr/bin/env bash
# Starts a program by MPICH's or Open MPI's mpiexec: bash launch/mpiexec.sh python train.py --steps 100
# The program calls grain_ddp.mpi.init_process_group() for PyTorch, or works on mpi4py alone.
set -euo pipefail
HOSTS=${HOSTS:-}                # "node1,node2": they must reach each other by ssh; empty: this machine
PER_HOST=${PER_HOST:-4}         # ranks on each host: its GPUs, or what its cores allow
MPIEXEC=${MPIEXEC:-mpiexec}     # of the MPI that mpi4py is to use

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the ranks of a host share its cores
count=$(tr ',' '\n' <<<"${HOSTS:-localhost}" | wc -l)
command=("$MPIEXEC" -n $((count * PER_HOST)))

command -v "$MPIEXEC" >/dev/null || {
  echo "grain_ddp: found no $MPIEXEC. Install MPICH or Open MPI (pip install mpich), or set MPIEXEC." >&2
  exit 1
}

# An MPI from PyPI has its library near its mpiexec, where mpi4py may not look first.
prefix=$(cd "$(dirname "$(command -v "$MPIEXEC")")/.." && pwd)
for library in "$prefix"/lib/libmpi.so.[0-9]*; do
  [ ! -e "$library" ] || export MPI4PY_LIBMPI=${MPI4PY_LIBMPI:-$library}
done

if "$MPIEXEC" --version 2>&1 | grep -q -e "Open MPI" -e OpenRTE; then
  # Ranks may outnumber cores, and wander between them.
  command+=(--oversubscribe --bind-to none)
  [ "$(id -u)" != 0 ] || command+=(--allow-run-as-root)
  [ -z "$HOSTS" ] || command+=(--host "${HOSTS//,/:$PER_HOST,}:$PER_HOST")
  for name in OMP_NUM_THREADS MPI4PY_LIBMPI PYTHONPATH; do
    [ -z "${!name:-}" ] || command+=(-x "$name")  # to other hosts; MPICH takes everything along
  done
else
  [ -z "$HOSTS" ] || command+=(-hosts "$HOSTS" -ppn "$PER_HOST")
fi
exec "${command[@]}" "$@"
