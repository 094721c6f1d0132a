"""What monitor mode shows: the mean's trainings again, read as `grain-ddp report` reads a log.

    python examples/study/watch.py    # results/watched.json; about three minutes on one core

One entry for each setting of study.py that is on file, averaged over 20 trainings. Entries that are
there already stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import FINAL, Cell, train

from grain_ddp import StepRecord
from grain_ddp._tools.dominance import ruled
from grain_ddp._tools.findings import findings
from grain_ddp._tools.gather import run_of
from grain_ddp._tools.history import Run

RESULTS = Path(__file__).parent / "results"
SEEDS = [(a, b) for a, b in FINAL if b == 0]


def read(gramians: np.ndarray) -> Run:
    """A run of plain averaging from its Gramians ``[steps, n, n]``."""
    n = gramians.shape[-1]
    every = tuple(range(n))
    return run_of(
        StepRecord(step, G, np.full(n, 1 / n), 0.0, "mean", every, ())
        for step, G in enumerate(gramians)
    )


def shown(line: dict[str, Any]) -> dict[str, Any]:
    """What the reports of a line's trainings say."""
    steps: list[np.ndarray] = []
    train(Cell(**line["cell"]), SEEDS, [line["rate"]] * len(SEEDS), steps.append)
    runs = [read(gramians) for gramians in np.stack(steps, 1)]
    said = [{f.topic for f in findings(run) if f.level in ("bad", "look")} for run in runs]
    values = {
        "opposed": [(run.opposed > 0).mean() for run in runs],  # share of the records
        "ruled": [ruled(run) for run in runs],  # share of the records
        "shorter": [np.median(run.grain.norms / run.norm_mean[run.grain.at]) for run in runs],
        "outlier": ["direction" in topics for topics in said],
        "length": ["length" in topics for topics in said],
        "pairs": ["pairs" in topics for topics in said],
    }
    return {name: round(float(np.mean(value)), 3) for name, value in values.items()}


def main() -> None:
    torch.set_num_threads(1)
    path = RESULTS / "watched.json"
    found = json.loads(path.read_text()) if path.exists() else []
    lines = [
        json.loads(text)
        for results in sorted(RESULTS.glob("*.jsonl"))
        for text in results.read_text().splitlines()
    ]
    means = [line for line in lines if line["cell"]["method"] == "mean"]
    for i, line in enumerate(means):
        cell = {k: v for k, v in line["cell"].items() if k != "method"}
        if cell not in (entry["cell"] for entry in found):
            found.append({"cell": cell, **shown(line)})
        print(f"{i + 1}/{len(means)}", *cell.values(), flush=True)
    text = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in found)
    path.write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
