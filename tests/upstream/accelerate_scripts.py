"""Accelerate's own test scripts, which ship in its package: with the hook they end as without it.

Pytest finds this file only by its name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hooked import SCOPES

HOOKED = Path(__file__).with_name("hooked.py")
DEADLINE = 240
SCRIPTS = ["test_sync", "test_script", "test_ddp_comm_hook"]  # the last fails in BF16 on gloo


def ending(scope: str, script: str) -> str | None:
    """The error of a rank that failed, or None: it did all that it does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, str(HOOKED), scope, script],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    if result.returncode == 0:
        return None
    errors = re.findall(r"^\[rank\d\]: (\w+: .*)", result.stderr, re.MULTILINE)
    return errors[0] if errors else result.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_hooked_as_plain(name: str) -> None:
    found = find_spec(f"accelerate.test_utils.scripts.{name}")
    assert found is not None
    assert found.origin is not None
    plain = ending("plain", found.origin)
    assert plain is None or "BF16 all reduce communication hook required CUDA" in plain
    for scope in SCOPES:
        assert ending(scope, found.origin) == plain
