#!/usr/bin/env bash
# Several hosts: run the same command on each of them. Any host that fails ends the run on all.
set -euo pipefail
HOSTS=${HOSTS:-2}
RANKS=${RANKS:-2}                     # processes on each host
FIRST=${FIRST:-host0}                 # the name of one of the hosts, which the others can reach
TRAIN=${TRAIN:-examples/cluster.py}   # your script
# A file, or words that are quoted as in a shell.
if [ -e "$TRAIN" ]; then train=("$TRAIN"); else eval "train=($TRAIN)"; fi

exec torchrun --nnodes="$HOSTS" --nproc_per_node="$RANKS" --rdzv_id=run1 \
  --rdzv_backend=c10d --rdzv_endpoint="$FIRST:29400" "${train[@]}" "$@"
