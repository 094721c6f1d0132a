#!/usr/bin/env bash
# Sets up what the example needs and runs it with 4 workers. Options: bash examples/quickstart.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
bash .ci/env.sh examples
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # four workers share the cores
case " $* " in *" -h "* | *" --help "*) exec .venv/bin/python examples/quickstart.py --help ;; esac
exec .venv/bin/python -m torch.distributed.run --standalone --nproc_per_node=4 examples/quickstart.py "$@"
