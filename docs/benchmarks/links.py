"""Bytes on the link of each host, and times, of a step with several ranks per host, as Markdown.

    python docs/benchmarks/links.py --hosts 2 --ranks 4 --rate 200mbit   # as root

Hosts are network namespaces with a link each (launch/cluster_in_a_box.py); ranks of one host read
each other's memory, or, for the backend's own collectives, use its link inside. Every variant
trains a model of its own of square layers; they take turns in rounds, and a ratio is of blocks of
one round. Bytes are those that leave a host, headers included, the least of some steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, fsdp, grain_hook
from grain_ddp._tools.trial import network

BOX = Path(__file__).parents[2] / "launch" / "cluster_in_a_box.py"
DDP: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "global": {},
    "bucket": {"scope": "bucket"},
    "bucket, node": {"scope": "bucket", "groups": "node"},
    "global, sketch": {"sketch": 1 << 18},
    "bucket, sketch": {"scope": "bucket", "sketch": 1 << 18},
    "monitor, every step": {"weighting": "mean"},
    "monitor, every 10 steps": {"weighting": "mean", "record_every": 10},
}
SHARDED: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "bucket": {"scope": "bucket"},
    "bucket, sketch": {"scope": "bucket", "sketch": 1 << 18},
}
Step = Callable[[], None]


def ddp(net: nn.Module, options: dict[str, Any] | None) -> nn.Module:
    model = DistributedDataParallel(net)
    if options is not None:
        model.register_comm_hook(GrainState(**options), grain_hook)
    return model


def fsdp2(net: nn.Sequential, options: dict[str, Any] | None) -> nn.Module:
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(net)
    if options is not None:
        fsdp.apply(net, GrainState(**options))
    return net


def zero2(net: nn.Module, options: dict[str, Any] | None) -> Any:
    import deepspeed

    import grain_ddp.deepspeed

    assert grain_ddp.deepspeed
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 2_000_000},
        "optimizer": {"type": "SGD", "params": {"lr": 1e-9}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if options is not None:
        config["grain"] = {"enabled": True, **options}
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-9)
    del config["optimizer"]
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    return engine


def steps(options: argparse.Namespace) -> Iterator[tuple[str, str, Step]]:
    """Every variant's step."""
    x = torch.randn(options.batch, network(options.parameters, options.layers)[0].in_features)
    for kind, build, variants in (
        ("DDP", ddp, DDP),
        ("FSDP2", fsdp2, SHARDED),
        ("ZeRO 2", zero2, SHARDED),
    ):
        if kind not in options.kinds:
            continue
        for name, state in variants.items():
            model: Any = build(network(options.parameters, options.layers), state)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

            def step(
                model: Any = model, optimizer: Any = optimizer, own: bool = kind == "ZeRO 2"
            ) -> None:
                loss = model(x + dist.get_rank()).square().mean()
                if own:
                    model.backward(loss)
                    model.step()
                    return
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            yield kind, name, step


def sent() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(x for x in lines if "eth0:" in x).split(":")[1].split()[8])


def rank(options: argparse.Namespace) -> None:
    """What each rank does; the first of all writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trials = list(steps(options))
    times: list[list[float]] = [[] for _ in trials]
    counts: list[list[int]] = [[] for _ in trials]
    for k in range(options.rounds + 1):
        for i in range(len(trials)) if k % 2 else reversed(range(len(trials))):
            dist.barrier()
            before, start = sent(), time.perf_counter()
            for _ in range(options.steps):
                trials[i][2]()
            dist.barrier()
            times[i].append((time.perf_counter() - start) / options.steps)
            counts[i].append((sent() - before) // options.steps)
    rows = []
    for i, (kind, name, _) in enumerate(trials):
        first = next(j for j, trial in enumerate(trials) if trial[0] == kind)
        ratios = [a / b for a, b in zip(times[i][1:], times[first][1:], strict=True)]
        rows.append(
            (
                kind,
                name,
                statistics.median(times[i][1:]),
                statistics.median(ratios),
                min(counts[i][1:]),
            )
        )
    if dist.get_rank() == 0:
        Path(options.out).write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort in an orderly exit


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=4, help="of each host")
    parser.add_argument("--rate", help="of each link, such as 200mbit; default: no limit")
    parser.add_argument("--parameters", type=float, default=10e6)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["DDP", "FSDP2", "ZeRO 2"])
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        rank(options)
        return 0
    if options.smoke:
        options.ranks, options.parameters, options.layers, options.rounds, options.steps = (
            1,
            2e4,
            2,
            1,
            1,
        )
    spec = importlib.util.spec_from_file_location("cluster_in_a_box", BOX)
    assert spec is not None
    assert spec.loader is not None
    box = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(box)
    size = options.hosts * options.ranks
    flags = ["--batch", "--parameters", "--layers", "--rounds", "--steps"]
    given = [word for flag in flags for word in (flag, str(getattr(options, flag[2:])))]
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            box.Cluster(options.hosts, rate=options.rate) as cluster,
        ):
            out = Path(folder, "rows.json")
            command = [
                sys.executable,
                __file__,
                *given,
                "--out",
                str(out),
                "--kinds",
                *options.kinds,
            ]
            processes = []
            for number in range(size):
                variables = {
                    "RANK": number,
                    "WORLD_SIZE": size,
                    "LOCAL_RANK": number % options.ranks,
                }
                environment = {name: str(value) for name, value in variables.items()}
                environment.update(MASTER_PORT="29500", LOCAL_WORLD_SIZE=str(options.ranks))
                processes.append(
                    cluster.start(
                        number // options.ranks,
                        command,
                        environment=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL if number else None,
                    )
                )
            failed = [process.wait() for process in processes]
            if any(failed):
                print(f"ranks ended with {failed}", file=sys.stderr)
                return 1
            rows = json.loads(out.read_text())
    except box.Unavailable as error:
        print(error)
        return 0
    links = options.rate or "no limit"
    print(
        f"{options.hosts} hosts of {options.ranks} ranks, {options.parameters / 1e6:g} M "
        f"parameters, links of {links}, torch {torch.__version__}\n"
    )
    print("| | variant | MB out of a host | to plain | ms per step | ratio |")
    print("|---|---|---|---|---|---|")
    plain = {kind: count for kind, name, _, _, count in rows if name == "plain"}
    for kind, name, seconds, ratio, count in rows:
        moved = f"{count / 1e6:.2f} | {count / plain[kind]:.3f}"
        print(f"| {kind} | {name} | {moved} | {1e3 * seconds:.0f} | {ratio:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
