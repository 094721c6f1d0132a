"""Step times that `grain-ddp plan` predicts against those that are measured over slow links.

    sudo OMP_NUM_THREADS=1 python docs/benchmarks/plan.py            # Linux, as root
    python docs/benchmarks/plan.py --smoke      # two ranks on loopback, a few steps

Makes hosts out of network namespaces, joined by a bridge and each limited to a rate by tc; runs
`grain-ddp bench` on them; and has the plan predict each variant from what bench measured of links,
memory and solver. Of the step itself the plan is told the computing only: the no-op hook's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from grain_ddp._tools.cost import Choice, Job, cost
from grain_ddp._tools.network import Cluster

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.78.0"


def sh(command: str) -> None:
    subprocess.run(shlex.split(command), check=True)


@contextmanager
def namespaces(hosts: int, rate: str):
    """Commands to start a program on each host with."""
    try:
        sh("ip link add gplan type bridge")
        sh("ip link set gplan up")
        for i in range(1, hosts + 1):
            sh(f"ip netns add gplan{i}")
            sh(f"ip link add gplanv{i} type veth peer name eth0 netns gplan{i}")
            sh(f"ip link set gplanv{i} master gplan up")
            sh(f"ip -n gplan{i} addr add {NETWORK}.{i}/24 dev eth0")
            sh(f"ip -n gplan{i} link set lo up")
            sh(f"ip -n gplan{i} link set eth0 up")
            sh(
                f"ip netns exec gplan{i} tc qdisc add dev eth0 root tbf "
                f"rate {rate} burst 128kb latency 400ms"
            )
        yield [f"ip netns exec gplan{i} " for i in range(1, hosts + 1)]
    finally:
        for i in range(1, hosts + 1):
            subprocess.run(["ip", "link", "del", f"gplanv{i}"], check=False)
            subprocess.run(["ip", "netns", "del", f"gplan{i}"], check=False)
        subprocess.run(["ip", "link", "del", "gplan"], check=False)


def bench(prefixes: list[str], per_host: int, options: list[str], address: str) -> dict:
    """What `grain-ddp bench` finds, with so many ranks behind each prefix."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bench.json")
        ranks = []
        for host, prefix in enumerate(prefixes):
            for local in range(per_host):
                environment = {
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "RANK": str(host * per_host + local),
                    "WORLD_SIZE": str(len(prefixes) * per_host),
                    "LOCAL_RANK": str(local),
                    "GROUP_RANK": str(host),
                    "MASTER_ADDR": address,
                    "MASTER_PORT": str(port),
                    "TORCH_CPP_LOG_LEVEL": "ERROR",  # addresses without a name
                    **({"GLOO_SOCKET_IFNAME": "eth0"} if prefix else {}),
                }
                command = [*shlex.split(prefix), sys.executable, "-m", "grain_ddp", "bench"]
                command += ["--backend", "gloo", "--json", str(out), *options]
                quiet = None if not ranks else subprocess.DEVNULL
                ranks.append(subprocess.Popen(command, env=environment, stdout=quiet))
        try:
            if any(process.wait(1800) for process in ranks):
                raise SystemExit("A rank failed: its message is above.")
        finally:
            for process in ranks:
                process.kill()
        return json.loads(out.read_text())


def compare(found: dict) -> None:
    """Print predicted against measured, for every variant of the bench that is not monitor mode."""
    cluster, ranks = Cluster.of(found["cluster"]), found["ranks"]
    print("\n| variant | measured, ms | predicted, ms | predicted / measured |")
    print("|---|---|---|---|")
    compute = next(step for step in found["steps"] if step["variant"] == "no-op hook")["seconds"]
    for step in found["steps"]:
        options = step["options"]
        if step["variant"] == "no-op hook" or "weighting" in options:
            continue
        choice = None
        if options:
            sizes = {"rank": 1, "node": cluster.per_host}
            size = sizes.get(options["groups"], options["groups"])
            narrow = 2 if options.get("wire_dtype") == "bf16" else None
            choice = Choice(options["scope"], size, narrow, options.get("sketch"))
        job = Job(step["parameters"], 4, step["buckets"], compute)
        predicted = cost(cluster, job, ranks, choice).seconds
        print(
            f"| {step['variant']} | {1e3 * step['seconds']:.1f} | {1e3 * predicted:.1f} | "
            f"{predicted / step['seconds']:.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--per-host", type=int, default=1, help="ranks on each host")
    parser.add_argument("--rate", default="200mbit", help="of each host's link, as tc writes it")
    parser.add_argument("--parameters", default="3M")
    parser.add_argument("--rounds", default="3")
    parser.add_argument("--groups", nargs="+", default=["rank"])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        compare(bench([""], 2, ["--quick", "--record-every"], "127.0.0.1"))
        return
    what = ["--parameters", options.parameters, "--rounds", options.rounds, "--steps", "3"]
    what += ["--record-every", "--groups", *options.groups]
    for hosts in options.hosts:
        print(f"\n## {hosts} hosts, {options.per_host} ranks on each, {options.rate}\n", flush=True)
        print(f"Load average {os.getloadavg()[0]:.1f}.\n", flush=True)
        with namespaces(hosts, options.rate) as prefixes:
            compare(bench(prefixes, options.per_host, what, f"{NETWORK}.1"))


if __name__ == "__main__":
    main()
