#!/usr/bin/env python3
"""Several hosts on one Linux machine, as root: the same command runs on each of them.

    sudo .venv/bin/python launch/cluster_in_a_box.py --hosts 2 --ranks 2 --rate 200mbit \\
        torchrun examples/cluster.py --steps 100

A host is a network namespace with a name (host0, host1, ...), an address and a link of its own,
joined to the others by a switch. CPUs, memory and disks are shared, so times say little beyond what
the links explain. The command finds torchrun's options in the environment (PET_NNODES, ...), so
`torchrun script.py` is enough; for others there are NODE_RANK, NNODES and MASTER_ADDR.

The exit status is that of the first host that fails; the others then have --grace seconds to end.
Several clusters may run at the same time. Needs iproute2 and util-linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

# The shell sets the host's name in a namespace of its own, and becomes the command.
_NAMED = 'hostname "$1" && shift && exec "$@"'


class Unavailable(RuntimeError):
    """This machine or this user cannot make network namespaces; the message says why."""


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Unavailable(f"cluster in a box: {' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


class Cluster:
    """Hosts numbered from 0. A context manager: leaving it ends every process on them.

    Nothing is made outside the namespaces: neither the machine's own interfaces nor its firewall
    are involved, and clusters do not see each other.
    """

    def __init__(self, hosts: int, *, rate: str | None = None, prefix: str = "box") -> None:
        """`rate` limits each link in each direction, in tc's units: "200mbit"."""
        self.size, self.rate = hosts, rate
        self._switch = f"{prefix}{os.getpid()}-{id(self):x}"
        self._hosts = [f"{self._switch}-{i}" for i in range(hosts)]

    def __enter__(self) -> Cluster:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise Unavailable(
                "cluster in a box: network namespaces need Linux and root. Run it with sudo."
            )
        packages = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
        for tool, package in {**packages, "hostname": "hostname"}.items():
            if shutil.which(tool) is None:
                raise Unavailable(f"cluster in a box: needs {tool}. Install {package}.")
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self) -> None:
        names = "".join(  # PyTorch asks for the names of the addresses in their IPv6 form too
            f"{self.address(i)} host{i}\n::ffff:{self.address(i)} host{i}\n"
            for i in range(self.size)
        )
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "name", "switch", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "switch", "up")
        for i, host in enumerate(self._hosts):
            files = Path("/etc/netns", host)  # what `ip netns exec` shows in /etc
            files.mkdir(parents=True)
            (files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            _run("ip", "netns", "add", host)
            pair = ["type", "veth", "peer", "name", "eth0", "netns", host]
            _run("ip", "link", "add", "name", f"port{i}", "netns", self._switch, *pair)
            _run("ip", "-n", self._switch, "link", "set", f"port{i}", "master", "switch", "up")
            _run("ip", "-n", host, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _run("ip", "-n", host, "link", "set", "lo", "up")
            _run("ip", "-n", host, "link", "set", "eth0", "up")
            if self.rate is not None:
                bucket = ["tbf", "rate", self.rate, "burst", "128kb", "latency", "400ms"]
                for where, device in ((host, "eth0"), (self._switch, f"port{i}")):
                    _run("tc", "-n", where, "qdisc", "add", "dev", device, "root", *bucket)

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    def environment(self, host: int, ranks: int = 1) -> dict[str, str]:
        """What a process on the host finds in its environment, beside what is there already."""
        return {
            "OMP_NUM_THREADS": "1",  # the hosts share the machine's cores
            "GLOO_SOCKET_IFNAME": "eth0",
            "NODE_RANK": str(host),
            "NNODES": str(self.size),
            "MASTER_ADDR": "host0",
            # torchrun's options of these names
            "PET_NNODES": str(self.size),
            "PET_NPROC_PER_NODE": str(ranks),
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": "host0:29400",
            "PET_RDZV_ID": "box",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a command on a host; `environment` is added to its own, `options` are Popen's."""
        named = ["unshare", "--uts", "sh", "-c", _NAMED, "sh", f"host{host}", *command]
        return subprocess.Popen(
            ["ip", "netns", "exec", self._hosts[host], *named],
            env={**os.environ, **self.environment(host, ranks), **(environment or {})},
            start_new_session=True,  # a Ctrl-C is for this script, which ends the hosts
            text=True,
            **options,
        )

    def cut(self, host: int) -> None:
        """Pull the host's cable."""
        _run("ip", "-n", self._switch, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Plug it in again."""
        _run("ip", "-n", self._switch, "link", "set", f"port{host}", "up")

    def sent(self, host: int) -> int:
        """Bytes that the host has sent on its link, with the headers, since the start."""
        found = _run("ip", "-n", self._hosts[host], "-s", "-j", "link", "show", "eth0")
        return int(json.loads(found)[0]["stats64"]["tx"]["bytes"])

    def processes(self, host: int) -> list[int]:
        """Ids of the processes on the host."""
        command = ["ip", "netns", "pids", self._hosts[host]]
        return [*map(int, subprocess.run(command, capture_output=True, text=True).stdout.split())]

    def kill(self, host: int, with_signal: int = signal.SIGKILL) -> bool:
        """Signal every process on the host. Whether there was one."""
        found = self.processes(host)
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, with_signal)
        return bool(found)

    def close(self) -> None:
        """End every process and remove what was made. May be called again."""
        until = time.monotonic() + 5
        with_signal = signal.SIGTERM
        while sum(self.kill(host, with_signal) for host in range(self.size)):
            time.sleep(0.2)
            if time.monotonic() > until:
                with_signal = signal.SIGKILL
        for i, host in enumerate(self._hosts):
            # The link first: a namespace lives on while one of its sockets does.
            for command in (f"-n {self._switch} link del port{i}", f"netns del {host}"):
                subprocess.run(["ip", *command.split()], capture_output=True)
            shutil.rmtree(f"/etc/netns/{host}", ignore_errors=True)
        subprocess.run(["ip", "netns", "del", self._switch], capture_output=True)


def _say(host: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"host{host}: {line}", end="" if line.endswith("\n") else "\n", flush=True)


def run(cluster: Cluster, command: Sequence[str], ranks: int, grace: float) -> int:
    """Run the command on all hosts. The exit status of the first that fails, or 0."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    processes = [
        cluster.start(i, command, ranks=ranks, errors="replace", **pipes)
        for i in range(cluster.size)
    ]
    speakers = [
        threading.Thread(target=_say, args=(i, process), daemon=True)
        for i, process in enumerate(processes)
    ]
    for speaker in speakers:
        speaker.start()
    status, until = 0, float("inf")
    while time.monotonic() < until:
        found = [process.poll() for process in processes]
        failures = [code for code in found if code]
        if failures and not status:
            status = failures[0] if failures[0] > 0 else 128 - failures[0]
            until = time.monotonic() + grace
        if None not in found:
            break
        time.sleep(0.05)
    for speaker in speakers:
        speaker.join(1)  # what a command left behind may keep its output open
    return status


def _leave(number: int, _: FrameType | None) -> None:
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # tidying up is not interrupted
    sys.exit(128 + number)


def main() -> int:
    doc = __doc__ or ""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="processes that torchrun starts each")
    parser.add_argument("--rate", help="of each link, as tc writes it: 200mbit; default: no limit")
    parser.add_argument("--prefix", default="box", help="of the namespaces' names")
    parser.add_argument(
        "--bytes", action="store_true", help="print what each host sent, at the end"
    )
    parser.add_argument("--grace", type=float, default=30, help="seconds after the first failure")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what runs on every host")
    options = parser.parse_args()
    if not 1 <= options.hosts <= 254:
        parser.error("--hosts must be between 1 and 254")
    if not options.command:
        parser.error("name a command to run on every host")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with Cluster(options.hosts, rate=options.rate, prefix=options.prefix) as cluster:
            status = run(cluster, options.command, options.ranks, options.grace)
            if options.bytes:
                for host in range(cluster.size):
                    print(f"host{host} sent {cluster.sent(host)} bytes", flush=True)
            return status
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
