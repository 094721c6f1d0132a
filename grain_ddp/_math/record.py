"""What one step of GRAIN did, and what can be read off its Gramian for free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grain_ddp._math.status import Status
from grain_ddp._math.suspect import Suspect

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StepRecord:
    """One step, as every rank saw it. n is the number of groups (by default: of ranks).

    With ``scope="bucket"`` the step has one weight vector per bucket, and the fields marked
    [b] get a leading axis (or, if they are not arrays, become a tuple with one entry per bucket).
    The properties describe the whole step in either scope: inner products of whole gradients are
    sums over the buckets.

    Attributes:
        step: number of the step, counted from 0.
        gramian: [b] inner products of the groups' gradients, ``[n, n]``.
        weights: [b] what the gradients were multiplied with, ``[n]``; zero for an absent group.
        gap: [b] duality gap wᵀGw − minᵢ (Gw)ᵢ over the active groups, in units of the squared
            gradient norm. 0 at the min-norm point; NaN if the Gramian is not finite.
        status: [b] how the weights were found, and how well; ``str(status)`` explains it.
        active: [b] indices of the groups that were counted, in order.
        dropped: [b] indices of the groups left out because their gradient was not finite
            (``nonfinite="drop"``) or a rank of theirs was suspect (``guard="drop"``). A group that
            is neither active nor dropped was absent: its gradient was exactly zero.
        sketch_error: of a Gramian from a `sketch`, the root mean square of the relative errors that
            the squared norms had in it, in the worst bucket; they were put right, but the inner
            products, in units of ‖gᵢ‖‖gⱼ‖, are about as wrong. None: the Gramian is exact.
        suspects: ranks that stood out since the record before (`guard`, `check_replicas`).
        labels: of the groups, with ``groups="label"``: all that there have been so far.
        samples, losses: what `GrainState.batch` was told of each backward pass of the step, rank by
            rank; None: nothing.
    """

    step: int
    gramian: Array
    weights: Array
    gap: float | Array
    status: Status | tuple[Status, ...]
    active: tuple[int, ...] | tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...] | tuple[tuple[int, ...], ...]
    sketch_error: float | None = field(default_factory=lambda: None)  # not of the class
    suspects: tuple[Suspect, ...] = field(default_factory=tuple)
    labels: tuple[str, ...] | None = field(default_factory=lambda: None)
    samples: Array | None = field(default_factory=lambda: None)
    losses: Array | None = field(default_factory=lambda: None)

    @cached_property
    def _total(self) -> tuple[Array, Array, float]:
        """Gramian of the whole gradients [n, n]; ⟨aggregate, g_i⟩ [n]; ‖aggregate‖²."""
        n = self.gramian.shape[-1]
        gramians, weights = self.gramian.reshape(-1, n, n), self.weights.reshape(-1, n)
        with np.errstate(invalid="ignore", over="ignore"):
            products = np.einsum("bij,bj->bi", gramians, weights)
            return gramians.sum(0), products.sum(0), float((products * weights).sum())

    @property
    def norm_aggregate(self) -> float:
        """‖d‖ of the step's result d = Σ wᵢ gᵢ."""
        return float(np.sqrt(np.maximum(self._total[2], 0.0)))

    @cached_property
    def _present(self) -> Array:
        """The Gramian of the groups that a mean is taken of: of labels, of those in this step."""
        gramian = self._total[0]
        there = np.diagonal(gramian) != 0
        return gramian if self.labels is None else gramian[np.ix_(there, there)]

    @property
    def norm_mean(self) -> float:
        """‖ḡ‖ of the plain mean over all n groups; with labels, over those in this step."""
        gramian = self._present
        return float(np.sqrt(np.maximum(gramian.mean(), 0.0))) if len(gramian) else 0.0

    @property
    def norms(self) -> Array:
        """‖gᵢ‖ of every group, ``[n]``."""
        return np.sqrt(np.diagonal(self._total[0]))

    @property
    def cosine(self) -> Array:
        """Cosine similarity of every two groups' gradients, ``[n, n]``; 0 where one is zero."""
        norms = self.norms
        scale = np.outer(norms, norms)
        with np.errstate(invalid="ignore"):
            return np.divide(self._total[0], scale, out=np.zeros_like(scale), where=scale != 0)

    @property
    def cosine_to_others(self) -> Array:
        """Cosine similarity of each gᵢ to the sum of the other groups' gradients, ``[n]``.

        0 where one of them is zero. A group far below the others is an outlier.
        """
        gramian = self._total[0]
        squares, without = np.diagonal(gramian), 1 - np.eye(len(gramian))
        # Not the whole sum less one group's part: that part may be nearly all of it.
        to_others = (gramian * without).sum(1)
        others = np.maximum(np.einsum("ij,ij->i", without @ gramian, without), 0.0)  # ‖Σ_{j≠i} gⱼ‖²
        scale = np.sqrt(squares) * np.sqrt(others)
        cosine: Array = np.divide(to_others, scale, out=np.zeros_like(scale), where=scale != 0)
        return cosine

    @property
    def conflicts_mean(self) -> int:
        """In how many of the n pairs (mean, gᵢ) the inner product is negative."""
        there = np.diagonal(self._total[0]) != 0 if self.labels is not None else slice(None)
        gramian, norms = self._total[0][:, there], self.norms[there]
        return self._conflicts(gramian.mean(1), norms.mean()) if gramian.shape[1] else 0

    @property
    def conflicts_aggregate(self) -> int:
        """In how many of the n pairs (aggregate, gᵢ) the inner product is negative."""
        n = self.gramian.shape[-1]
        gramians, weights = self.gramian.reshape(-1, n, n), self.weights.reshape(-1, n)
        with np.errstate(invalid="ignore"):
            norms = np.sqrt(np.einsum("bii->bi", gramians))
        return self._conflicts(self._total[1], float((np.abs(weights) * norms).sum()))

    def _conflicts(self, products: Array, terms: float) -> int:
        """Of the products with a sum of vectors, whose norms have the sum `terms`."""
        # Below this a sign is an artefact of the Gramian's own rounding (fp32 blocks).
        rounding = 1e-7 * terms * self.norms
        return int((products < -rounding).sum())

    @property
    def noise_scale(self) -> float:
        """Gradient noise scale tr(Σ)/‖G‖² in units of one group's batch.

        Times the number of examples in a group's batch it is B_simple of McCandlish et al. 2018
        (arXiv 1812.06162, appendix A.1), here from the n group gradients (the small batch) and
        their mean (the big one). NaN for one group; inf where the estimate of ‖G‖² is not positive.
        """
        gramian = self._present
        n = len(gramian)
        if n <= 1:
            return float("nan")
        small, big = np.diagonal(gramian).mean(), gramian.mean()
        with np.errstate(invalid="ignore"):
            noise, signal = (small - big) / (1 - 1 / n), (n * big - small) / (n - 1)
        return float(noise / signal) if not signal <= 0 else float("inf")


class PendingRecord(StepRecord):
    """A record whose values are still on a GPU: read back, once, when somebody looks at one."""

    def __init__(self, step: int, read: Callable[[], StepRecord]) -> None:
        vars(self).update(step=step, _read=read)

    def __getattr__(self, name: str) -> Any:
        if name not in _FIELDS or "_read" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        record = vars(self)["_read"]()
        vars(self).pop("_read")
        vars(self).update(vars(record))
        object.__setattr__(self, "__class__", StepRecord)  # nothing distinguishes it any more
        return getattr(self, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepRecord, tuple(getattr(self, name) for name in _FIELDS)


_FIELDS = tuple(field.name for field in fields(StepRecord))


def named(groups: tuple[int, ...] | tuple[tuple[int, ...], ...]) -> set[int]:
    """The groups in `StepRecord.active` or `StepRecord.dropped`, in any bucket."""
    return {i for entry in groups for i in (entry if isinstance(entry, tuple) else (entry,))}
