#!/usr/bin/env bash
# Sets up what the example needs and runs every stage with 2 workers (WORKERS=4: with 4).
# Options go to train.py: --steps 50
set -euo pipefail
cd "$(dirname "$0")/../.."
bash .ci/env.sh test
workers=${WORKERS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the workers share the cores
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}
export PATH=$PWD/.venv/bin:$PATH
# On a CPU DeepSpeed compiles an operation at the first use: once, before the workers race for it.
python -c 'import sys, deepspeed; sys.modules["deepspeed.comm.torch"].build_shm_op()'
for stage in 0 1 2 3; do
  torchrun --standalone --nproc_per_node=$workers examples/zero/train.py \
    --deepspeed_config examples/zero/stage$stage.json "$@"
done
# The same by DeepSpeed's own launcher.
deepspeed --num_gpus $workers examples/zero/train.py --deepspeed_config examples/zero/stage2.json "$@"
