"""Does it help? Many small trainings with n simulated workers, for `protocol.md` beside this file.

    python examples/study/study.py      # goes on where it stopped; about two hours on one core
    python examples/study/analyse.py    # tables and pictures from results/

All runs of a cell (seeds × learning rates) are trained at once, as one batch of small matrices; the
gradients of the workers, their Gramian and the weights are those of data-parallel training.
Each line of results/*.jsonl is one cell: a task, a setting, an optimizer and a method.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tasks import Split, split
from torch import Tensor

from grain_ddp import min_norm
from grain_ddp._math.rules import krum, normalized_min_norm, upgrad

HERE = Path(__file__).parent
STEPS, EVERY, HIDDEN = 200, 25, 32
TUNING = [(1000 + i, 0) for i in range(6)]  # (split, seed): for the learning rate only
FINAL = [(i, j) for i in range(20) for j in range(2)]
ONE_SPLIT = [(500, j) for j in range(60)]  # for the variance between seeds
RATES = {"sgd": [0.05 * 2**i for i in range(7)], "adamw": [0.0005 * 2**i for i in range(7)]}


@dataclass(frozen=True)
class Cell:
    """One comparison's coordinates: what is trained, and how its gradients are aggregated."""

    task: str
    setting: str
    workers: int
    batch: int
    optimizer: str
    method: str


# --- weights from Gramians [n, n], one for each run -------------------------------------------

Rule = Callable[[np.ndarray], np.ndarray]


def inverse_norm(gramian: np.ndarray) -> np.ndarray:
    weights = gramian.diagonal().min() / gramian.diagonal()
    return weights / weights.sum()


def clip_workers(gramian: np.ndarray) -> np.ndarray:
    """The mean, after no worker's gradient is longer than the median one."""
    norms = np.sqrt(gramian.diagonal())
    return np.minimum(1.0, np.median(norms) / norms) / len(norms)


RULES: dict[str, Rule] = {
    "min_norm": lambda G: min_norm(G).weights,
    "cap 1.5": lambda G: min_norm(G, cap=1.5).weights,
    "cap 2": lambda G: min_norm(G, cap=2).weights,
    "cap 4": lambda G: min_norm(G, cap=4).weights,
    "normalize": lambda G: normalized_min_norm(G)[0],
    "normalize, cap 1.5": lambda G: normalized_min_norm(G, 1.5)[0],
    "inverse_norm": inverse_norm,
    "upgrad": upgrad,
    "krum": krum,
    "multi-krum": lambda G: krum(G, selected=len(G) - 1),
    "cap 2, robust loss": lambda G: min_norm(G, cap=2).weights,
    "clip workers": clip_workers,
}
LOSSES = {
    "robust loss": "robust",
    "label smoothing": "smooth",
    "cap 2, robust loss": "robust",
}
LATER = ["multi-krum", "cap 2, robust loss"]  # exploratory: see protocol.md
METHODS = ["mean", *RULES, "gate", "clip global", "robust loss", "label smoothing"]
METHODS = [method for method in METHODS if method not in LATER]
FEWER = ["mean", "min_norm", "cap 1.5", "cap 2", "normalize", "inverse_norm", "upgrad"]
FEWER += ["krum", "robust loss"]


class Gate:
    """min-norm while the mean is further from it than sampling noise explains, else the mean.

    For each run D = ‖mean − min-norm point‖² and V = (Σ‖g_i‖²/n − ‖mean‖²)/(n − 1), the variance of
    the mean under sampling noise. Over the last 20 steps D/V − 1 must exceed z standard errors.
    """

    def __init__(self, z: float = 2.0) -> None:
        self.z, self.past = z, [[] for _ in range(10_000)]

    def __call__(self, gramian: np.ndarray, run: int) -> np.ndarray:
        n = len(gramian)
        mean, least = np.full(n, 1 / n), min_norm(gramian).weights
        away, square = mean - least, mean @ gramian @ mean
        noise = (gramian.trace() / n - square) / (n - 1)
        past = self.past[run]
        past.append(float(away @ gramian @ away) / max(noise, 1e-300))
        recent = np.array(past[-20:])
        error = recent.std(ddof=1) / math.sqrt(len(recent)) if len(recent) > 1 else np.inf
        return least if recent.mean() - 1 > self.z * error else mean


