#!/usr/bin/env bash
# One host. Arguments go to the training script: bash launch/single_host.sh --steps 1000
set -euo pipefail
RANKS=${RANKS:-2}                     # processes: as many as there are GPUs; on CPUs as you like
TRAIN=${TRAIN:-examples/cluster.py}   # your script
# A file, or words that are quoted as in a shell.
if [ -e "$TRAIN" ]; then train=("$TRAIN"); else eval "train=($TRAIN)"; fi

exec torchrun --standalone --nproc_per_node="$RANKS" "${train[@]}" "$@"
