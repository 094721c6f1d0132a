"""The life of some columns: memory, messages, arrival, result.

Whoever aggregates, for all ranks, for owners of parts or inside of a group, cuts gradients into
columns and takes each set of columns through the same stages:

    send → arrive → reduce → gather → complete

Who keeps the result for itself stops at reduce. A stage is entered by counting what was pushed,
never by looking at what has arrived, so that all ranks issue the same messages in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grain_ddp._core.narrow import EXTRA, decode, encode, scale, times_power_
from grain_ddp._core.scratch import Scratch
from grain_ddp._core.views import Views, length, part, read, write
from grain_ddp._math.gramian import few, gramian, weighted_sum
from grain_ddp._wire.wire import Transfer, Wire


class Columns:
    """Some columns of the gradients of all groups, of which each is a row.

    Args:
        wire: the ranks that exchange them.
        slots: for each rank, where its columns are in this rank's memory. This rank's own hold its
            gradient now, and the result after `reduce`; the others hold it after `complete`.
        narrow: the dtype of what travels, where it is not the memory's.
        total: the Gramian [r, r] that these columns are added to when they arrive. None: nobody
            wants it.
        home: the slots as a matrix [r, c], where they are one; without what is left over in the
            last slot, where the number of ranks does not divide.
        block: several passes of this rank, one after the other for each rank: sent in place of the
            slots. `home` lies in it then, and has a row for each pass of each rank.
    """

    def __init__(
        self,
        wire: Wire,
        slots: Sequence[Views],
        *,
        narrow: torch.dtype | None = None,
        total: Tensor | None = None,
        home: Tensor | None = None,
        block: Tensor | None = None,
    ) -> None:
        n = wire.size
        self.wire, self.slots, self.own = wire, slots, slots[wire.rank]
        self.narrow = narrow if n > 1 else None
        self.total, self.home, self.block = total, home, block
        self.passes = 1 if block is None or home is None else len(home) // n
        self.arrived = self.reduced = self.gathering = False
        self.transfer = Transfer()
        # Whether the own row is where the result will be, and needs no second place.
        self._in_place = home is not None and block is None and self.narrow is None and n > 1
        # Whether it stays there for the Gramian too, which is as fast so.
        self._apart = self._in_place and few(self.own[0], n)
        self._like = next(view for views in slots for view in views)
        self.dtype = self._like.dtype
        self._scratch: Scratch | None = None  # whose memory this holds, if any
        self._sent: Sequence[Tensor] = ()
        self._rows: Sequence[Tensor] = ()  # [r, c] of all groups; or two such, side by side
        self._flat: Views = ()  # in their place, where the slots are no matrix: the same, flat
        self._scales: Tensor | None = None  # what rows of a narrow dtype are multiplied with, [r]

    # The stages.

    def send(self, scratch: Scratch, limit: int) -> None:
        """Send every rank its columns of this rank's gradient, and make room for the own ones.

        `limit` is how many bytes of scratch there may be.
        """
        n, me = self.wire.size, self.wire.rank
        if self.block is None:
            sent = [read(views, self._like) for views in self.slots]
        else:
            lengths = [self.passes * length(views) for views in self.slots]
            sent = list(self.block.split_with_sizes(lengths))
        if n == 1:
            self._rows = [sent[0].view(self.passes, length(self.own))]
            return
        extra = EXTRA if self.narrow else 0
        lengths = [len(values) + extra for values in sent]
        room, beside = n * lengths[me], sum(lengths) if self.narrow else 0
        memory = self._hold(scratch, room + beside, self.narrow or self.dtype, limit)
        rows = memory[:room].view(n, -1)
        if self.narrow:
            messages = memory[room:].split_with_sizes(lengths)
            for values, message in zip(sent, messages, strict=True):
                encode(values, message)
            sent = list(messages)
        self._sent, self._rows = sent, [rows]
        self.transfer = self.wire.exchange(sent, list(rows.unbind()), "the exchange of rows")

    def arrive(self) -> None:
        """Complete what `send` started, but that others may still read; add up the Gramian."""
        if self.arrived:
            return
        if self.wire.size > 1:
            rows = self._rows[0]
            if not self._apart:
                rows[self.wire.rank] = self._sent[self.wire.rank]
            self.transfer.arrive()
            if self.narrow:
                self._scales = scale(rows).repeat_interleave(self.passes)
                rows = rows[:, :-EXTRA]
            self._rows = [rows.reshape(len(rows) * self.passes, length(self.own))]
        self.arrived = True
        if self.total is not None:
            self.total += self.gramian()

    def gramian(self, *, exact: bool = False) -> Tensor:
        """The Gramian [r, r] of these columns, float64; `exact`: of products in float64 too."""
        me = self.wire.rank
        total: Tensor | None = None
        for rows, own in self._matrices():
            every = [*rows[:me].unbind(), own, *rows[me + 1 :].unbind()] if self._apart else rows
            some = gramian(every, exact=exact)
            total = some if total is None else total.add_(some)
        assert total is not None
        return total if self._scales is None else total * self._scales.outer(self._scales)

    def reduce(self, factors: Tensor, dropped: Sequence[int] = (), *, exact: bool = False) -> None:
        """Put the sum of all rows times their factors [r] where this rank's columns are.

        Of `dropped` rows nothing is added, whatever they hold. `exact`: summed in float64.
        """
        if self._scales is not None:
            factors = factors * self._scales
        if self.wire.size == 1 and self.block is None:
            for view in self.own:
                view.zero_() if dropped else view.mul_(factors[0])
        elif len(self.own) == 1:
            for rows, own in self._matrices():
                self._sum(rows, factors, dropped, own, exact)
        elif self.own:
            rows, _ = next(self._matrices())
            result = self.own[0].new_empty(rows.shape[1])
            self._sum(rows, factors, dropped, result, exact)
            write(self.own, result)
        self.reduced = True
        self._rows, self._flat, self._scales = (), (), None
        if not self.narrow:  # else what was sent is in the same memory
            self._let_go()

    def end(self) -> None:
        """Forget the rows, of which only the Gramian was wanted, when others have read them."""
        self.transfer.wait()
        self._rows, self._flat, self._scales = (), (), None
        self._let_go()

    def gather(self, scratch: Scratch, limit: int) -> Transfer:
        """Start to send the result to all ranks, and to receive theirs."""
        self.transfer.wait()  # what is received takes the place of what was sent
        parts, me = [views[0] for views in self.slots], self.wire.rank
        if self.narrow:
            self._let_go()
            lengths = [len(values) + EXTRA for values in parts]
            messages = self._hold(scratch, sum(lengths), self.narrow, limit)
            self._sent = messages.split_with_sizes(lengths)
            encode(parts[me], self._sent[me])
            parts = list(self._sent)
        self.transfer = self.wire.gather(parts[me], parts, "the gather of the result")
        self.gathering = True
        return self.transfer

    def complete(self) -> None:
        """Complete the gather: the result is in all slots, the same on every rank."""
        if not self.gathering:
            return
        self.transfer.wait()
        if self.narrow:  # the own one too: rounded, as the others have it
            for message, views in zip(self._sent, self.slots, strict=True):
                decode(message, views[0])
        self.gathering = False
        self._let_go()

    # Memory.

    def give_back(self) -> None:
        """Do what lets these columns do without scratch: it is wanted for others."""
        if self.gathering:
            self.complete()
            return
        if not self.reduced:
            self.arrive()
        self.transfer.wait()
        if not self.reduced:
            self._go_home()
        self._let_go()

    def _go_home(self) -> None:
        """Keep the rows where the gradients were that have been sent."""
        rows, me = self._rows[0], self.wire.rank
        if self._scales is not None and self.home is None:
            rows = (rows.double() * self._scales[:, None]).to(self.dtype)
            self._scales = None
        if self.home is None:
            free = part([view for views in self.slots for view in views], 0, rows.numel())
            write(free, rows.view(-1))
            self._flat = [*free, rows.view(-1)[length(free) :].clone()]
            self._rows = [rows.new_empty(0, rows.shape[1])]
            return
        width = self.home.shape[1]
        others = (slice(me), slice(me + 1, None)) if self._in_place else (slice(None),)
        for some in others:
            self.home[some] = rows[some, :width]
        self._rows = [self.home]
        if width < rows.shape[1]:
            self._rows = [self.home, rows[:, width:].to(self.home.dtype, copy=True)]
        if self._scales is not None:
            powers = torch.frexp(self._scales)[1] - 1
            for matrix in self._rows:
                for row, power in zip(matrix, powers, strict=True):
                    times_power_(row, power)
            self._scales = None
        if self.narrow and self.block is None:  # the own row is where the result will be
            self._in_place = True
            if len(self._rows) > 1:
                self.own[0][width:] = self._rows[1][me]

    def _hold(self, scratch: Scratch, count: int, dtype: torch.dtype, limit: int) -> Tensor:
        self._scratch = scratch
        size, device = count * dtype.itemsize, self._like.device
        return scratch.lend(self, size, device, limit).view(dtype)[:count]

    def _let_go(self) -> None:
        if self._scratch is not None:
            self._scratch.take_back(self)
            self._scratch, self._sent = None, ()

    # Arithmetic.

    def _matrices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows [r, c], and where the result of these columns belongs, if that is one place."""
        start = 0
        for rows in self._rows:
            if self._flat:
                rows = read(self._flat, rows).view(-1, rows.shape[1])
            stop = start + rows.shape[1]
            yield rows, self.own[0][start:stop] if self.own else rows[0]
            start = stop

    def _sum(
        self, rows: Tensor, factors: Tensor, dropped: Sequence[int], out: Tensor, exact: bool
    ) -> None:
        for i in dropped:
            rows[i].zero_()  # 0 · NaN is NaN
        own = self.wire.rank if self._in_place else None
        weighted_sum(rows, factors, out, own=own, exact=exact)
