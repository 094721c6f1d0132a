"""The rate and the stability of min-norm on a smooth non-convex problem, without noise.

    python examples/study/theory.py           # results/theory.json; seconds

Eight groups of 16 samples, f_i(x) = mean of r²/(1 + r²), r = ⟨a, x⟩ − b: smooth, not convex. Full
gradients and steps of 1/L, so that min-norm's ⟨g_i, d⟩ >= ‖d‖² gives, for each group,

    f_i(x − d/L) <= f_i(x) − ‖d‖²/(2L),    so    (1/T) Σ ‖d_t‖² <= 2L min_i f_i(x_0) / T:

no group's loss ever rises, and the rate is O(1/T). Stability: how far the parameters drift apart
when one of the 128 samples is another one (Hardt, Recht and Singer 2016).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from grain_ddp.weighting import weigh

GROUPS, SAMPLES, DIMENSION, STEPS, PROBLEMS = 8, 16, 20, 3000, 10
SMOOTHNESS = 2.0  # L: |φ''| <= 2 for φ(r) = r²/(1 + r²), and ‖a‖ = 1
CHECKED = (30, 100, 300, 1000, 3000)
RULES: dict[str, dict[str, Any]] = {
    "mean": {"weighting": "mean"},
    "min_norm": {"weighting": "min_norm"},
    "cap 2": {"weighting": "min_norm", "cap": 2},
    "upgrad": {"weighting": "upgrad"},
}


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples a ``[groups, samples, d]`` of length one, and b: groups want different x."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(GROUPS, SAMPLES, DIMENSION))
    a /= np.linalg.norm(a, axis=2, keepdims=True)
    wanted = rng.normal(size=DIMENSION) + 0.5 * rng.normal(size=(GROUPS, 1, DIMENSION))
    return a, (a * wanted).sum(2) + 0.1 * rng.normal(size=(GROUPS, SAMPLES))


def descend(a: np.ndarray, b: np.ndarray, rule: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters ``[T, d]``, ‖d‖² ``[T]`` and every group's loss ``[T, groups]`` along the way."""
    x = np.zeros(DIMENSION)
    path, squares, losses = [], [], []
    for _ in range(STEPS):
        r = a @ x - b
        J = np.einsum("gs,gsd->gd", 2 * r / (1 + r**2) ** 2, a) / SAMPLES
        d = weigh(J @ J.T, **rule).weights @ J
        path.append(x)
        squares.append(d @ d)
        losses.append((r**2 / (1 + r**2)).mean(1))
        x = x - d / SMOOTHNESS
    return {"path": np.array(path), "squares": np.array(squares), "losses": np.array(losses)}


def measured(rule: dict[str, Any]) -> dict[str, Any]:
    """Over all problems: the largest average of ‖d‖² beside its bound, rises, and the drift."""
    ratios, rises, drifts = [], [], []
    for seed in range(PROBLEMS):
        a, b = problem(seed)
        one = descend(a, b, rule)
        averages = np.cumsum(one["squares"]) / np.arange(1, STEPS + 1)
        limits = 2 * SMOOTHNESS * one["losses"][0].min() / np.arange(1, STEPS + 1)
        ratios.append([averages[T - 1] / limits[T - 1] for T in CHECKED])
        rises.append((np.diff(one["losses"], axis=0) > 1e-12).mean())
        other, c = problem(1000 + seed)
        a[0, 0], b[0, 0] = other[0, 0], c[0, 0]
        drifts.append(np.linalg.norm(descend(a, b, rule)["path"] - one["path"], axis=1))
    return {
        "average of squares over bound": np.max(ratios, 0).round(4).tolist(),
        "losses that rise": round(float(np.mean(rises)), 4),
        "drift": [round(float(np.mean(drifts, 0)[T - 1]), 4) for T in CHECKED],
    }


def main() -> None:
    found = {name: measured(rule) for name, rule in RULES.items()}
    lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {"steps": CHECKED, **found}.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (Path(__file__).parent / "results" / "theory.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
