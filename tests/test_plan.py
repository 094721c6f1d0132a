"""The plan: its bytes are those that travel, its formulas those of simpler models."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook
from grain_ddp.__main__ import main
from grain_ddp._core.agreement import MARKS
from grain_ddp._core.sharded import ShardedAggregation
from grain_ddp._core.transposed import SCRATCH_BYTES
from grain_ddp._tools.advice import KINDS, choices, figures, growth, recommend, report, sizes
from grain_ddp._tools.cost import Choice, Job, _overlapped, cost, overhead
from grain_ddp._tools.network import GPU_SOLVER, Cluster, Link
from grain_ddp._tools.plan import PRESETS, _asked, arguments, load
from grain_ddp._tools.quantities import count, rate, share, whole
from grain_ddp._wire.torch_wire import TorchWire

H100 = PRESETS["h100"][0]
CPU = Cluster(
    2, *[Link(1e-4, 1e9)] * 4, gramian=5e9, weighted_sum=5e9, copy=5e9, flops=1e10, gpu=False
)
JOB = Job(10**9, 4, 40, 1.0)


def counting(per_host: int) -> list[int]:
    """From now on: bytes that this rank sends, and those of them that leave its host."""
    found = [0, 0]
    exchange = TorchWire.exchange

    def counted(self: TorchWire, send: Any, receive: Any, *what: Any) -> Any:
        for j, tensor in enumerate(send):
            if j != self.rank:
                found[0] += tensor.nbytes
                found[1] += tensor.nbytes * (j // per_host != self.rank // per_host)
        return exchange(self, send, receive, *what)

    TorchWire.exchange = counted  # type: ignore[method-assign]
    return found


def ddp_bytes(per_host: int) -> list[Any]:
    """Scope, bytes of a number on the wire, bytes sent, those that left, buckets, parameters."""
    torch.manual_seed(0)
    sent, every = counting(per_host), []
    for scope in ("global", "bucket"):
        for wire_dtype in (None, torch.bfloat16):
            net = torch.nn.Sequential(*(torch.nn.Linear(150, 150) for _ in range(14)))
            model = DistributedDataParallel(net, bucket_cap_mb=0.2)
            state = GrainState(scope=scope, wire_dtype=wire_dtype)
            model.register_comm_hook(state, grain_hook)
            for _ in range(3):  # DDP settles its buckets in the first two
                sent[:] = 0, 0
                model(torch.randn(4, 150)).square().mean().backward()
            assert state.last is not None
            buckets = len(state.last.weights) if scope == "bucket" else 1
            size = sum(p.numel() for p in net.parameters())
            every.append((scope, wire_dtype and 2, *sent, buckets, size))
    return every


@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes_are_those_that_travel(n: int) -> None:
    per_host = 2 if n == 4 else 1
    every = run(n, ddp_bytes, per_host)
    for k, (scope, itemsize, _, _, buckets, size) in enumerate(every[0]):
        assert buckets > 1 or scope == "global"
        job = Job(size, 4, buckets, 0.0)
        choice = Choice(scope, 1, itemsize)
        expected = cost(replace(CPU, per_host=per_host), job, n, choice)
        for rank in every:
            assert rank[k][2] == pytest.approx(expected.sent, rel=0.01)
        assert sum(rank[k][3] for rank in every[:per_host]) == pytest.approx(expected.out, rel=0.01)


def sharded_bytes(scope: str) -> int:
    views = [[torch.randn(5000)] for _ in range(dist.get_world_size())]
    aggregation = ShardedAggregation(GrainState(scope=scope), TorchWire(dist.group.WORLD))
    found = counting(1)
    for _ in range(3):
        aggregation.push(views)
    aggregation.finish()
    return found[0]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_sharded_bytes_are_those_that_travel(n: int, scope: str) -> None:
    job = Job(15000 * n, 4, 3, 0.0, kind="fsdp")
    expected = cost(replace(CPU, per_host=1), job, n, Choice(scope)).sent
    for sent in run(n, sharded_bytes, scope):
        assert sent == pytest.approx(expected, rel=1e-9)


def test_plain_averaging_by_hand() -> None:
    cluster = replace(CPU, per_host=1, far_reduce=Link(1e-3, 1e8))
    found = cost(cluster, Job(10**6, 4, 1, 0.3), 4)
    assert found.sent == found.out == 2 * 3 / 4 * 4e6
    assert found.seconds == pytest.approx(0.3 + 2 * 3 * 1e-3 + 6e6 / 1e8)
    tree = cost(replace(cluster, gpu=True), Job(10**6, 4, 1, 0.3), 4)
    assert tree.seconds == pytest.approx(0.3 + 2 * 2 * 1e-3 + 6e6 / 1e8)


def test_grain_by_hand() -> None:
    """Two hosts of one rank: exchange, Gramian, solve, and the gather, which is slower here."""
    cluster = replace(CPU, per_host=1, far=Link(1e-3, 1e8), solver=((2, 0.01),))
    found = cost(cluster, Job(10**6, 4, 1, 0.3), 2, Choice("global"))
    assert found.sent == 4e6 + (3 + MARKS) * 8
    half = 1e-3 + 2e6 / 1e8
    assert found.seconds == pytest.approx(
        0.3 + 4e6 / 5e9 + half + 1e-3 + (3 + MARKS) * 8 / 1e8 + 0.01 + half
    )


@given(st.integers(1, 30), st.floats(0, 1), st.floats(0, 0.1))
def test_overlap_is_that_of_a_queue(buckets: int, compute: float, each: float) -> None:
    end = 0.0
    for k in range(buckets):
        end = max(end, compute * (k + 1) / buckets) + each
    assert _overlapped(compute, buckets, each) == pytest.approx(end)


@pytest.mark.parametrize("n", [16, 64, 1024])
def test_what_leaves_a_host(n: int) -> None:
    """A ring leaves a host once, an exchange of ranks eight times, one of nodes once again."""
    hosts = n // 8
    plain = cost(H100, JOB, n)
    rank = cost(H100, JOB, n, Choice("global"))
    node = cost(H100, JOB, n, Choice("global", 8))
    assert plain.out == pytest.approx(2 * (n - 1) / n * JOB.size)
    assert rank.out == pytest.approx(8 * 2 * (n - 8) / n * JOB.size, rel=0.01)
    assert node.out == pytest.approx(2 * (hosts - 1) / hosts * JOB.size, rel=0.01)
    assert rank.sent == pytest.approx(plain.sent, rel=0.01)
    assert node.sent == pytest.approx(plain.sent, rel=0.01)


def test_node_groups_stay_flat() -> None:
    curves = growth(H100, JOB, 64)
    assert max(curves["global, rank"]) == max(curves["global, node"]) == 16384
    assert curves["global, rank"][1024] > 10 * curves["global, node"][1024]
    for curve in curves.values():
        sizes = sorted(n for n in curve if n >= 16)
        assert [curve[n] for n in sizes] == sorted(curve[n] for n in sizes)


def test_sharded_is_half_of_the_way() -> None:
    for choice in (None, Choice("bucket", 8)):
        whole = cost(H100, JOB, 64, choice)
        half = cost(H100, replace(JOB, kind="fsdp"), 64, choice)
        assert half.sent == pytest.approx(whole.sent / 2, rel=0.01)


def test_the_solver_between_and_beyond_what_is_measured() -> None:
    cpus = replace(H100, gpu=False)
    for cluster, known in ((cpus, cpus.solver), (H100, GPU_SOLVER)):
        for n, seconds in known:
            assert cluster.solve(n) == pytest.approx(seconds)
        between = [cluster.solve(n) for n in range(2, 1025)]
        assert between == sorted(between)
        assert cluster.solve(2048) == pytest.approx(8 * cluster.solve(1024))
    assert not H100.waits(64)
    assert H100.waits(65)
    assert cpus.waits(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [8, 64, 1024, 16384])
def test_a_sketch_costs_little_in_bucket_scope(kind: str, ranks: int) -> None:
    """In buckets of 200 MB, and groups that make 8 to 64 rows."""
    job = Job(10**9, 4, 20, 0.3, kind)
    groups = [g for g in (1, 8, 32, 128, 512, 2048) if 8 <= ranks // g <= 64]
    found = [overhead(H100, job, ranks, Choice("bucket", g, sketch=1 << 20)) for g in groups]
    assert min(found) <= 0.05
    moved = cost(H100, job, ranks, Choice("bucket", groups[-1], sketch=1 << 20)).out
    assert moved <= 1.03 * cost(H100, job, ranks).out


def test_memory_of_many_gramians() -> None:
    """One per bucket is kept until the step ends, and in global scope they are stacked then."""
    few, many = (cost(H100, JOB, n, Choice("global")).memory for n in (32, 4096))
    # Scratch; Gramians; gathered triangles.
    assert few == SCRATCH_BYTES + 8 * (2 * 40 * 32**2 + 32 * 528)
    assert many == pytest.approx(2 * 40 * 8 * 4096**2, rel=0.1)
    assert cost(H100, JOB, 4096, Choice("bucket")).memory < many


def test_global_scope_keeps_what_sharding_gives_away() -> None:
    zero = replace(JOB, kind="zero2")
    more = [cost(H100, zero, 32, Choice(scope)).memory for scope in ("global", "bucket")]
    assert more[0] - more[1] > 0.9 * JOB.size


def test_recommendations() -> None:
    fast = replace(JOB, compute=5.0)  # all is hidden behind computing
    assert 'Take scope="global", groups="rank": ' in recommend(H100, fast, 8, 0.05)
    said = recommend(H100, fast, 1024, 0.05)
    assert 'groups="rank", sketch=2**20: ' in said
    assert "within the 5 % allowed" in said
    found = re.search(r"make (\d+) rows out of 1024", recommend(H100, JOB, 1024, 0.05))
    assert found is not None
    assert 8 <= int(found[1]) <= 128
    sharded = replace(JOB, kind="zero3", buckets=10)
    assert "sketch=2**20: " in recommend(H100, sharded, 1024, 0.05)
    assert "the least there is, and more than the 0 % allowed" in recommend(H100, JOB, 64, 0.0)
    assert recommend(H100, JOB, 1, 0.05).startswith("Alone")


@pytest.mark.parametrize("ranks", [2, 3, 8, 16, 24, 64, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_an_integration_does_is_offered(kind: str, ranks: int) -> None:
    job = replace(JOB, kind=kind)
    found = list(choices(H100, job, ranks))
    assert found
    if kind == "fsdp":
        assert {choice.scope for choice in found} == {"bucket"}
    if kind != "ddp":
        assert {choice.group for choice in found if not choice.sketch} == {1}
    assert all(choice.group == 1 or ranks / choice.group > 2 for choice in found)
    names = {choice.name(8) for choice in found if choice.itemsize is None}
    assert all(name in names for name, curve in growth(H100, job, ranks).items() if ranks in curve)
    recommend(H100, job, ranks, 0.0)


def test_two_rows_are_called_what_they_are() -> None:
    assert list(sizes(H100, JOB, 16)) == [1]
    assert "Groups of 8 would make two rows, whose weights are nearly the mean's" in recommend(
        H100, JOB, 16, 0.0
    )
    zero = recommend(H100, replace(JOB, kind="zero3"), 64, -0.5)
    assert 'To watch only, with weighting="mean" and record_every=10' in zero


def test_what_does_not_fit_is_not_recommended() -> None:
    job = Job(70 * 10**9, 4, 140, 8.6, "zero3")
    assert 'Take scope="bucket"' in recommend(H100, job, 1024, 1e9)
    assert "282 GB, does not fit |" in report(H100, job, 1024, 0.05)
    assert 'Take scope="global"' in recommend(replace(H100, capacity=None), job, 1024, 1e9)


def test_what_a_model_needs() -> None:
    """16 bytes for each parameter, of which sharding takes away its parts."""
    needs = {kind: Job(10**9, 2, 1, 1.0, kind).states(64) / 1e9 for kind in KINDS}
    assert needs == pytest.approx(
        {
            "ddp": 16,
            "zero1": 4 + 12 / 64,
            "zero2": 2 + 14 / 64,
            "zero3": 16 / 64,
            "fsdp": 16 / 64,
        }
    )


def test_the_recommendation_is_the_first_within_the_budget() -> None:
    own = [c for c in choices(H100, JOB, 256) if c.itemsize is None]
    allowed = sorted(overhead(H100, JOB, 256, c) for c in own)[2]
    first = next(c for c in own if overhead(H100, JOB, 256, c) <= allowed)
    name = {1: '"rank"', 8: '"node"'}.get(first.group, str(first.group))
    start = f'Take scope="{first.scope}", groups={name}: '
    assert recommend(H100, JOB, 256, allowed).startswith(start)


def test_quantities() -> None:
    assert count("1.5B") == 1.5e9
    assert rate("400Gbps") == rate("400Gbit/s") == rate("400Gb/s") == rate("50GB/s") == 50e9
    assert share("5%") == share("5") == share("5 %") == 0.05
    assert share("0") == 0
    assert whole()("12") == 12
    for wrong in (
        "",
        "-1M",
        "1 parsec",
        "many",
        "0",
        "nan",
        "inf",
        "1e400",
        "9" * 400,
        "0." + "0" * 400,
    ):
        with pytest.raises(argparse.ArgumentTypeError, match="such as 7B") as raised:
            count(wrong)
        assert len(str(raised.value)) < 200
    for kind, wrong in ((share, "-5"), (share, "nan"), (whole(), "9" * 5000)):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a"):
            kind(wrong)


def test_a_model_that_does_not_fit_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--parameters", "7B"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "It does not fit: parameters, gradients and Adam's states take 112 GB of"
    )
    assert "it has 80.0 GB. With --zero 1 it takes 56.9 GB." in said
    assert main(["plan", "--parameters", "7B", "--gpu-memory", "141GB"]) == 0
    assert "not fit" not in capsys.readouterr().out
    assert main(["plan", "--parameters", "1T", "--fsdp"]) == 0
    assert "That takes more than 200 of them." in capsys.readouterr().out


DOCS = Path(__file__).parents[1] / "docs"


def test_figures_in_the_docs_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Every ```text block of the page on planning follows the command that printed it."""
    page = (DOCS / "planning.md").read_text(encoding="utf-8")
    found = re.findall(
        r"```bash\ngrain-ddp (plan [^\n]*)\n```\n+```text\n(.*?)```", page, re.DOTALL
    )
    assert len(found) >= 2
    for command, printed in found:
        assert main(shlex.split(command.split(" --out ")[0])) == 0
        said = capsys.readouterr().out
        for part in printed.split("...\n"):  # what is left out
            assert part.strip() in said, command


