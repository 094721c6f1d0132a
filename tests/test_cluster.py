"""Several hosts: network namespaces with links of their own, processes that find each other by TCP.

What holds on one host holds across them; and when a rank or a link is lost, every rank that is left
gets an error in time, with the parameters of the last complete step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from boxes import BOX, DEADLINE, unavailable, until
from cluster_in_a_box import Cluster, Unavailable

TESTS = Path(__file__).parent
TIMEOUT = 5.0  # seconds, of the process group


@pytest.fixture(autouse=True)
def _needs_root(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("root") and unavailable():
        pytest.skip(unavailable())


def launch(
    cluster: Cluster, per_host: int, folder: Path, function: str, *arguments: object
) -> list[subprocess.Popen[str]]:
    """Start cluster_rank.py as every rank, without a launcher that would end it with others."""
    program = [sys.executable, TESTS / "cluster_rank.py", function, folder, *arguments]
    size = cluster.size * per_host
    return [
        cluster.start(
            rank // per_host,
            [str(word) for word in program],
            environment={
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank % per_host),
                "PER_HOST": str(per_host),
                "MASTER_PORT": "29500",
                "TIMEOUT": str(TIMEOUT),
            },
            stderr=(folder / f"{rank}.err").open("w"),
        )
        for rank in range(size)
    ]


def findings(processes: list[subprocess.Popen[str]], folder: Path) -> dict[int, Any]:
    """What each rank that was not lost has found, by rank."""
    end = time.monotonic() + DEADLINE
    for process in processes:
        process.wait(max(0.1, end - time.monotonic()))
    found = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
    for rank, process in enumerate(processes):
        assert process.returncode in (0, -signal.SIGKILL), (folder / f"{rank}.err").read_text()
    return found


@pytest.mark.root
@pytest.mark.parametrize(("hosts", "per_host"), [(2, 1), (2, 2), (4, 1)])
def test_across_hosts(hosts: int, per_host: int, tmp_path: Path) -> None:
    n = hosts * per_host
    with Cluster(hosts) as cluster:
        found = findings(launch(cluster, per_host, tmp_path, "training"), tmp_path)
    assert sorted(found) == list(range(n))
    for rank, result in found.items():
        assert result["error"] < 1e-5
        assert result["mean"] < 1e-6
        assert result["nodes"] < 1e-5
        assert result["same"]
        # Rings cross a link once, as the gather does; pairs of ranks as often as there are pairs.
        crossing = (per_host * (n - per_host) / (n - 1) + 1) / 2
        assert result["bytes"]["plain"] > 2 * (n - 1) / n * 4.0e6
        assert result["bytes"]["grain"] <= 1.01 * crossing * result["bytes"]["plain"]
        # With a sketch the backend's own ring carries the gradients, whoever shares the link.
        assert result["bytes"]["sketch"] <= 1.03 * result["bytes"]["plain"]
        # Between hosts as groups a link carries what a ring of hosts would, and the headers.
        hierarchical = 2 * (hosts - 1) / hosts * 4.0e6
        assert hierarchical < result["bytes"]["nodes"] < 1.03 * hierarchical
        assert result["host"] == rank // per_host
        message = f"cap must be the same on every rank, but it is rank 0: None, rank {per_host - 1}"
        assert message.replace("rank 0: None, rank 0", "rank 0: None") in result["options"]
        assert f"rank {per_host}: 2.0" in result["options"]
        assert f"(this is rank {rank})" in result["options"]


def check_survivors(found: dict[int, Any], lost: int, seconds: float) -> None:
    assert len({result["parameters"] for result in found.values()}) == 1
    for rank, result in found.items():
        assert result["step"] == 5  # the lost rank never sent what step 5 needs
        assert result["whole"]
        assert not result["pending"]
        assert result["seconds"] < seconds
        assert "grain_ddp: lost the connection to rank " in result["error"]
        if rank != lost:
            assert f"lost the connection to rank {lost}: it has died" in result["error"]
        assert result["cause"] in result["error"]


@pytest.mark.root
@pytest.mark.parametrize(("hosts", "per_host", "lost"), [(3, 1, 2), (2, 2, 0)])
def test_a_killed_rank(hosts: int, per_host: int, lost: int, tmp_path: Path) -> None:
    with Cluster(hosts) as cluster:
        processes = launch(cluster, per_host, tmp_path, "losing", "kill", lost)
        found = findings(processes, tmp_path)
    assert sorted(found) == sorted(set(range(hosts * per_host)) - {lost})
    check_survivors(found, lost, TIMEOUT + 3)


@pytest.mark.root
def test_a_cut_link(tmp_path: Path) -> None:
    with Cluster(3) as cluster:
        processes = launch(cluster, 1, tmp_path, "losing", "cut", 2)
        until((tmp_path / "ready").exists)
        cluster.cut(2)
        (tmp_path / "go").touch()
        found = findings(processes, tmp_path)
    assert sorted(found) == [0, 1, 2]
    check_survivors(found, 2, TIMEOUT + 3)


@pytest.mark.root
def test_a_link_that_comes_back(tmp_path: Path) -> None:
    with Cluster(2) as cluster:
        processes = launch(cluster, 1, tmp_path, "losing", "cut", 1)
        until((tmp_path / "ready").exists)
        cluster.cut(1)
        (tmp_path / "go").touch()
        time.sleep(TIMEOUT / 5)
        cluster.mend(1)
        found = findings(processes, tmp_path)
    assert [found[rank] for rank in (0, 1)] == [
        {"host": host, "step": 20, "same": True} for host in (0, 1)
    ]


@pytest.mark.root
def test_the_box_counts_limits_and_reports_the_first_failure(tmp_path: Path) -> None:
    script = tmp_path / "talk.py"
    script.write_text(
        "import os, socket, sys, time\n"
        "if os.environ['NODE_RANK'] == '0':\n"
        "    taken = socket.create_server(('host0', 7777)).accept()[0]\n"
        "    while taken.recv(65536): pass\n"
        "    time.sleep(60)\n"
        "for _ in range(100):\n"
        "    try: end = socket.create_connection(('host0', 7777)); break\n"
        "    except ConnectionRefusedError: time.sleep(0.1)\n"
        "end.sendall(bytes(2_500_000)); end.close(); sys.exit(7)\n"
    )
    command = [*BOX, "--rate", "20mbit", "--bytes", "--grace", "0.5", sys.executable, str(script)]
    begin = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == 7
    assert 0.8 < time.monotonic() - begin < 50  # 20 Mbit at 20 Mbit/s, less the burst
    counts = dict(line.split(" sent ") for line in result.stdout.splitlines() if " sent " in line)
    assert 2_500_000 < int(counts["host1"].split()[0]) < 2_800_000
    assert int(counts["host0"].split()[0]) < 200_000


@pytest.mark.root
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_box_leaves_nothing_behind(sign: signal.Signals, tmp_path: Path) -> None:
    prefix = f"test{os.getpid()}"
    mark = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {mark}.$NODE_RANK; trap '' INT; sleep 600 & wait; sleep 600"]
    process = subprocess.Popen([*BOX, "--prefix", prefix, *command])
    until(lambda: Path(f"{mark}.1").exists() and Path(f"{mark}.0").exists())
    process.send_signal(sign)
    assert process.wait(DEADLINE) == 128 + sign
    namespaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert prefix not in namespaces
    assert not list(Path("/etc/netns").glob(f"{prefix}*"))
    for i in range(2):
        assert not Path("/proc", Path(f"{mark}.{i}").read_text().strip()).exists()


def test_without_root_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="need Linux and root"), Cluster(1):
        pass
