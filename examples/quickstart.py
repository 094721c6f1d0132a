"""Watch four workers, then compare rules, on scikit-learn's digits: DDP on the CPU, little data.

    bash examples/quickstart.sh                 # sets up what it needs, runs 4 workers
    torchrun --nproc_per_node=4 examples/quickstart.py --seeds 10

First plain training is watched, while one worker's labels are wrong: the report finds it. Then the
plain mean is compared with GRAIN. Both see the same splits, batches and initial weights. Each has
the learning rate from the same list (then decayed linearly to zero) that did best for it on
validation images, on ten seeds that are not used for the result; `--tune` repeats that choice.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import grain_ddp
from grain_ddp import GrainState, grain_hook

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAIN, VALIDATION, BATCH = 400, 300, 4  # images; BATCH is per worker and step
TUNING_SEEDS = 10
RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
NOISE = {"clean labels": 0.0, "30 % wrong labels": 0.3}
METHODS = {"mean": "mean", "GRAIN": "min_norm"}  # name here: the weighting it stands for
CHOSEN = 0.8  # what --tune finds for every kind of labels and method, with 300 steps
ADVICE = (
    "Wrong labels or a broken worker are where it can help; where workers' data differ it harms.\n"
    "When, with which rule and which cap: docs/does-it-help.md"
)
COLORS = {"mean": "tab:gray", "GRAIN": "tab:blue"}


@dataclass
class Run:
    """One training run. Curves have one entry per evaluation, traces one per step."""

    validation: float
    curve: list[float]  # accuracy on the test images
    conflicts: list[float]  # share of workers whose gradient opposes the step that was taken
    weights: np.ndarray  # [steps, workers], each step sorted from the largest down
    seconds: list[float]  # per step


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def load(seed: int, noise: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A random split of the digits; a share `noise` of the training labels is replaced."""
    x, y = digits()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draw)
    parts = dict(
        zip(
            ("train", "validation", "test"),
            order.tensor_split([TRAIN, TRAIN + VALIDATION]),
            strict=True,
        )
    )
    data = {name: (x[part], y[part].clone()) for name, part in parts.items()}
    wrong = int(noise * TRAIN)
    shift = torch.randint(1, 10, (wrong,), generator=draw)  # 1 to 9: never the right label
    data["train"][1][:wrong] = (data["train"][1][:wrong] + shift) % 10
    return data


