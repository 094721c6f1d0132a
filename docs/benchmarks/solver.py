"""CPU time of `min_norm` against DAQP and quadprog, as a Markdown table.

OMP_NUM_THREADS=1 python docs/benchmarks/solver.py [--sizes 8 64 512 1024] [--matrices 9]

Every number is the median over the matrices of the CPU time of one call (the best of a few rounds
of calls per matrix). DAQP and quadprog get the problem as their interface wants it, arrays built
beforehand; quadprog gets G + 1e-10·mean(diag G)·I, without which it refuses a singular G. They are
left out where a call takes longer than a second.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import daqp
import numpy as np
import quadprog
import torch

from grain_ddp._math.solver import min_norm

KINDS = {
    "full rank": "rows from N(0, I) in 2n dimensions",
    "rank n/2": "rows from N(0, I) in n/2 dimensions: 0 is at the edge of the hull",
    "rank n/2, mean": "the same around a common mean, noise 0.3",
    "correlated": "2n dimensions around a common mean, noise 0.3",
}


def gradients(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    d = n // 2 if "n/2" in kind else 2 * n
    noise = rng.standard_normal((n, d))
    mean = kind == "correlated" or "mean" in kind
    return rng.standard_normal(d) + 0.3 * noise if mean else noise


def cpu_ms(call: Callable[[], object], limit: float = 1.0) -> float:
    """Best CPU time of one call over rounds that last about 20 ms each."""
    start = time.process_time()
    call()
    once = time.process_time() - start
    if once > limit:
        return float("nan")
    count, best = max(1, int(0.02 / max(once, 1e-5))), once
    for _ in range(4 if count > 1 else 2):
        start = time.process_time()
        for _ in range(count):
            call()
        best = min(best, (time.process_time() - start) / count)
    return best * 1e3


def solvers(G: np.ndarray, cap: float | None) -> dict[str, Callable[[], object]]:
    n = len(G)
    top = 1.0 if cap is None else cap / n
    upper, lower = np.r_[np.full(n, top), 1.0], np.r_[np.zeros(n), 1.0]
    sense = np.r_[np.zeros(n), 5].astype(np.int32)
    shifted = G + 1e-10 * np.trace(G) / n * np.eye(n)
    sides = [np.ones(n), np.eye(n)] + ([] if cap is None else [-np.eye(n)])
    limits = np.r_[1.0, np.zeros(n), [] if cap is None else np.full(n, -top)]
    zero, ones, constraints = np.zeros(n), np.ones((1, n)), np.column_stack(sides)
    return {
        "grain_ddp": lambda: min_norm(G, cap=cap),
        "DAQP": lambda: daqp.solve(G, zero, ones, upper, lower, sense),
        "quadprog": lambda: quadprog.solve_qp(shifted, zero, constraints, limits, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 512, 1024])
    parser.add_argument("--matrices", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="one small matrix of each kind")
    options = parser.parse_args()
    if options.smoke:
        options.sizes, options.matrices = [8], 1
    torch.set_num_threads(1)
    packages = ", ".join(f"{p} {version(p)}" for p in ("numpy", "torch", "daqp", "quadprog"))
    print(f"Python {platform.python_version()}, {packages}. CPU ms, median (largest).\n")
    columns = (
        "n",
        "gradients",
        "cap",
        "grain_ddp",
        "factored",
        "gap / mean ‖g‖²",
        "DAQP",
        "quadprog",
    )
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    for n in options.sizes:
        matrices = options.matrices if n < 200 else min(options.matrices, 3)
        for kind in KINDS:
            for cap in (None, 2.0):
                times: dict[str, list[float]] = {}
                factored, gaps = [], []
                for seed in range(matrices):
                    A = gradients(kind, n, np.random.default_rng(seed))
                    G = A @ A.T
                    solution = min_norm(G, cap=cap)
                    factored.append(solution.iterations)
                    gaps.append(solution.gap / np.trace(G) * n)
                    for name, call in solvers(G, cap).items():
                        if not np.isnan(times.get(name, [0.0])).any():
                            times.setdefault(name, []).append(cpu_ms(call))
                cells = [
                    "> 1000"
                    if np.isnan(values).any()
                    else f"{np.median(values):.3g} ({max(values):.3g})"
                    for values in times.values()
                ]
                gap = f"{max(gaps):.0e}" if cap is None else ""
                middle = f"{np.median(factored):.0f} ({max(factored)})"
                limit = "" if cap is None else f"{cap:g}"
                row = [str(n), kind, limit, cells[0], middle, gap, *cells[1:]]
                print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
