"""What the guard finds, and what it takes for a fault: faults planted in simulated workers.

    python examples/faulty/evidence.py           # about half an hour on two cores
    python examples/faulty/evidence.py --quick

Every fault is tried beside a sound run: the faulty gradient takes the place of one worker's, the
detectors look, and the run goes on without it. Against the guard stand what others use: the norm of
the mean gradient (its z score), and a tensor's largest entry over its worker's own past.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from inject import PLACES, Flip, gradients
from tasks import TASKS, Task, characters
from torch import Tensor

from grain_ddp._core.digest import numbers
from grain_ddp._math.suspicion import History

FIRST = 150
"""Faults are planted from this step on."""

BINS = ((0.01, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 1.0), (1.0, math.inf))


@dataclass
class Fault:
    """How far it moved the update, in units of that, and who found it; the guard's worker right?"""

    moved: float
    place: str
    guard: bool
    right: bool
    norm: float  # z score
    past: float  # factor of a largest entry over its own past


@dataclass
class Trial:
    """A run with its faults, and what the detectors said of its sound steps."""

    faults: list[Fault] = field(default_factory=list)
    steps: int = 0
    alarms: int = 0  # of the guard
    past: int = 0  # sound steps with a largest entry over 10 x its own past
    norm: list[float] = field(default_factory=list)  # the z score of each sound step


class Past:
    """Mean and deviation of logarithms over the last 60 or so steps."""

    def __init__(self) -> None:
        self.mean, self.square, self.steps = np.zeros(()), np.ones(()), 0

    def apart(self, value: np.ndarray) -> np.ndarray:
        """How far it is from the mean."""
        return np.nan_to_num(value - self.mean, nan=0, posinf=600)

    def learn(self, value: np.ndarray) -> None:
        self.steps += 1
        rate, apart = max(1 / self.steps, 1 / 60), self.apart(value)
        self.mean = self.mean + rate * apart
        self.square = self.square * (1 - rate) + rate * apart**2


def rows_of(every: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Peaks and norms of every worker, ``[workers, 2, tensors]``."""
    return np.stack([numbers(one).numpy() for one in every])


def length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def logs(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.minimum(values, 1e300))


def trial(task: Task, workers: int, steps: int, per_step: int, seed: int) -> Trial:
    """A run of so many steps, with so many faults tried beside each."""
    rng = np.random.default_rng(seed)
    history: History | None = None
    found, norm, past = Trial(), Past(), Past()
    for step in range(steps):
        every = [task.gradients(task.batch(step, worker)) for worker in range(workers)]
        rows = rows_of(every)
        mean = [torch.stack(ones).mean(0) for ones in zip(*every, strict=True)]
        size = length(mean)
        history = history or History(workers, rows.shape[2])
        for _ in range(per_step if step >= FIRST else 0):
            worker = int(rng.integers(workers))
            place = PLACES[int(rng.choice(3, p=(0.6, 0.25, 0.15)))]
            flip = Flip(place, rng.random(), rng.random(), int(rng.integers(20, 32)))
            wrong = gradients(task, task.batch(step, worker), flip)
            change = [(a - b) / workers for a, b in zip(wrong, every[worker], strict=True)]
            moved = length(change) / size
            if moved < BINS[0][0]:
                continue
            spoiled = rows.copy()
            spoiled[worker] = rows_of([wrong])[0]
            said = copy.deepcopy(history).look(spoiled[:, 0], spoiled[:, 1])
            best = max(said, key=lambda one: one.score, default=None)
            whole = length([a + b for a, b in zip(mean, change, strict=True)])
            spoiled_past = past.apart(logs(spoiled[:, 0]))[worker].max()
            found.faults.append(
                Fault(
                    moved if math.isfinite(moved) else math.inf,
                    place,
                    bool(said),
                    best is not None and best.row == worker,
                    float(norm.apart(logs(np.array(whole))) / np.sqrt(norm.square)),
                    float(np.exp(min(spoiled_past, 600))),
                )
            )
        found.alarms += len(history.look(rows[:, 0], rows[:, 1]))
        if step >= FIRST:
            found.norm.append(float(norm.apart(logs(np.array(size))) / np.sqrt(norm.square)))
            found.past += bool(past.apart(logs(rows[:, 0])).max() > math.log(10))
        norm.learn(logs(np.array(size)))
        past.learn(logs(rows[:, 0]))
        found.steps += 1
        task.update(step, mean)
    return found


def table(found: Trial) -> Iterator[str]:
    """Found, in percent, by how far the update was moved."""
    # As many false alarms as the guard is allowed, if the z score's tail is normal; else what this
    # run shows: the norm is not held to a bar that its sound steps do not pass.
    norm = max(*found.norm, 3.7)
    for low, high in BINS:
        some = [one for one in found.faults if low <= one.moved < high]
        if some:
            shares = [
                sum(said) / len(some)
                for said in (
                    [one.guard for one in some],
                    [one.norm > norm for one in some],
                    [one.past > 10 for one in some],
                    [one.past > 100 for one in some],
                )
            ]
            upper = "and more" if high == math.inf else f"to {high}"
            yield (
                f"| {low} {upper} | {len(some)} | "
                + " | ".join(f"{100 * share:.0f}" for share in shares)
                + " |"
            )


def persistent(task: Task, workers: int, factor: float, part: str, steps: int) -> int | None:
    """After how many steps a worker is named whose gradient is off by a factor from FIRST on."""
    history: History | None = None
    for step in range(FIRST + steps):
        every = [task.gradients(task.batch(step, worker)) for worker in range(workers)]
        if step >= FIRST:
            for k, gradient in enumerate(every[1]):
                if part == "all" or k == len(every[1]) // 2:
                    gradient.mul_(factor)
        rows = rows_of(every)
        history = history or History(workers, rows.shape[2])
        if any(one.row == 1 for one in history.look(rows[:, 0], rows[:, 1])) and step >= FIRST:
            return step - FIRST + 1
        task.update(step, [torch.stack(ones).mean(0) for ones in zip(*every, strict=True)])
    return None


def tell(name: str, found: Trial) -> None:
    right = [one.right for one in found.faults if one.guard]
    print(f"\n{name}, {found.steps} sound steps: {found.alarms} false alarms", end="")
    print(f" (10 x own past: {found.past}), the right worker in {sum(right)} of {len(right)}")
    print("\n".join(table(found)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--workers", type=int, nargs="*", default=[4, 8, 32])
    options = parser.parse_args()
    quick, workers = options.quick, options.workers
    torch.set_num_threads(1)
    print("Transient: | moved by | faults | guard | norm's z | 10 x own past | 100 x own past |")
    for n in workers:
        steps = FIRST + (10 if quick else 4800 // max(n, 8))
        found = trial(characters(0), n, steps, 6, seed=n)
        tell(f"characters, {n} workers", found)
    print("\nFive tasks, 4 workers")
    total = alarms = 0
    for name, make in TASKS.items():
        steps = FIRST + (10 if quick else 3850)
        found = trial(make(1), 4, steps, 0 if quick else 1, seed=1)
        total, alarms = total + found.steps, alarms + found.alarms
        tell(name, found)
    print(f"\nin all {alarms} in {total}")
    print("\nPersistent, 8 workers: named after so many steps")
    for factor, part in ((1.01, "one"), (1.05, "one"), (1.05, "all"), (1.2, "all")):
        named = persistent(characters(0), 8, factor, part, 20 if quick else 500)
        print(f"{part} tensors x {factor}: {named}", flush=True)


if __name__ == "__main__":
    main()
