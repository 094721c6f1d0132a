"""The study: pages show what is on file, the harness makes it, and the hook does the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run
from scipy import stats

STUDY = Path(__file__).resolve().parents[1] / "examples" / "study"
sys.path.insert(0, str(STUDY))  # in the ranks too, which import this module

import analyse  # noqa: E402
import study  # noqa: E402
import theory  # noqa: E402
import through_ddp  # noqa: E402
from study import Cell  # noqa: E402

LINES = [json.loads(text) for text in (STUDY / "results/digits.jsonl").read_text().splitlines()]


def line(cell: Cell) -> dict[str, Any]:
    (found,) = [one for one in LINES if Cell(**one["cell"]) == cell]
    return found


@pytest.mark.parametrize("page", analyse.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- results: " in text
    assert analyse.filled(text, analyse.tables()) == text


@pytest.mark.parametrize("method", ["mean", "min_norm", "upgrad"])
def test_the_harness_makes_what_is_on_file(method: str) -> None:
    cell = Cell("digits", "wrong labels", 8, 4, "sgd", method)
    stored = line(cell)
    test = study.train(cell, study.FINAL[:2], [stored["rate"]] * 2)["test"]
    np.testing.assert_allclose(test, stored["test"][:2], atol=0.003)  # 4 of 1197 images


def through_hook(cell: Cell, rate: float, steps: int) -> Any:
    torch.set_num_threads(1)
    found = through_ddp.real(cell, study.FINAL[0], rate, steps)
    return found["gramians"], dist.get_rank()


@pytest.mark.parametrize("method", ["min_norm", "upgrad"])
def test_through_ddp_the_gramians_are_those_of_the_harness(method: str) -> None:
    steps = 30
    cell = Cell("digits", "wrong labels", 2, 4, "sgd", method)
    simulated: list[np.ndarray] = []
    study.train(cell, study.FINAL[:1], [0.4], simulated.append)
    for gramians, _ in run(2, through_hook, cell, 0.4, steps):
        for found, (expected,) in zip(gramians, simulated[:steps], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4 * expected.trace())


def test_differences_are_paired_by_split() -> None:
    rng = np.random.default_rng(0)
    mean, other = rng.normal(size=(2, 40))
    difference, half, p = analyse.paired({"test": other}, {"test": mean})
    expected = stats.ttest_rel(other.reshape(20, 2).mean(1), mean.reshape(20, 2).mean(1))
    assert difference == pytest.approx((other - mean).mean())
    assert p == pytest.approx(expected.pvalue)
    assert half == pytest.approx(expected.confidence_interval().high - difference)


def test_holm() -> None:
    assert analyse.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_no_loss_rises_and_the_rate_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "STEPS", 300)
    a, b = theory.problem(0)
    mean, least = (theory.descend(a, b, theory.RULES[name]) for name in ("mean", "min_norm"))
    assert (np.diff(mean["losses"], axis=0) > 1e-12).any()
    assert (np.diff(least["losses"], axis=0) <= 1e-12).all()
    bound = 2 * theory.SMOOTHNESS * least["losses"][0].min()
    assert (np.cumsum(least["squares"]) <= bound).all()
