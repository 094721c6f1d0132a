"""Takes the records of a run as they are read, and keeps of each what the report needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from grain_ddp._math.record import Array, StepRecord, named
from grain_ddp._math.status import Status
from grain_ddp._math.suspect import Suspect
from grain_ddp._tools.history import FEWEST, Kind, Run

HELD = 2**25
"""Numbers that are kept of a run, 256 MiB: of a longer one every second record, or fourth."""


class Gathering:
    """Takes the records of a run one by one, as they are read, and keeps little of each.

    Those whose gradient is not finite are counted only. A step that comes again takes the place of
    the earlier one and of all after it; another number of groups starts anew.
    """

    def __init__(self) -> None:
        self._suspects: list[Suspect] = []
        self.left_out = 0  # of an earlier part of the run, with another number of groups
        self._start(0)

    def _start(self, n: int) -> None:
        self.n, self._every = n, 1
        self.labels: tuple[str, ...] | None = None
        self._kinds: list[tuple[int, Kind]] = []  # with the step, of every record
        self._known: dict[Kind, Kind] = {}  # one of each, however many records
        self._upper = np.triu_indices(n)
        self._rows, self._count = np.empty((64, len(self._upper[0]) + 2 * n + 3)), 0

    def add(self, record: StepRecord) -> None:
        gramians = record.gramian
        n = gramians.shape[-1]
        known = self.labels is not None and record.labels is not None
        if known and self.labels == (record.labels or ())[: self.n]:
            self._widen(n)
        elif n != self.n:
            self.left_out += len(self._kinds)
            self._start(n)
        self.labels = record.labels
        while self._kinds and self._kinds[-1][0] >= record.step:
            self._kinds.pop()
        while self._suspects and self._suspects[-1].step >= record.step:
            self._suspects.pop()
        while self._count and self._rows[self._count - 1, 0] >= record.step:
            self._count -= 1
        with np.errstate(all="ignore"):
            whole, products = gramians, gramians @ record.weights[..., None]
            square = record.weights.reshape(-1) @ products.reshape(-1)
            if gramians.ndim == 3:
                whole, products = whole.sum(0), products.sum(0)
            # The sum of all inner products is part of what follows.
            finite = bool(np.isfinite(whole.sum()))
        status = record.status
        statuses = frozenset([status] if isinstance(status, str) else status)
        # Between the steps of a watched run whose Gramian is recorded, one may have a suspect.
        only = record.suspects and statuses == {Status.MEAN} and np.isnan(gramians).all()
        kind = Kind(statuses, frozenset(named(record.dropped)), finite, not only)
        self._suspects += record.suspects
        self._kinds.append((record.step, self._known.setdefault(kind, kind)))
        if finite and len(self._kinds) % self._every == 0:
            weights = record.weights if gramians.ndim == 2 else record.weights.mean(0)
            gap = np.sum(record.gap)
            self._keep(
                np.concatenate(
                    [[record.step, square, gap], weights, products[:, 0], whole[self._upper]]
                )
            )

    def _widen(self, n: int) -> None:
        """There are more labels than before, which no record so far had."""
        if n == self.n:
            return
        more, rows, old = n - self.n, self._rows, self.n
        weights, products = rows[:, 3 : 3 + old], rows[:, 3 + old : 3 + 2 * old]
        gramians = np.zeros((len(rows), n, n))
        gramians[:, self._upper[0], self._upper[1]] = rows[:, 3 + 2 * old :]
        self.n, self._upper = n, np.triu_indices(n)
        none = np.zeros((len(rows), more))
        triangles = gramians[:, self._upper[0], self._upper[1]]
        self._rows = np.hstack([rows[:, :3], weights, none, products, none, triangles])

    def _keep(self, row: Array) -> None:
        if self._count == len(self._rows):
            if 2 * self._rows.size > HELD and self._count >= 2 * FEWEST:
                self._count = len(self._rows) // 2
                self._rows[: self._count] = self._rows[1::2][: self._count].copy()
                self._every *= 2
                if len(self._kinds) % self._every:
                    return
            else:
                grown = np.empty((2 * len(self._rows), self._rows.shape[1]))
                grown[: self._count] = self._rows
                self._rows = grown
        self._rows[self._count] = row
        self._count += 1

    def run(self) -> Run:
        """What is there so far; at least one record must be."""
        n, rows = self.n, self._rows[: self._count]
        columns = np.split(rows, [1, 2, 3, 3 + n, 3 + 2 * n], axis=1)
        step, square, gap, weights, products, triangles = columns
        return Run(
            n=n,
            first=self._kinds[0][0],
            last=self._kinds[-1][0],
            kinds=Counter(kind for _, kind in self._kinds),
            left_out=self.left_out,
            every=self._every,
            steps=step[:, 0],
            squares=square[:, 0],
            all_gaps=gap[:, 0],
            weights=weights,
            products=products,
            triangles=triangles,
            suspects=tuple(self._suspects),
            labels=self.labels,
        )


def run_of(records: Iterable[StepRecord]) -> Run:
    """From one or more records."""
    gathering = Gathering()
    for record in records:
        gathering.add(record)
    return gathering.run()
