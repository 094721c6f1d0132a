#!/usr/bin/env bash
# DeepSpeed's launcher. Run it once: it reaches the hosts by ssh, without passwords. Where there is
# no ssh, run it on every host, with NODE=0, 1, ... in the order of the hostfile.
set -euo pipefail
HOSTFILE=${HOSTFILE:-launch/hostfile} # a line per host, with how many processes it gets
FIRST=${FIRST:-host0}                 # the first of them, by a name that the others can reach
TRAIN=${TRAIN:-examples/cluster.py}   # your script
NODE=${NODE:-}
# A file, or words that are quoted as in a shell.
if [ -e "$TRAIN" ]; then train=("$TRAIN"); else eval "train=($TRAIN)"; fi

exec deepspeed --hostfile "$HOSTFILE" --master_addr "$FIRST" --no_local_rank \
  ${NODE:+--no_ssh --node_rank "$NODE"} "${train[@]}" "$@"
