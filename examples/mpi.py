"""Digits by logistic regression in numpy, over MPI: first with the ranks' mean, then with GRAIN.

bash launch/mpiexec.sh python examples/mpi.py       # 4 ranks; PER_HOST=2: 2 ranks
mpiexec -n 4 python examples/mpi.py --steps 300
"""

from __future__ import annotations

import argparse

import numpy as np
from mpi4py import MPI
from sklearn.datasets import load_digits

from grain_ddp import GrainState
from grain_ddp.mpi import reduce_gradient

TRAIN, BATCH = 1000, 16  # images; BATCH is per rank and step


def slope(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the mean cross-entropy of a batch, at theta [pixels + 1, digits]."""
    scores = x @ theta
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return x.T @ p / len(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.5)
    options = parser.parse_args()
    comm = MPI.COMM_WORLD

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = np.c_[images / 16, np.ones(len(images))].astype(np.float32)[order]
    y = labels[order]

    for weighting in ("mean", "min_norm"):
        state = GrainState(weighting=weighting)
        draw = np.random.default_rng(comm.rank)  # each rank has batches of its own
        theta = np.zeros((x.shape[1], 10), np.float32)
        opposed = 0
        for _ in range(options.steps):
            mine = draw.integers(TRAIN, size=BATCH)
            gradient = slope(theta, x[mine], y[mine])
            record = reduce_gradient(gradient, comm, state)
            theta -= options.rate * gradient
            opposed += record.conflicts_aggregate
        accuracy = ((x[TRAIN:] @ theta).argmax(1) == y[TRAIN:]).mean()
        if comm.rank == 0:
            share = opposed / (options.steps * comm.size)
            print(
                f"{comm.size} ranks, {weighting}: {100 * accuracy:.1f} % of the test images right, "
                f"{100 * share:.1f} % of the ranks' gradients opposed by the step"
            )


if __name__ == "__main__":
    main()
