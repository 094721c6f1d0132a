"""grain-ddp report: what was planted in a run is named, and what was not is not."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, Status, StepRecord, Suspect, grain_hook
from grain_ddp._math.weighting import weigh
from grain_ddp._tools import gather, history
from grain_ddp._tools.findings import findings, summary, verdict
from grain_ddp._tools.gather import Gathering, run_of
from grain_ddp._tools.history import Run
from grain_ddp._tools.page import page
from grain_ddp._tools.panels import panels
from grain_ddp._tools.picture import draw
from grain_ddp.sinks import jsonl, read_jsonl


def train(planted: str, weighting: str, path: str, steps: int = 60) -> None:
    """Digits on 4 ranks. "outlier": rank 2 has permuted labels. "conflict": ranks 0 and 1 want
    one labelling of the images, ranks 2 and 3 another one."""
    rank = dist.get_rank()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(1)
    if planted == "outlier" and rank == 2:
        y = y[torch.randperm(len(y), generator=generator)]
    if planted == "conflict" and rank >= 2:
        y = (y + 1) % 10
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    model = DistributedDataParallel(net)
    state = GrainState(weighting=weighting, on_step=jsonl(path))
    model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        mine = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()


def report(planted: str, weighting: str, folder: Path) -> str:
    path = folder / "run.jsonl"
    run(4, train, planted, weighting, str(path))
    return summary(run_of(read_jsonl(path)), batch=64)


@pytest.mark.parametrize("weighting", ["mean", "min_norm"])
def test_an_outlier_is_named_and_nobody_else(weighting: str, tmp_path: Path) -> None:
    text = report("outlier", weighting, tmp_path)
    assert re.findall(r"Group (\d) is an outlier:", text) == ["2"]


@pytest.mark.parametrize("weighting", ["mean", "min_norm"])
def test_a_conflict_is_named_by_its_pairs(weighting: str, tmp_path: Path) -> None:
    text = report("conflict", weighting, tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("- These groups pull")]
    assert set(re.findall(r"(\d) and (\d) \(", line)) == {(a, b) for a in "01" for b in "23"}
    assert "outlier" not in text


def test_a_run_without_trouble_names_nobody(tmp_path: Path) -> None:
    text = report("nothing", "mean", tmp_path)
    assert "outlier" not in text
    assert "pull against each other" not in text
    assert "GRAIN was watching only" in text
    assert "GRAIN would have opposed none" in text or "never pointed against" in text


def records_of(rows: np.ndarray, **changes: Any) -> list[StepRecord]:
    """Records of plain averaging from gradients [T, n, d]."""
    n = rows.shape[1]
    made = [
        StepRecord(k, g @ g.T, np.full(n, 1 / n), 0.0, "mean", tuple(range(n)), ())
        for k, g in enumerate(rows)
    ]
    return [dataclasses.replace(record, **changes) for record in made]


def gradients(steps: int = 40, n: int = 4, seed: int = 0) -> np.ndarray:
    return 0.5 + np.random.default_rng(seed).normal(size=(steps, n, 20))


def words(records: list[StepRecord], batch: int | None = None) -> str:
    return summary(run_of(records), batch)


def test_groups_alike_are_never_outliers() -> None:
    for seed in range(100):
        rows = gradients(30, 2 + seed % 7, seed)
        run = run_of(records_of(rows))
        assert run.outliers == []
        assert run.opposed_pairs == []
        assert not any(f.headline.startswith("Group ") for f in findings(run))


def test_two_outliers_of_eight_are_both_found() -> None:
    rows = gradients(n=8)
    rows[:, [1, 6]] -= 0.5  # they know nothing of the direction that the others share
    assert run_of(records_of(rows)).outliers == [1, 6]


def test_a_long_gradient_is_named() -> None:
    rows = gradients()
    rows[:, 3] *= 8
    text = words(records_of(rows))
    times, _ = re.findall(r"Group 3's gradient is (\S+) times as long", text)  # verdict and words
    assert float(times) == pytest.approx(8, rel=0.1)


def test_what_grain_would_have_done_is_what_it_does() -> None:
    """The same gradients, watched and aggregated."""
    rows = gradients()
    watched = run_of(records_of(rows))
    done = run_of([StepRecord(k, **vars(weigh(g @ g.T, "min_norm"))) for k, g in enumerate(rows)])
    for name in ("weights", "norms", "opposed"):
        would, did = (getattr(run.grain, name) for run in (watched, done))
        np.testing.assert_allclose(would, did, rtol=1e-12)
    assert not watched.min_norm
    assert done.min_norm


@pytest.mark.parametrize("buckets", [False, True])
def test_arrays_are_the_records_readings(buckets: bool) -> None:
    rows = gradients(50, 5)
    rows[7, 3] = 0
    records = [StepRecord(k, **vars(weigh(g @ g.T, "min_norm"))) for k, g in enumerate(rows)]
    if buckets:
        records = [in_buckets(r) for r in records]
    run = run_of(records)
    np.testing.assert_allclose(run.norms, [r.norms for r in records], rtol=1e-12)
    np.testing.assert_allclose(run.norm_mean, [r.norm_mean for r in records], rtol=1e-12)
    np.testing.assert_array_equal(run.opposed, [r.conflicts_mean for r in records])
    np.testing.assert_allclose(run.grain.norms, [r.norm_aggregate for r in records], rtol=1e-9)
    np.testing.assert_array_equal(run.grain.opposed, [r.conflicts_aggregate for r in records])
    to_others = np.array([r.cosine_to_others for r in records])
    to_others[7, 3] = np.nan
    np.testing.assert_allclose(run.cosine_to_others, to_others, rtol=1e-9)
    early = np.mean([r.cosine for r in records[:16]], 0)
    keep = np.arange(5) != 3  # the group that was absent once counts when it was there
    np.testing.assert_allclose(run.cosines[0][keep][:, keep], early[keep][:, keep], rtol=1e-9)
    part = records[10:20]
    mean = np.mean([r.gramian.reshape(-1, 5, 5).sum(0) for r in part], 0)
    scale = dataclasses.replace(part[0], gramian=mean).noise_scale
    assert run.noise_scale(slice(10, 20)) == pytest.approx(scale)


def in_buckets(record: StepRecord) -> StepRecord:
    return dataclasses.replace(
        record,
        gramian=np.stack([record.gramian, 2 * record.gramian]),
        weights=np.stack([record.weights] * 2),
        gap=np.zeros(2),
        status=(record.status, record.status),
        active=(record.active,) * 2,
        dropped=((), ()),
    )


def test_a_long_run_is_thinned_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gradients(3000)
    rows[:, 2] *= -0.2
    whole = run_of(records_of(rows))
    monkeypatch.setattr(gather, "HELD", 20_000)
    monkeypatch.setattr(history, "SOLVED", 100)
    thin = run_of(records_of(rows))
    assert thin.records == whole.records == 3000
    assert 100 < len(thin.steps) <= 20_000 / 21
    assert (np.diff(thin.steps) == thin.every).all()
    assert len(thin.grain.at) == 100
    assert thin.outliers == whole.outliers == [2]
    np.testing.assert_allclose(thin.grain.norms.mean(), whole.grain.norms.mean(), rtol=0.1)
    assert f"every {thin.every}th is counted" in summary(thin)


def test_a_step_that_comes_again_takes_the_place_of_what_followed() -> None:
    gathering = Gathering()
    for record in records_of(gradients(20)):
        gathering.add(record)
    gathering.add(dataclasses.replace(records_of(gradients(1))[0], step=12, status="custom"))
    run = gathering.run()
    assert (run.records, run.last, len(run.steps)) == (13, 12, 13)
    assert run.statuses == {"mean": 12, "custom": 1}


def test_one_record_is_not_a_verdict() -> None:
    text = words(records_of(gradients(1)))
    assert "Verdict: Too early to tell: 1 record of 10." in text
    assert "conflict" not in text
    assert "noise scale is" not in text


@pytest.mark.parametrize("n", [2, 8])
def test_one_group_that_all_but_decides_is_told_with_the_option(n: int) -> None:
    """A short gradient gets nearly all of the weight; with the cap that is named, it does not."""
    rows = gradients(n=n)
    rows[: len(rows) // 2, 3 % n] *= 0.01  # in half of the steps
    watched = run_of(records_of(rows))

    def run_with(cap: float | None) -> Run:
        found = [weigh(g @ g.T, "min_norm", cap=cap) for g in rows]
        return run_of(
            StepRecord(k, w.gramian, w.weights, w.gap, w.status, w.active, ())
            for k, w in enumerate(found)
        )

    ruled, bounded = run_with(None), run_with(1.5)
    for made, level, had in ((watched, None, "would have had"), (ruled, "look", "had")):
        (found,) = [f for f in findings(made) if "all but decides" in f.text]
        assert found.text.startswith(f"In 50 % of the records one group {had} more than 0.6")
        assert "cap=1.5" in found.text
        assert 'weighting="upgrad"' in found.text
        assert found.level == level
    for made in (bounded, run_of(records_of(gradients(n=n)))):
        assert not any("all but decides" in f.text for f in findings(made))


def test_verdicts() -> None:
    rows = gradients(n=8)
    run = run_of(records_of(rows))
    assert verdict(run, list(findings(run)))[0] in ("fine", "look")
    rows[:, 3] *= 8
    run = run_of(records_of(rows))
    level, said = verdict(run, list(findings(run)))
    assert level == "look"
    assert re.match(r"Group 3's gradient is [78]\.\d times as long", said)
    rows[:, 1] *= -0.1
    run = run_of(records_of(rows))
    assert verdict(run, list(findings(run))) == ("bad", "Group 1 is an outlier")


def test_noise_scale_is_in_examples_and_judged() -> None:
    rng = np.random.default_rng(0)
    for noise, expected in ((10.0, "Most of the step is noise"), (0.1, "larger than it needs")):
        # tr Σ = 100 · noise and ‖G‖² = 100
        rows = 1 + np.sqrt(noise) * rng.normal(size=(300, 4, 100))
        run = run_of(records_of(rows))
        assert run.noise_scale(slice(None)) == pytest.approx(noise, rel=0.1)
        text = summary(run, batch=32)
        assert expected in text
        (examples,) = re.findall(r"\(32 examples\), (\S+) examples", text)
        assert float(examples) == pytest.approx(32 * noise, rel=0.2)


def test_what_went_wrong_is_told() -> None:
    records = records_of(gradients(20))
    broken = records[3].gramian.copy()
    broken[1] = broken[:, 1] = np.nan
    records[3] = dataclasses.replace(
        records[3], gramian=broken, dropped=(1,), status=Status.NOT_FINITE
    )
    zero = records[5].gramian.copy()
    zero[2] = zero[:, 2] = 0
    records[5] = dataclasses.replace(records[5], gramian=zero)
    records[6] = dataclasses.replace(records[6], status="zero gradient: nothing to do")
    text = words(records)
    assert "those of GRAIN and the mean." in text  # record 6 is not one of averaging
    assert "1 of 20 records have a gradient with NaN or inf" in text
    assert "Group 1 was dropped in 1 of 20 records" in text
    assert "Group 2 had a gradient of exactly zero in 1 of 20 records" in text
    assert 'In 1 of 20 records the status was "zero gradient: nothing to do"' in text


def test_a_watched_run_stays_one_when_a_gradient_is_not_finite() -> None:
    records = records_of(gradients(20))
    records[3] = dataclasses.replace(
        records[3], gramian=np.full((4, 4), np.nan), status=Status.NOT_FINITE
    )
    run = run_of(records)
    assert not run.min_norm
    assert "those of the mean; GRAIN was watching only" in summary(run)


def test_another_number_of_groups_starts_anew() -> None:
    records = records_of(gradients(5, 3)) + [
        dataclasses.replace(r, step=r.step + 5) for r in records_of(gradients(20, 4))
    ]
    text = words(records)
    assert text.startswith("20 records, steps 5 to 24, 4 groups")
    assert "the 5 records before step 5" in text


@pytest.mark.parametrize("kind", ["one group", "one record", "all NaN", "all zero", "buckets"])
def test_odd_logs_make_words_and_a_picture(kind: str, tmp_path: Path) -> None:
    rows = gradients(1 if kind == "one record" else 20, 1 if kind == "one group" else 3)
    records = records_of(rows * (0 if kind == "all zero" else 1))
    if kind == "all NaN":
        records = [dataclasses.replace(r, gramian=r.gramian * np.nan) for r in records]
    if kind == "buckets":
        records = [in_buckets(r) for r in records]
    assert "What stands out\n- " in words(records)
    html = page({"run.jsonl": run_of(records)})
    assert ("<svg" in html) == (kind != "all NaN")
    assert "nan" not in html.lower().replace("have a gradient with nan", "").replace("have nan", "")
    if kind == "all NaN":
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(run_of(records), tmp_path / "run.png")
    else:
        draw(run_of(records), tmp_path / "run.png")
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


class Checker(HTMLParser):
    """What is opened is closed; nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith("data:image/png;base64,")
                assert base64.b64decode(value.split(",")[1]).startswith(b"\x89PNG")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("n", [4, 40])
