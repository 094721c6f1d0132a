#!/usr/bin/env bash
# Sets up what the examples need and runs each one with 2 workers (WORKERS=4: with 4).
# Options go to all of them: --steps 20
set -euo pipefail
cd "$(dirname "$0")/../.."
bash .ci/env.sh test,frameworks
workers=${WORKERS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the workers share the cores
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}
export PATH=$PWD/.venv/bin:$PATH
# On a CPU DeepSpeed compiles an operation at the first use: once, before the workers race for it.
python -c 'import sys, deepspeed; sys.modules["deepspeed.comm.torch"].build_shm_op()'
start=(torchrun --standalone --nproc_per_node="$workers")
folder=examples/frameworks
"${start[@]}" $folder/plain_loop.py "$@"
"${start[@]}" $folder/accelerate_loop.py "$@"
"${start[@]}" $folder/lightning_module.py --workers "$workers" "$@"
"${start[@]}" $folder/trainer.py "$@"
"${start[@]}" $folder/trainer.py --lora "$@"
"${start[@]}" $folder/trainer.py --deepspeed $folder/zero2.json "$@"