def weights_of(method: str, gramians: np.ndarray, gate: Gate) -> np.ndarray:
    """Weights ``[runs, n]``. Zero gradients are absent; where one is not finite, it is the mean."""
    runs, n = gramians.shape[:2]
    found = np.full((runs, n), 1 / n)
    if method not in RULES and method != "gate":
        return found
    for run, gramian in enumerate(gramians):
        active = gramian.diagonal() > 1e-30
        if not np.isfinite(gramian).all() or active.sum() < (4 if "krum" in method else 1):
            continue
        rule = partial(gate, run=run) if method == "gate" else RULES[method]
        found[run] = 0
        found[run, active] = rule(gramian[np.ix_(active, active)])
    return found


# --- a network of one hidden layer, for all runs at once --------------------------------------


class Network:
    """Parameters ``[runs, d]`` of networks D → 32 → C, and gradients without autograd."""

    def __init__(self, seeds: Sequence[tuple[int, int]], inputs: int, outputs: int) -> None:
        self.shapes = [(inputs, HIDDEN), (1, HIDDEN), (HIDDEN, outputs), (1, outputs)]
        rows = []
        for a, b in seeds:
            generator = torch.Generator().manual_seed(1_000_003 * a + b)
            parts = []
            for rows_in, columns in self.shapes:
                scale = 0.0 if rows_in == 1 else math.sqrt(2 / rows_in)
                parts.append(torch.randn(rows_in * columns, generator=generator) * scale)
            rows.append(torch.cat(parts))
        self.flat = torch.stack(rows)

    def parts(self) -> list[Tensor]:
        sizes = [a * b for a, b in self.shapes]
        pieces = self.flat.split(sizes, 1)
        return [p.view(-1, *shape) for p, shape in zip(pieces, self.shapes, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.parts()
        return (x @ w1 + b1).relu() @ w2 + b2

    def gradients(self, x: Tensor, y: Tensor, loss: str) -> Tensor:
        """Each worker's mean gradient ``[runs, n, d]`` of batches ``[runs, n, b, D]``."""
        runs, n, b, _ = x.shape
        w1, b1, w2, b2 = self.parts()
        hidden = (x.flatten(1, 2) @ w1 + b1).relu()
        delta = slope(hidden @ w2 + b2, y.flatten(1), loss) / b
        back = (delta @ w2.transpose(1, 2)) * (hidden > 0)

        def per_worker(t: Tensor) -> Tensor:
            return t.reshape(runs * n, b, -1)

        x, hidden, delta, back = map(per_worker, (x, hidden, delta, back))
        grads = [x.transpose(1, 2) @ back, back.sum(1), hidden.transpose(1, 2) @ delta]
        grads.append(delta.sum(1))
        return torch.cat([g.flatten(1) for g in grads], 1).view(runs, n, -1)


def slope(out: Tensor, y: Tensor, loss: str) -> Tensor:
    """The derivative of each sample's loss by the network's output."""
    if y.dtype != torch.int64:
        error = out - y[..., None]
        return error.clamp(-0.5, 0.5) if loss == "robust" else error  # robust: Huber
    p = out.softmax(-1)
    target = torch.nn.functional.one_hot(y, out.shape[-1])
    if loss == "smooth":
        target = 0.9 * target + 0.1 / out.shape[-1]
    delta = p - target
    if loss == "robust":  # generalised cross entropy, q = 0.7 (Zhang and Sabuncu 2018)
        delta = delta * (p * target).sum(-1, keepdim=True) ** 0.7
    return delta


# --- training and testing ---------------------------------------------------------------------


def train(
    cell: Cell,
    seeds: Sequence[tuple[int, int]],
    rates: Sequence[float],
    watch: Callable[[np.ndarray], object] = lambda gramians: None,
) -> dict[str, Any]:
    """Train all (seed, rate) pairs given as two lists of one length; scores ``[runs]`` by name.

    `watch` is called with each step's Gramians ``[runs, n, n]``.
    """
    splits = {s: split(cell.task, cell.setting, s, cell.workers) for s, _ in seeds}
    data = [splits[s] for s, _ in seeds]
    x, y = torch.stack([d.x for d in data]), torch.stack([d.y for d in data])
    outputs = 1 if y.dtype != torch.int64 else int(y.max()) + 1
    network = Network(seeds, x.shape[-1], outputs)
    runs, n = len(seeds), cell.workers
    batches = torch.stack([draw(d, s, cell) for d, s in zip(data, seeds, strict=True)], 1)
    rate = torch.tensor(rates)[:, None]
    first, second = torch.zeros_like(network.flat), torch.zeros_like(network.flat)
    run = torch.arange(runs)[:, None]
    gate, lengths = Gate(), []
    seen: dict[str, list[np.ndarray]] = {"conflict": [], "shorter": [], "largest": []}
    curve = []
    for step in range(STEPS):
        index = batches[step].flatten(1)
        xs = x[run, index].view(runs, n, cell.batch, -1)
        ys = y[run, index].view(runs, n, cell.batch)
        J = network.gradients(xs, ys, LOSSES.get(cell.method, "plain"))
        if cell.setting == "flipped worker":
            J[:, 0] *= -1
        wide = J.double()
        G = (wide @ wide.transpose(1, 2)).numpy()
        watch(G)
        w = weights_of(cell.method, G, gate)
        with np.errstate(all="ignore"):
            uniform = np.full(n, 1 / n)
            seen["conflict"].append((G @ uniform).min(1) < 0)
            length = np.sqrt(np.einsum("ri,rij,rj->r", w, G, w).clip(0))
            seen["shorter"].append(length / np.sqrt((uniform @ G @ uniform).clip(1e-300)))
            seen["largest"].append(w.max(1))
            if cell.method == "clip global":
                lengths.append(length)
                w *= np.minimum(1, np.median(lengths[-50:], axis=0) / length.clip(1e-300))[:, None]
        d = (torch.from_numpy(w).float()[:, None] @ J)[:, 0]
        now = rate * (1 - step / STEPS)
        if cell.optimizer == "sgd":
            network.flat -= now * d
        else:
            first.lerp_(d, 0.1)
            second.lerp_(d * d, 0.001)
            unbiased = first / (1 - 0.9 ** (step + 1))
            root = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            network.flat -= now * (unbiased / root + 0.01 * network.flat)
        if (step + 1) % EVERY == 0:
            curve.append(score(network, data, x, y))
    validation, test, worst = (np.stack([c[i] for c in curve]) for i in range(3))
    best = validation.argmax(0), np.arange(runs)
    means = {name: float(np.nanmean(values)) for name, values in seen.items()}
    scores = {"validation": validation[-1], "test": test[-1], "worst": worst[-1]}
    return {**scores, "early": test[best], "seen": means}


def draw(data: Split, seed: tuple[int, int], cell: Cell) -> Tensor:
    """The rows of every step's batches ``[steps, n, b]``, each worker's from its shard."""
    generator = torch.Generator().manual_seed(7_000_003 * seed[0] + 2 * seed[1] + 1)
    n, m = data.shards.shape
    picks = torch.rand(STEPS, n, m, generator=generator).argsort(2)[:, :, : cell.batch]
    return data.shards.expand(STEPS, n, m).gather(2, picks)


def score(
    network: Network, data: list[Split], x: Tensor, y: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validation and test accuracy (R² of a regression), and that of the worst class or domain."""
    found = []
    run = torch.arange(len(data))[:, None]
    for part in ("validation", "test"):
        rows = torch.stack([getattr(d, part) for d in data])
        out, truth = network(x[run, rows]), y[run, rows]
        if truth.dtype != torch.int64:
            error = ((out[..., 0] - truth) ** 2).mean(1) / truth.var(1, correction=0)
            r2 = (1 - error).nan_to_num(-1).clamp(-1, 1).numpy()
            found.append((r2, r2))
            continue
        right = (out.argmax(-1) == truth).float()
        groups = torch.nn.functional.one_hot(truth).float()
        other = torch.stack([d.other_domain for d in data])[run, rows].float()
        if other.any():
            groups = torch.stack([other, 1 - other], -1)
        shares = (right[..., None] * groups).sum(1) / groups.sum(1)
        found.append((right.mean(1).numpy(), shares.min(1).values.numpy()))
    return found[0][0], found[1][0], found[1][1]


def tune(cell: Cell) -> dict[float, float]:
    """Validation score by rate: factors of 2, more where the best is at an edge, then √2."""
    scores: dict[float, float] = {}
    new, finer = RATES[cell.optimizer], False
    while True:
        pairs = [(s, r) for r in new for s in TUNING]
        found = train(cell, [s for s, _ in pairs], [r for _, r in pairs])["validation"]
        for r, value in zip(new, found.reshape(len(new), -1).mean(1), strict=True):
            scores[r] = round(float(value), 4)
        best = max(scores, key=lambda r: (scores[r], -r))
        if finer or len(scores) > 14:
            return scores
        if best == max(scores):
            new = [best * 2, best * 4]
        elif best == min(scores):
            new = [best / 2, best / 4]
        else:
            new, finer = [best / 2**0.5, best * 2**0.5], True


def cells() -> Iterator[Cell]:
    """The grid, the most telling parts first."""
    whole = ["clean", "wrong labels", "by class", "minority domain", "long-tailed"]
    whole += ["bad worker", "flipped worker"]
    for task, settings, n, b, optimizer, methods in (
        ("digits", whole, 8, 4, "sgd", METHODS),
        ("diabetes", ["clean", "heavy tails"], 8, 4, "sgd", METHODS),
        ("minilm", ["clean", "wrong labels", "by class", "bad worker"], 8, 4, "adamw", FEWER),
        ("digits", whole, 8, 4, "adamw", FEWER),
        ("digits", whole, 4, 4, "sgd", FEWER),
        ("digits", ["clean", "wrong labels", "by class", "bad worker"], 8, 16, "sgd", FEWER),
        ("diabetes", ["clean", "heavy tails"], 4, 4, "sgd", FEWER),
        ("minilm", ["clean", "wrong labels"], 4, 16, "adamw", FEWER),
        ("digits", whole, 8, 4, "sgd", LATER),
        ("diabetes", ["clean", "heavy tails"], 8, 4, "sgd", ["multi-krum"]),
        ("minilm", ["clean", "wrong labels", "by class", "bad worker"], 8, 4, "adamw", LATER),
    ):
        for setting in settings:
            for method in methods:
                if task == "diabetes" and method == "label smoothing":
                    continue
                yield Cell(task, setting, n, b, optimizer, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", default="", help="cells whose coordinates contain this text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.results.mkdir(exist_ok=True)
    done = set()
    for path in arguments.results.glob("*.jsonl"):
        done |= {Cell(**json.loads(line)["cell"]) for line in path.read_text().splitlines()}
    todo = [c for c in cells() if c not in done and arguments.only in str(c)]
    begun = time.monotonic()
    for i, cell in enumerate(todo):
        start = time.monotonic()
        scores = tune(cell)
        rate = max(scores, key=lambda r: (scores[r], -r))
        final = train(cell, FINAL, [rate] * len(FINAL))
        line = {"cell": asdict(cell), "rate": rate, "tuning": scores}
        if (cell.workers, cell.batch) == (8, 4) and cell.method in FEWER:
            spread = train(cell, ONE_SPLIT, [rate] * len(ONE_SPLIT))["test"]
            line["one split"] = rounded(spread)
        line |= {name: rounded(final[name]) for name in ("test", "worst", "early")}
        line["seen"] = {name: round(value, 4) for name, value in final["seen"].items()}
        line["seconds"] = round(time.monotonic() - start, 1)
        with open(arguments.results / f"{cell.task}.jsonl", "a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        left = (time.monotonic() - begun) / (i + 1) * (len(todo) - i - 1) / 60
        words = f"{cell.task}, {cell.setting}, n={cell.workers} b={cell.batch} {cell.optimizer}"
        print(
            f"{i + 1}/{len(todo)} {words}: {cell.method} {final['test'].mean():.4f}"
            f" (rate {rate:g}, {line['seconds']} s; about {left:.0f} min left)",
            flush=True,
        )


def rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in values]


if __name__ == "__main__":
    main()
