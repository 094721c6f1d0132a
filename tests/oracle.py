"""The min-norm point by an independent solver, from whole gradients in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls


def min_norm_weights(gradients: ArrayLike) -> NDArray[np.float64]:
    """Weights [n] of the min-norm point of the rows of J [n, d].

    x >= 0 minimising ‖[Jᵀ; s·1ᵀ] x − s·e‖² is a multiple of the weights (Lawson and Hanson 1974,
    problem LDP); Jᵀ = QR makes it small without squaring its condition. Shares no step with the
    package: no Gramian, no pivoting.
    """
    rows = np.asarray(gradients, dtype=np.float64)
    scale = np.abs(rows).max(initial=0.0) or 1.0
    triangle = np.linalg.qr(rows.T / scale, mode="r")
    s = np.linalg.norm(triangle) / np.sqrt(len(rows)) or 1.0
    system = np.vstack([triangle, np.full((1, len(rows)), s)])
    x, _ = nnls(system, np.r_[np.zeros(len(triangle)), s], maxiter=50 * len(rows) + 100)
    return np.asarray(x / x.sum(), dtype=np.float64)


def min_norm_point(gradients: ArrayLike) -> NDArray[np.float64]:
    """The min-norm point [d] of the rows of J [n, d]; groups that are zero do not count."""
    rows = np.asarray(gradients, dtype=np.float64)
    rows = rows[np.abs(rows).max(1) > 0]
    return min_norm_weights(rows) @ rows if len(rows) else np.zeros(np.shape(gradients)[1])