def test_the_picture_in_the_docs_is_that_of_the_command() -> None:
    """It carries its figures."""
    image = pytest.importorskip("PIL.Image").open(DOCS / "images" / "plan.png")
    asked = argparse.ArgumentParser()
    arguments(asked)
    assert image.text["Description"] == figures(growth(*_asked(asked.parse_args([]))))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    asked = ["plan", "--parameters", "7B", "--gpus", "128", "--link", "200Gbit/s"]
    assert main([*asked, "--json", str(out), "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.count("7.00B parameters, 128 GPUs on 16 hosts, DDP") == 1
    assert "| bucket, node |" in said
    assert "\nTake scope=" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    assert found["cluster"]["far"]["bandwidth"] == 25e9
    cluster, job = Cluster.of(found["cluster"]), Job(**found["job"])
    assert found["plain"]["seconds"] == pytest.approx(cost(cluster, job, 128).seconds)
    assert math.isclose(found["choices"][0]["sent"], cost(cluster, job, 128, Choice("global")).sent)


@pytest.mark.parametrize("parameters", ["1M", "1T"])
@pytest.mark.parametrize("gpus", ["1", "2", "16384"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_size(
    parameters: str, gpus: str, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--fsdp"], ["--zero", "1"]):
        asked = ["--parameters", parameters, "--gpus", gpus, "--preset", preset, *more]
        assert main(["plan", *asked]) == 0
        assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--gpus", "100"], 1, "100 GPUs do not fill hosts of 8: give a multiple"),
        (
            ["--gpus", "0"],
            2,
            "expected a whole number of at least 1 and at most 1000000",
        ),
        (["--budget", "nan"], 2, "expected a number with a unit, such as 5%"),
        (["--budget", "-5"], 2, "expected a number with a unit, such as 5%"),
        (["--compute", "1e400s"], 2, "such as 300ms"),
        (["--bucket", "1e300GiB"], 2, "such as 25MiB"),
        (["--bucket", "1B", "--parameters", "1T"], 1, "makes 4e+12 buckets"),
        (["--preset", "h100", "--from", "x.json"], 2, "not allowed with argument"),
        (["--fsdp", "--zero", "2"], 2, "not allowed with argument"),
        (["--zero", "4"], 2, "invalid choice"),
        (["--json", "theirs.json"], 1, "it exists, and grain_ddp did not make it"),
        (["--out", "missing/curve.png"], 1, "missing is not a folder"),
        (["--link", "200"], 2, "a positive number with a unit, such as 200Gbit/s"),
        (["--preset", "h1000"], 2, "invalid choice"),
        (["--from", "missing.json"], 1, "missing.json: No such file"),
        (["--from", "other.json"], 1, "expected what `grain-ddp bench --json other.json` writes"),
        (["--out", "curve.foo"], 1, "expected a picture's name"),
    ],
)
def test_errors_are_sentences(
    arguments: list[str],
    status: int,
    expected: str,
    refuses: Callable[[list[str], int, str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("{}")
    Path("theirs.json").write_text("{}")
    refuses(["plan", *arguments], status, expected)


def test_a_link_that_nobody_measured() -> None:
    alone = replace(CPU, far=None, far_reduce=None)
    assert cost(alone, JOB, 2).out == 0
    with pytest.raises(ValueError, match=r"need a link between hosts.*--link"):
        cost(alone, JOB, 4)
    assert all(n <= 2 for curve in growth(alone, JOB, 2).values() for n in curve)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "9" * 5000,
        "[]",
        '{"cluster": 3}',
        '{"steps": [NaN]}',
        "cluster.per_host=1e400",
        "cluster.gramian=-1",
        "cluster.gramian=null",
        "cluster.solver=[]",
        "cluster.near={}",
        "cluster.near.latency=0",
        "steps=[]",
        "steps.0.seconds=0",
        "steps.0.parameters=" + "9" * 400,
        "ranks=0",
        "ranks=null",
    ],
)
def test_another_file_in_place_of_a_benchs(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    step = {"variant": "no-op hook", "seconds": 0.1, "parameters": 10**6}
    found: Any = {"cluster": asdict(CPU), "steps": [step], "ranks": 2}
    path.write_text(json.dumps(found))
    assert load(path)[0] == CPU
    if "=" in text:
        names, value = text.split("=")
        *outer, last = names.split(".")
        inner = found
        for name in outer:
            inner = inner[int(name) if name.isdecimal() else name]
        inner[last] = "@"
        text = json.dumps(found).replace('"@"', value)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected what `grain-ddp bench --json .*` writes"):
        load(path)
