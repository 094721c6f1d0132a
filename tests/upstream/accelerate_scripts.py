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


def run(script: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            *script,
        ],
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
    plain = run([found.origin])
    assert plain.returncode == 0, plain.stderr
    for scope in SCOPES:
        hooked = run([str(HOOKED), scope, found.origin])
        assert hooked.returncode == 0, f"scope {scope}: {hooked.stderr}"
