"""Accelerate's own test scripts, which ship in its package: with the hook they end as without it.

Pytest finds this file only by its name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hooked import SCOPES

HOOKED = Path(__file__).with_name("hooked.py")
DEADLINE = 240
SCRIPTS = ["test_sync", "test_script", "test_ddp_comm_hook"]


def run(scope: str, script: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, str(HOOKED), scope, script],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_hooked_as_plain(name: str) -> None:
    found = find_spec(f"accelerate.test_utils.scripts.{name}")
    assert found is not None
    assert found.origin is not None
    for scope in ["plain", *SCOPES]:
        result = run(scope, found.origin)
        assert result.returncode == 0, f"{scope}: {result.stderr}"
