#!/usr/bin/env bash
# Sets up what the tests need and runs them. Arguments go to pytest: bash tests/run.sh -k solver
set -euo pipefail
cd "$(dirname "$0")/.."
bash .ci/env.sh test
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # several ranks share the cores
exec .venv/bin/python -m pytest "$@"
