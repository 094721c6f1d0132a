"""What users say of their batches, by `GrainState.batch`, and how all ranks get to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grain_ddp._math.host import to_device
from grain_ddp._math.record import Array
from grain_ddp._wire.wire import Wire

LABEL_BYTES = 48
"""The longest label, in UTF-8. A float64 number carries 6 of them."""

_WORD = 6


@dataclass(frozen=True)
class Batch:
    """What a backward pass was of; None: not told."""

    label: str | None = None
    samples: float | None = None
    loss: Any = None  # a number, or a tensor with one

    def __post_init__(self) -> None:
        label, samples, loss = self.label, self.samples, self.loss
        if label is not None and not (
            isinstance(label, str)
            and 0 < len(label.encode(errors="replace")) <= LABEL_BYTES
            and label == label.encode(errors="replace").rstrip(b"\0").decode()
        ):
            raise ValueError(
                f"grain_ddp: a label must be a text of 1 to {LABEL_BYTES} bytes in UTF-8, with no "
                f"NUL at its end, but it is {label!r}."
            )
        number = isinstance(samples, (int, float)) and not isinstance(samples, bool)
        if samples is not None and not (number and 0 <= samples <= 1e300):
            raise ValueError(f"grain_ddp: samples must be a number >= 0, but it is {samples!r}.")
        if isinstance(loss, Tensor) and loss.numel() == 1:
            object.__setattr__(self, "loss", loss.detach())  # not its graph
        elif loss is not None and (not isinstance(loss, (int, float)) or isinstance(loss, bool)):
            raise ValueError(f"grain_ddp: loss must be a number, but it is {loss!r}.")

    @property
    def told(self) -> tuple[str, ...]:
        return tuple(name for name, value in vars(self).items() if value is not None)

    def __add__(self, other: Batch) -> Batch:
        """Of two passes whose gradients add up."""
        if self.label != other.label:
            raise ValueError(
                f"grain_ddp: a gradient has one label, but its passes have {self.label!r} and "
                f"{other.label!r}. Give every pass of a step the same one, or make each a group of "
                "its own: microbatches."
            )
        samples = None if self.samples is None else self.samples + (other.samples or 0)
        return Batch(self.label, samples, None if self.loss is None else other.loss)


@dataclass(frozen=True)
class Rows:
    """What all ranks said of their batches: of each row of the step's Gramian, rank by rank."""

    labels: tuple[str, ...] | None
    samples: Array | None
    losses: Array | None


class Batches:
    """What this rank has said of the step under way.

    Attributes:
        told: which of label, samples and loss are told: in every step, and on every rank.
        over: whether what comes next is of another step: gradients of this one have come.
    """

    def __init__(self, passes: int) -> None:
        self._passes, self._fixed = passes, False
        self._step: list[Batch] = []
        self.over = False
        self.told: tuple[str, ...] = ()
        self.labels: list[str] = []  # of all steps, in the order of their first appearance
        self.last: Rows | None = None  # of the step under way, once that is known

    def add(self, batch: Batch) -> None:
        """Note what the next backward pass is of. ValueError if something else was told before."""
        if (self._fixed or self._step) and batch.told != self.told:
            before = " and ".join(self.told) or "nothing"
            raise ValueError(
                "grain_ddp: state.batch must tell the same from the first step on, on every rank: "
                f"it told {before}, and now {' and '.join(batch.told) or 'nothing'}."
            )
        self.told = batch.told
        if self.over:  # it broke off
            self.clear()
        if self._passes == 1 and self._step:
            self._step = [self._step[0] + batch]
        else:
            self._step.append(batch)

    def agree(self, wire: Wire, inside: bool) -> None:
        """See, in the first step, that all ranks tell the same. Collective, until they do.

        Raises:
            ValueError: on every rank, if they do not; or if groups of several ranks average
                `inside`, where nobody knows the others' samples yet.
        """
        if self._fixed:
            return
        wire.whole.agree({"what state.batch tells": self.told}, "the comparison of batches")
        if inside and "samples" in self.told:
            raise ValueError(
                "grain_ddp: state.batch tells samples, but groups of several ranks were formed "
                "before it did, which average without them. Call it before the state is first "
                'used, or take groups="rank" or "label".'
            )
        self._fixed = True

    @property
    def _words(self) -> int:
        """How many numbers carry a label."""
        return LABEL_BYTES // _WORD if "label" in self.told else 0

    @property
    def empty(self) -> list[int]:
        """The passes of the step under way that had no samples."""
        return [i for i, batch in enumerate(self._step) if batch.samples == 0]

    def clear(self) -> None:
        """The step is complete, or broken off."""
        self._step, self.last, self.over = [], None, False

    def numbers(self, rank: int, size: int, like: Tensor) -> Tensor:
        """This rank's, in those of all ranks, which are zero: flat float64, on that device."""
        words, m = self._words, self._passes
        width = 3 + words
        own = torch.zeros(m, width, dtype=torch.float64)
        whole = len(self._step) == m
        for row, batch in zip(own, self._step if whole else (), strict=False):
            text = (batch.label or "").encode().ljust(words * _WORD, b"\0")
            found = [text[i : i + _WORD] for i in range(0, len(text), _WORD)]
            loss = batch.loss
            if isinstance(loss, Tensor):
                loss = None if loss.device.type != "cpu" else float(loss)
            said = [1.0, batch.samples or 0.0, loss or 0.0]
            said += [int.from_bytes(word, "big") for word in found]
            row[:] = torch.tensor(said, dtype=torch.float64)
        every = torch.zeros(size, m, width, dtype=torch.float64, device=like.device)
        every[rank] = to_device(own, like.device)
        for i, batch in enumerate(self._step if whole else ()):
            if isinstance(batch.loss, Tensor) and batch.loss.device.type != "cpu":
                every[rank, i, 2] = batch.loss
        return every.view(-1)

    def rows(self, numbers: Tensor) -> Rows:
        """What the sum of all ranks' numbers says.

        Raises:
            ValueError: some rank said nothing, or not of each pass.
        """
        words = self._words
        table = numbers.view(-1, 3 + words).cpu().numpy()
        silent = sorted({i // self._passes for i in np.flatnonzero(table[:, 0] != 1).tolist()})
        if silent:
            raise ValueError(
                f"grain_ddp: expected state.batch before each of {self._passes} backward passes of "
                f"a step, on every rank, but on ranks {silent} it was not called so."
            )
        labels = None
        if words:
            labels = tuple(
                b"".join(int(word).to_bytes(_WORD, "big") for word in row).rstrip(b"\0").decode()
                for row in table[:, 3:]
            )
            self.labels += [one for one in dict.fromkeys(labels) if one not in self.labels]
        return Rows(
            labels,
            table[:, 1].copy() if "samples" in self.told else None,
            table[:, 2].copy() if "loss" in self.told else None,
        )

    def members(self, rows: Rows) -> list[list[int]]:
        """The rows with each label that there has been, in this step or before."""
        assert rows.labels is not None
        return [[i for i, one in enumerate(rows.labels) if one == label] for label in self.labels]
