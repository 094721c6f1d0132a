"""Whether one group all but decides GRAIN's step."""

from __future__ import annotations

from grain_ddp._tools.history import Run

HEAVY, SHORT = 0.6, 0.2
"""It does where a weight is above the first, or the step below the second of the mean's length."""

MANY = 1 / 3
"""A share of the records from which on it is worth a word."""


def ruled(run: Run) -> float:
    """The share of records where one group all but decides GRAIN's step."""
    grain = run.grain
    heavy = grain.weights.max(1) > max(HEAVY, 2 / run.n)  # twice its even share at least
    return float((heavy | (grain.norms < SHORT * run.norm_mean[grain.at])).mean())