def accuracy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def train(
    seed: int, noise: float, weighting: str | None, rate: float, steps: int, every: int
) -> Run:
    """Train on all ranks. `weighting` None is plain DDP, without our hook, to compare the time."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    data = load(seed, noise)
    x, y = data["train"]
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    model = DistributedDataParallel(net)
    if weighting is not None:
        state = GrainState(weighting=weighting)  # GRAIN itself needs no option: GrainState()
        model.register_comm_hook(state, grain_hook)

    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    batches = torch.randint(
        TRAIN, (steps, workers, BATCH), generator=torch.Generator().manual_seed(seed)
    )
    run = Run(0.0, [], [], np.zeros((steps, workers)), [])
    for step in range(steps):
        mine = batches[step, rank]
        start = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()
        decay.step()
        run.seconds.append(time.perf_counter() - start)
        if weighting is not None and rank == 0:
            run.conflicts.append(state.last.conflicts_aggregate / workers)
            run.weights[step] = np.sort(state.last.weights)[::-1]
        if rank == 0 and (step + 1) % every == 0:
            run.curve.append(accuracy(net, data["test"]))
    run.validation = accuracy(net, data["validation"])
    return run


def watch(log: Path, steps: int, broken: int = 2) -> str:
    """Train with the plain mean, where one worker has wrong labels, and report on the records."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        log.unlink(missing_ok=True)
    x, y = load(0, 0.0)["train"]
    if rank == broken % workers:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    state = GrainState(weighting="mean", on_step=grain_ddp.sinks.jsonl(log))
    model.register_comm_hook(state, grain_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    batches = torch.randint(TRAIN, (steps, workers, BATCH), generator=torch.Generator())
    for step in range(steps):
        mine = batches[step, rank]
        optimizer.zero_grad()
        cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()
    if rank != 0:
        return ""
    command = [sys.executable, "-m", "grain_ddp", "report", str(log), "--batch", str(BATCH)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Progress:
    """One line on rank 0, rewritten in place; where there is no terminal, ten plain lines."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.perf_counter()
        self.tty = sys.stdout.isatty()

    def __call__(self, what: str) -> None:
        if dist.get_rank() == 0 and (self.tty or self.done % max(self.total // 10, 1) == 0):
            spent = time.perf_counter() - self.start
            line = f"run {self.done + 1} of {self.total}, {spent:.0f} s: {what}"
            print(f"\r\033[K{line}" if self.tty else line, end="" if self.tty else "\n", flush=True)
        self.done += 1

    def close(self) -> None:
        if dist.get_rank() == 0:
            print("\r\033[K" if self.tty else "", flush=True)


def tune(steps: int, progress: Progress) -> dict[tuple[str, str], float]:
    """For each kind of labels and method the rate with the best validation accuracy."""
    chosen = {}
    for labels, method in product(NOISE, METHODS):
        validation = []
        for rate in RATES:
            progress(f"{labels}, {method}: trying the learning rate {rate}")
            runs = [
                train(1000 + seed, NOISE[labels], METHODS[method], rate, steps, steps)
                for seed in range(TUNING_SEEDS)
            ]
            validation.append(np.mean([run.validation for run in runs]))
        chosen[labels, method] = RATES[int(np.argmax(validation))]
    # Replicas are equal, so ranks agree; were they not, rank 0 decides.
    shared = [chosen]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def difference(results: dict[tuple[str, str], list[Run]], labels: str) -> np.ndarray:
    """GRAIN minus mean, final test accuracy in percentage points, one entry per seed."""
    final = {m: np.array([run.curve[-1] for run in results[labels, m]]) for m in METHODS}
    return 100 * (final["GRAIN"] - final["mean"])


def spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def plus_minus(values: np.ndarray) -> str:
    """Mean ± standard error."""
    text = f"{values.mean():+.1f} ± {spread(values) / len(values) ** 0.5:.1f} points"
    return text.replace("-", "−")


def conclude(results: dict[tuple[str, str], list[Run]]) -> str:
    """One sentence on what this run showed, at two standard errors."""
    verdicts = []
    for labels in NOISE:
        gain = difference(results, labels)
        bound = 2 * spread(gain) / len(gain) ** 0.5
        if len(gain) < 5:
            verdict = "cannot be judged from so few seeds"
        elif abs(gain.mean()) <= bound:
            verdict = "made no clear difference"
        else:
            verdict = "helped" if gain.mean() > 0 else "cost accuracy"
        verdicts.append(f"{verdict} with {labels} ({plus_minus(gain)})")
    return f"In this run GRAIN {' and '.join(verdicts)}."


def table(
    results: dict[tuple[str, str], list[Run]],
    rates: dict[tuple[str, str], float],
    plain: list[float],
) -> str:
    rows = [
        f"{'labels':18} {'method':7} {'rate':>5} {'test accuracy':>16} {'opposed':>9} {'step':>9}"
    ]
    for labels in NOISE:
        for method in METHODS:
            runs = results[labels, method]
            final = 100 * np.array([run.curve[-1] for run in runs])
            opposed = 100 * np.mean([run.conflicts for run in runs])
            step = 1000 * np.median([run.seconds for run in runs])
            rows.append(
                f"{labels:18} {method:7} {rates[labels, method]:5} "
                f"{final.mean():8.1f} ± {spread(final):.1f} % {opposed:7.1f} % {step:6.2f} ms"
            )
        gain = difference(results, labels)
        rows.append(
            f"{'':18} GRAIN − mean, same seed: {plus_minus(gain)} (standard error), "
            f"better on {(gain > 0).sum()} of {len(gain)} seeds, worse on {(gain < 0).sum()}"
        )
    rows += [
        f"{'(plain DDP, no hook)':59}{1000 * np.median(plain):6.2f} ms",
        "",
        "test accuracy: mean ± standard deviation over seeds.  opposed: how often the step pointed",
        "against a worker's own gradient.  step: median; this network is so small that it is all",
        "latency, so it says little about yours.  mean: plain averaging through the same hook.",
    ]
    return "\n".join(rows)


def smooth(trace: np.ndarray, width: int) -> np.ndarray:
    """Moving average along the first axis; entry 0 covers the first `width` steps."""
    total = np.cumsum(np.concatenate([np.zeros_like(trace[:1]), trace]), axis=0)
    return (total[width:] - total[:-width]) / width


def draw(
    results: dict[tuple[str, str], list[Run]],
    rates: dict[tuple[str, str], float],
    every: int,
    steps: int,
    title: str,
    out: str,
) -> None:
    """One column per kind of labels: accuracy, conflict, and GRAIN's weights over the steps."""
    figure, axes = plt.subplots(3, 2, figsize=(10, 9), sharex=True, sharey="row")
    width = max(steps // 15, 1)
    at_evaluation = np.arange(every, steps + 1, every)
    at_step = np.arange(width, steps + 1)
    for column, labels in zip(axes.T, NOISE, strict=True):
        top, middle, bottom = column
        for method in METHODS:
            curves = 100 * np.array([run.curve for run in results[labels, method]])
            center, band = curves.mean(0), curves.std(0)
            name = f"{method} (learning rate {rates[labels, method]})"
            top.plot(at_evaluation, center, color=COLORS[method], label=name)
            top.fill_between(
                at_evaluation, center - band, center + band, color=COLORS[method], alpha=0.2, lw=0
            )
            trace = 100 * np.mean([run.conflicts for run in results[labels, method]], axis=0)
            middle.plot(at_step, smooth(trace, width), color=COLORS[method], label=method)
        top.set_title(f"{labels}\nGRAIN − mean: {plus_minus(difference(results, labels))}")

        weights = smooth(np.mean([run.weights for run in results[labels, "GRAIN"]], axis=0), width)
        workers = weights.shape[1]
        shades = plt.get_cmap("Blues")(np.linspace(0.75, 0.2, workers))
        names = ["largest weight of a step", *(f"number {i + 1}" for i in range(1, workers))]
        bottom.stackplot(at_step, 100 * weights.T, colors=shades, labels=names)
        for i in range(1, workers):
            bottom.axhline(100 * i / workers, color="black", lw=0.8, ls=":")
        top.legend(loc="lower right")
        bottom.set(xlabel="step", xlim=(width, steps), ylim=(0, 100))
    axes[0, 0].set_ylabel("accuracy on test images, %\n(band: ± 1 sd over seeds)")
    axes[1, 0].set_ylabel("workers that the step\ngoes against, %")
    axes[2, 0].set_ylabel("GRAIN's weights, stacked, %\n(dotted: the mean's equal shares)")
    axes[1, 1].legend(loc="upper right")
    axes[2, 1].legend(loc="lower right", framealpha=0.9, fontsize="small")
    axes[1, 0].set_ylim(bottom=-1)
    for axis in axes[:2].flat:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="runs per method and kind of labels")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps per run")
    parser.add_argument("--tune", action="store_true", help="choose the learning rates anew")
    parser.add_argument("--out", default="quickstart.png", help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a short smoke run: 2 seeds, 40 steps")
    options = parser.parse_args()
    seeds, steps = (2, 40) if options.quick else (options.seeds, options.steps)
    if seeds < 1 or steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    every = max(steps // 20, 1)

    dist.init_process_group("gloo")
    out = Path(options.out)
    report = watch(out.with_name(f"{out.stem}-watched.jsonl"), 300)
    if report:
        print(f"First, plain training is watched. The labels of worker 2 are wrong.\n\n{report}")
        print("Now the mean and GRAIN are compared, with all labels right, and with some wrong.\n")
    cells = list(product(NOISE, METHODS))
    progress = Progress(len(cells) * (seeds + (len(RATES) if options.tune else 0)))
    rates = tune(steps, progress) if options.tune else dict.fromkeys(cells, CHOSEN)
    plain = []  # seconds per step of DDP without a hook, measured in between
    results = {cell: [] for cell in cells}
    for seed in range(seeds):
        for labels, method in cells:
            progress(f"seed {seed + 1} of {seeds}, {labels}, {method}")
            run = train(seed, NOISE[labels], METHODS[method], rates[labels, method], steps, every)
            results[labels, method].append(run)
        plain += train(seed, 0.0, None, RATES[0], max(steps // 5, 1), steps).seconds
    progress.close()

    if dist.get_rank() == 0:
        workers = dist.get_world_size()
        title = (
            f"scikit-learn digits: {TRAIN} training images, {workers} workers × {BATCH} images "
            f"per step, {seeds} seeds"
        )
        print(f"{title}\n")
        print(table(results, rates, plain))
        draw(results, rates, every, steps, title, options.out)
        print(f"\n{conclude(results)}\n{ADVICE}\nPicture: {options.out}")
    # Nobody leaves early: at exit gloo's threads must be done with plain DDP's last all-reduce.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
