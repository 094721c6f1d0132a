#!/usr/bin/env bash
# bash .ci/env.sh EXTRA: makes .venv hold this checkout (editable) and what its extra needs.
# Returns at once when nothing changed. PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=$1
interpreters=${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}
export PIP_USER=0  # a "user = yes" in pip's configuration is an error inside a venv

fail() {
  echo "grain_ddp: $1" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in $interpreters; do
    # Run it: some launchers are on the PATH without a Python behind them.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      python=$candidate
      return
    fi
  done
  fail "found no Python 3.10 or newer (tried: $interpreters). Install one, or name it: PYTHON=/path/to/python3 bash ..."
}

add_pip() {
  .venv/bin/python -m ensurepip >/dev/null 2>&1 && return
  # Debian and Ubuntu keep ensurepip in a package of its own: let the system's pip do it.
  PIP_ROOT_USER_ACTION=ignore "$python" -m pip install -q --target "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip && return
  fail "$python has neither ensurepip nor pip. Install one of them (Debian, Ubuntu: apt install python3-venv) and run this again."
}

# Two commands started together must not install over each other.
exec 9>.venv.lock
if command -v flock >/dev/null; then flock 9 || true; fi

# The path counts because an editable install records it.
want="$PWD $(cat pyproject.toml .ci/constraints.txt .ci/env.sh | cksum)"
stamp=.venv/grain-ddp-$extra
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi

find_python
echo "grain_ddp: setting up .venv [$extra] with $("$python" --version); the first time takes minutes if PyTorch must be downloaded ..."
if ! .venv/bin/python -c '' >/dev/null 2>&1; then
  rm -rf .venv
  "$python" -m venv --without-pip .venv || fail "$python -m venv failed. Install the venv module (Debian, Ubuntu: apt install python3-venv) and run this again."
fi
.venv/bin/python -m pip --version >/dev/null 2>&1 || add_pip
pip=(.venv/bin/python -m pip install -q --disable-pip-version-check -c .ci/constraints.txt)
# The build backend goes in first, so that it is the pinned one too; and PyTorch, because DeepSpeed
# comes as source only, and its setup.py imports torch.
"${pip[@]}" pip setuptools
"${pip[@]}" torch numpy
# setuptools warns about every editable install; that would bury an error of ours.
PYTHONWARNINGS=ignore "${pip[@]}" --no-build-isolation -e ".[$extra]"
echo "$want" >"$stamp"  # last: an interrupted run starts over
echo "grain_ddp: .venv is ready after $SECONDS s"
