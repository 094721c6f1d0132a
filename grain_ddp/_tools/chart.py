"""The panels as SVG, for the page: no package is needed, and colours follow the reader's theme."""

from __future__ import annotations

import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np

from grain_ddp._math.record import Array
from grain_ddp._tools.panels import Heat, Lines, Panel, bounds, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 230, 58, 14, 12, 40
SQUARE = 260  # a matrix and its numbers

LESS, MORE = (40, 105, 200), (225, 115, 20)
"""Colours of −1 and of 1, opaque; 0 is transparent, and so neutral on any ground."""


def figure(panel: Panel) -> str:
    """A panel with its title and its legend, which is beside the curves and covers none."""
    if isinstance(panel, Lines):
        legend, drawn = _legend(panel), _lines(panel)
    elif isinstance(panel, Heat):
        less, fair, more = panel.keys
        legend = _keys(f"{less}: not counted", f"{fair}: an equal share", f"{more}: alone")
        drawn = _heat(panel)
    else:
        legend = _keys("-1: opposite", "0: unrelated", "1: the same direction", turned=True)
        drawn = "".join(_matrix(name, values) for name, values in panel.values.items())
        drawn = f'<div class="pair">{drawn}</div>'
    return f"<figure><figcaption>{escape(panel.title)}</figcaption>{legend}{drawn}</figure>"


def _legend(panel: Lines) -> str:
    named = [s for s in panel.series if s.label]
    items = (f'<li><i class="line {s.role}"></i>{escape(s.label)}</li>' for s in named)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _keys(less: str, none: str, more: str, turned: bool = False) -> str:
    tones = (1, 0, -1) if turned else (-1, 0, 1)
    items = (
        f'<li><i class="key" style="background:rgba{_color(tone)}"></i>{escape(text)}</li>'
        for tone, text in zip(tones, (less, none, more), strict=True)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _color(tone: float) -> tuple[int, int, int, float]:
    return (*(MORE if tone > 0 else LESS), round(abs(tone), 3))


def _svg(width: int, height: int, title: str, parts: Iterator[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _lines(panel: Lines) -> str:
    low, high = bounds(panel)
    log = panel.log and low > 0
    scale = math.log if log else float
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    first, last = float(panel.x[0]), float(panel.x[-1])
    x = LEFT + across * (panel.x - first) / max(last - first, 1)

    def y(value: float) -> float:
        share = (scale(value) - scale(low)) / max(scale(high) - scale(low), 1e-300)
        return TOP + down * (1 - min(max(share, 0.0), 1.0))

    def path(values: Array) -> str:
        drawn, pen = [], "M"
        for at, value in zip(x, values, strict=True):
            if math.isfinite(value) and (value > 0 or not log):
                # A point of its own has a length of 0, and is seen by its round ends.
                drawn.append(f"{pen}{at:.1f} {y(value):.1f}{'h0' * (pen == 'M')}")
                pen = "L"
            else:
                pen = "M"
        return "".join(drawn)

    def parts() -> Iterator[str]:
        yield from _steps(first, last)
        if panel.note:
            yield _text(LEFT + across / 2, TOP + down / 2, panel.note, "middle")
            return
        for tick in ticks(low, high, log):
            yield f'<path class="grid" d="M{LEFT} {y(tick):.1f}h{across}"/>'
            yield _text(LEFT - 6, y(tick) + 4, _number(tick), "end")
        if panel.band is not None:
            known = np.isfinite(panel.band[0])
            upper, lower = (
                [f"{at:.1f} {y(v):.1f}" for at, v in zip(x[known], band[known], strict=True)]
                for band in panel.band[::-1]
            )
            if upper:
                yield f'<path class="band" d="M{"L".join(upper + lower[::-1])}z"/>'
        for series in panel.series:
            yield f'<path class="{series.role}" d="{path(series.y)}"/>'

    return _svg(WIDTH, HEIGHT, panel.title, parts())


def _steps(first: float, last: float) -> Iterator[str]:
    """The axis of steps."""
    bottom, across = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT
    yield f'<path class="axis" d="M{LEFT} {bottom}h{across}"/>'
    marks = [t for t in ticks(first, last, False) if t == int(t)] if last > first else [first]
    for tick in marks:
        at = LEFT + across * (tick - first) / max(last - first, 1)
        if at < WIDTH - 135:  # where the last step is written, on a phone too
            yield _text(at, bottom + 18, _number(tick), "middle")
    yield _text(WIDTH - RIGHT, bottom + 18, f"step {last:.0f}", "end")


def _number(value: float) -> str:
    """Short: 20000 is 20k."""
    if abs(value) >= 1e4 and value % 1000 == 0 and abs(value) < 1e9:
        return (
            f"{value / 1e6:g}M" if value % 1e5 == 0 and abs(value) >= 1e6 else f"{value / 1e3:g}k"
        )
    return f"{value:.10g}".replace("e-0", "e-").replace("-", "−")


def _heat(panel: Heat) -> str:
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    n = len(panel.values)

    def parts() -> Iterator[str]:
        yield _image(panel.values, LEFT, TOP, across, down)
        for i in _rows(n):
            yield _text(LEFT - 6, TOP + down * (i + 0.5) / n + 4, str(i), "end")
        yield from _steps(*panel.steps)

    return _svg(WIDTH, HEIGHT, panel.title, parts())


def _rows(n: int) -> list[int]:
    every = max(math.ceil(n / 8), 1)
    return list(range(0, n, every))


def _matrix(name: str, values: Array) -> str:
    n, room = len(values), 26
    side = SQUARE - room
    size = side / n

    def parts() -> Iterator[str]:
        yield _image(-np.nan_to_num(values), room, 0, side, side)
        for i in _rows(n):
            yield _text(room - 5, size * (i + 0.5) + 4, str(i), "end")
        if n <= 6:
            for i, j in np.ndindex(n, n):
                value = values[i, j]
                shown = f"{value:.2f}".replace("-", "−") if math.isfinite(value) else ""
                yield _text(room + size * (j + 0.5), size * (i + 0.5) + 4, shown, "middle cell")
        yield _text(room + side / 2, SQUARE - 6, f"{name} in the run", "middle")

    return _svg(SQUARE, SQUARE, f"{name}: {n} groups", parts())


def _image(values: Array, x: float, y: float, width: float, height: float) -> str:
    """A pixel for each value from −1 to 1."""
    values = np.clip(np.nan_to_num(values), -1, 1)
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where((values > 0)[..., None], MORE, LESS)
    pixels[..., 3] = np.round(255 * np.abs(values))
    place = f'x="{x}" y="{y}" width="{width:.1f}" height="{height:.1f}"'
    return (
        f'<image {place} preserveAspectRatio="none" href="data:image/png;base64,{_png(pixels)}"/>'
        f'<rect {place} class="frame"/>'
    )


def _png(pixels: Any) -> str:
    """RGBA pixels [height, width, 4] as a PNG file (ISO 15948), in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits a channel, RGBA
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    return b64encode(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")).decode()