def test_the_page_shows_the_evidence_behind_each_sentence(n: int) -> None:
    rows = gradients(300, n)
    rows[:, 2] *= -0.2
    run = run_of(records_of(rows))
    html = page({"<run> & co": run}, batch=8)
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert "<run> & co" in checker.words
    assert not re.search(r"https?://|@import|url\(", html)
    assert all(finding.text in checker.words for finding in findings(run, 8))
    assert checker.words.index("Group 2 is an outlier") < checker.words.index("How long are")
    assert html.count("<figure>") == len(panels(run)) == 7
    assert "prefers-color-scheme: dark" in html
    assert "refresh" not in html
    assert len(html) < 300_000


def test_two_runs_side_by_side_have_the_same_axes() -> None:
    small, large = (run_of(records_of(s * gradients())) for s in (1, 100))
    html = page({"a.jsonl": small, "b.jsonl": large})
    figures = re.findall(r"<figure>.*?</figure>", html)
    assert len(figures) == 14
    norms = [f for f in figures if "Norm of the gradients" in f]
    axes = [re.findall(r'class="end">([^<]*)<', f) for f in norms]
    assert axes[0] == axes[1]
    assert html.count('class="verdict') == 2


def test_a_group_that_was_there_alone_and_seldom_is_no_outlier() -> None:
    """As with labels, of which a step may have but one: it has no others to point against."""
    rows = gradients(40)
    rows[:, 3] = 0
    rows[20, :3], rows[20, 3] = 0, 1
    run = run_of(records_of(rows))
    assert run.outliers == []
    assert np.isnan(run.cosine_to_others[20]).all()


