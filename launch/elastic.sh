#!/usr/bin/env bash
# Several hosts that may fail and come back: run the same command on each of them, and again on one
# that was restarted. Ranks start anew after every failure, so the script resumes from a checkpoint,
# on a disk that all hosts share. FIRST must stay: it is where the others meet.
set -euo pipefail
HOSTS=${HOSTS:-2}                     # "2:4": goes on with 2 when others are lost, takes up to 4
RANKS=${RANKS:-2}                     # processes on each host
FIRST=${FIRST:-host0}                 # the name of one of the hosts, which the others can reach
TRAIN=${TRAIN:-examples/cluster.py --checkpoint run.pt}
LOST_AFTER=${LOST_AFTER:-15}          # seconds of silence after which a host counts as lost
# A file, or words that are quoted as in a shell.
if [ -e "$TRAIN" ]; then train=("$TRAIN"); else eval "train=($TRAIN)"; fi

# Without this a host that joins a running job waits for an address that nobody tells it, and
# ranks that are started anew after one was killed often wait for each other, on one host too.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="$HOSTS" --nproc_per_node="$RANKS" --max_restarts=10 --rdzv_id=run1 \
  --rdzv_backend=c10d --rdzv_endpoint="$FIRST:29400" \
  --rdzv_conf=keep_alive_interval=$((LOST_AFTER / 3)) "${train[@]}" "$@"
