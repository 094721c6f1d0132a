"""The documentation runs: every ```python block of the README and of docs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DEADLINE = 120  # seconds for a page, start of Python included

# The page's name and its code come in from outside; one namespace, as a reader would type it.
RUNNER = """
import sys
import torch.distributed as dist
dist.init_process_group("gloo")
exec(compile(sys.stdin.read(), sys.argv[1], "exec"), {"__name__": "__main__"})
dist.destroy_process_group()
"""


def blocks(page: Path, language: str) -> str:
    """The page with every line outside its blocks blanked, so that line numbers stay true."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if inside and line.startswith("```"):
            inside = False
        kept.append(line if inside else "")
        if line.strip() == f"```{language}":
            inside = True
    return "\n".join(kept)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python").strip()], ids=lambda p: p.name
)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, page.name],
        input=blocks(page, "python"),
        env={**os.environ, **one_rank, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stderr


def test_the_tests_that_the_docs_name_exist() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 80
    for file, function in named:
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), function
    for row in re.findall(r"^\|.*\|$", page, re.MULTILINE):  # each has a test
        assert row.endswith(("test |", "---|")) or "::test_" in row or "| the same |" in row, row


def test_readme_starts_with_the_two_commands() -> None:
    lines = [line.split("#")[0].strip() for line in blocks(ROOT / "README.md", "bash").splitlines()]
    commands = [line for line in lines if line]
    assert commands[0].startswith("git clone ")
    assert commands[1].startswith("cd ")
    assert commands[2:4] == ["bash examples/quickstart.sh", "bash tests/run.sh"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_hold(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    files = [target for target in targets if "://" not in target]
    assert [target for target in files if not (page.parent / target).exists()] == []