def test_a_suspect_comes_first_also_from_records_without_a_gramian() -> None:
    records = records_of(gradients())
    bad = [Suspect(k, 2, "node3", "cuda:1 (GPU-4f)", "peak", "head", 20.0, k) for k in (5, 15)]
    nothing = {"gramian": np.full((4, 4), np.nan), "gap": np.nan}
    records[5] = dataclasses.replace(records[5], **nothing, suspects=(bad[0],))
    records[15] = dataclasses.replace(records[15], suspects=(bad[1],))
    run = run_of(records)
    first = next(findings(run))
    assert first.text.startswith(
        "Rank 2 (cuda:1 (GPU-4f) of node3) is suspect: 2 times, at steps 5 to 15, it has an entry"
    )
    assert "most often in head" in first.text
    assert verdict(run, list(findings(run)))[0] == "bad"
    assert "NaN or inf" not in words(records)
    again = run_of([*records, *records[10:12]])  # resumed before the second, which is to come again
    assert [suspect.step for suspect in again.suspects] == [5]


def test_labels_have_their_names_and_come_and_go() -> None:
    """A new label leaves what was recorded before it; that one is absent is no finding."""
    draw = np.random.default_rng(0)
    records = []
    for step in range(60):
        labels = ("math", "code", "law")[: 2 if step < 30 else 3]
        rows = draw.normal(size=(len(labels), 40)) + 0.5
        if step % 3 == 0 and len(labels) == 3:
            rows[2] = 0
        rows[0] *= 30
        gramian = rows @ rows.T
        found = weigh(gramian, "mean")
        records.append(StepRecord(step, **vars(found), labels=labels))
    kept = run_of(records)
    assert kept.n == 3
    assert kept.records == 60
    assert kept.labels == ("math", "code", "law")
    np.testing.assert_allclose(kept.norms[3], [*records[3].norms, 0])
    said = "\n".join(finding.text for finding in findings(kept))
    assert 'Group "math"\'s gradient is' in said
    assert "exactly zero" not in said
    assert "number of groups changed" not in said
