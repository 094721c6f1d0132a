"""``python -m grain_ddp.deepspeed SCRIPT [ARGUMENT ...]``: a script that nobody edits.

By now the package is imported, and so DeepSpeed prepared; a script that imports it too gets the
same one.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    arguments = sys.argv[1:]
    # The deepspeed launcher puts its own argument first.
    added = arguments[:1] if arguments and arguments[0].startswith("--local_rank") else []
    script, *rest = arguments[len(added) :] or [""]
    if not script:
        sys.exit("usage: python -m grain_ddp.deepspeed SCRIPT [ARGUMENT ...]")
    sys.argv = [script, *added, *rest]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
