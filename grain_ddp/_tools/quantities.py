"""Numbers as users type and read them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LEAST, MOST = 1e-18, 1e24
"""Of a quantity: beyond, its square would leave float64, and nothing has such a size."""

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_RATES = {f"{p}B/s": f for p, f in _PREFIXES.items()} | {
    f"{p}{bit}": f / 8 for bit in ("bit/s", "bps", "b/s") for p, f in _PREFIXES.items() if p
}
_FLOPS = {
    f"{p}{flops}": f
    for flops in ("FLOP/s", "FLOPS")
    for p, f in {"G": 1e9, "T": 1e12, "P": 1e15}.items()
}


class Quantity:
    """An option's type: a positive number with a unit, such as 200Gbit/s."""

    def __init__(self, units: Mapping[str, float], example: str, zero: bool = False) -> None:
        self.units, self.example, self.zero = units, example, zero

    def __call__(self, text: str) -> float:
        match = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?)\s*(\D*)", text.strip())
        value = float(match[1]) * self.units.get(match[2], 0) if match else 0.0
        zero = self.zero and match and match[2] in self.units and float(match[1]) == 0
        if not (LEAST <= value <= MOST or zero):
            known = ", ".join(dict.fromkeys(unit for unit in self.units if unit))
            raise argparse.ArgumentTypeError(
                f"expected a {'' if self.zero else 'positive '}number with a unit, such as "
                f"{self.example} ({known}), but found {_shown(text)}"
            )
        return value


count = Quantity(_COUNTS, "7B")
"""Of parameters: "350M", "7B"."""

duration, size = Quantity(_SECONDS, "300ms"), Quantity(_BYTES, "25MiB")
rate, flops = Quantity(_RATES, "200Gbit/s"), Quantity(_FLOPS, "400TFLOP/s")
share = Quantity({"%": 0.01, "": 0.01}, "5%", zero=True)
"""Of 1: "5%" or "5" is 0.05."""


def whole(most: int = 10**9) -> Callable[[str], int]:
    """An option's type: a whole number from 1."""

    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least 1 and at most {most}, but found "
                f"{_shown(text)}"
            )
        return value

    return parse


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    for unit, factor in units:
        if value >= factor or (unit, factor) == units[-1]:
            number = value / factor
            if number >= 1e6:
                return f"{number:.3g}{unit}"
            digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
            return f"{number:.{digits}f}{unit}"
    raise AssertionError


def seconds_words(value: float) -> str:
    return _scaled(value, ((" s", 1.0), (" ms", 1e-3), (" µs", 1e-6)))


def bytes_words(value: float) -> str:
    units = ((" TB", 1e12), (" GB", 1e9), (" MB", 1e6), (" kB", 1e3))
    return _scaled(value, units) if value else "0"


def count_words(value: float) -> str:
    return _scaled(value, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)))


def overhead_words(value: float) -> str:
    """Of how much longer something takes: 0.05 is "5.0 %", 12 is "13 times"."""
    if value >= 10:
        return f"{value + 1:,.0f} times" if value < 1e9 else f"{value:.0e} times"
    return f"{100 * value:.1f} %" if abs(value) >= 5e-4 else "0 %"


def percent(share: Any) -> str:
    """Of 0.153: "15 %"."""
    return f"{100 * float(share):.0f} %"


def shown(value: Any) -> str:
    """Three digits; of NaN a dash."""
    return "-" if math.isnan(value) else f"{value:.3g}"
