"""Draw charts for the page of a report: small SVG drawings in the page's colours, and maps as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from dvt.analysis.metrics.scores import Row

SERIES = 6  # number of colours in the style sheet
_DASHES = ("", "6 2", "2 2", "8 2 2 2", "4 4", "1 3")


@dataclass(frozen=True)
class Point:
    """Hold a value at a layer.

    Args:
        place: place on the axis.
        value: the value to draw.
        low, high: ends of its interval.
        null: mean of the null, if known.
    """

    place: float
    value: float
    low: float
    high: float
    null: float | None


@dataclass
class _Axis:
    """Map values to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        from matplotlib.ticker import MaxNLocator

        values = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        return [float(each) for each in values if self.low - slack <= each <= self.high + slack]


def number(value: float | None, decimals: int = 3, times: float = 1) -> str:
    """Write a number with a few decimals, or with four digits if that would be long, and with a true minus sign."""
    if value is None:
        return "\N{EN DASH}"
    value = value * times
    text = f"{value:.{decimals}f}" if abs(value) < 1000 else f"{value:.4g}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def png(colours: np.ndarray) -> str:
    """Encode colours (h, w, 3) in [0, 1] as the data URL of a PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray((np.clip(colours, 0, 1) * 255).round().astype(np.uint8)).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def heat(values: np.ndarray, most: float) -> str:
    """Encode a map (h, w) in viridis, from 0 to `most`, as a data URL; maps to be compared need the same `most`."""
    return png(viridis()[(np.clip(values / max(most, 1e-12), 0, 1) * 255).round().astype(int)])


def viridis() -> np.ndarray:
    """List 256 colours (256, 3) in [0, 1] that are even in lightness and distinct for colour-blind readers."""
    from matplotlib import colormaps

    return np.asarray(colormaps["viridis"](np.arange(256)))[:, :3]


def marker(series: int, x: float, y: float, size: float = 4.0) -> str:
    """Draw a circle, square, diamond or triangle; shape and colour both show the series."""
    name, r = f"mark s{series % SERIES}", size
    if series % 4 == 0:
        return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    corners = {
        1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        2: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        3: ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
    }[series % 4]
    points = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners)
    return f'<polygon class="{name}" points="{points}"/>'


def key(series: int, label: str, line: bool = False) -> str:
    """Draw an entry of a legend."""
    drawn = _stroke(series, "M0 6H22") if line else marker(series, 6, 6)
    return (
        f'<span class="key"><svg width="{22 if line else 12}" height="12" aria-hidden="true">{drawn}</svg>'
        f"{escape(label)}</span>"
    )


def dots(rows: Sequence[Row | None], label: str) -> str:
    """Draw a row for each variant: value and interval over the band of its null; None leaves a row empty."""
    width, step = 210.0, 18
    known = [row for row in rows if row is not None and row.value is not None]
    fields = ("value", "low", "high", "null", "null_low", "null_high")
    numbers = [getattr(row, name) for row in known for name in fields if getattr(row, name) is not None]
    if not numbers:
        return ""
    axis = _Axis(*_wide(min(numbers), max(numbers)), 10, width - 10)
    bottom = step * len(rows) + 2.0
    parts = []
    for tick in axis.ticks(3):
        parts += [_line("grid", axis(tick), 0, axis(tick), bottom), _text(axis(tick), bottom + 12, _short(tick))]
    for place, row in enumerate(rows):
        if row is not None and row.value is not None:
            parts += _dot(row, row.value, place, step * place + step / 2, axis)
    return _svg(width, bottom + 16, label, parts, fixed=True)


def _dot(row: Row, value: float, series: int, y: float, axis: _Axis) -> list[str]:
    parts = []
    if row.null_low is not None and row.null_high is not None:
        left, right = axis(row.null_low), axis(row.null_high)
        wide = max(right - left, 1)
        parts.append(f'<rect class="null" x="{left:.1f}" y="{y - 6:.1f}" width="{wide:.1f}" height="12"/>')
    if row.null is not None:
        parts.append(_line("null-mid", axis(row.null), y - 6, axis(row.null), y + 6))
    if row.low is not None and row.high is not None:
        parts.append(_stroke(series, f"M{axis(row.low):.1f} {y:.1f}H{axis(row.high):.1f}", dash=False))
    return [*parts, marker(series, axis(value), y)]


def curves(lines: Sequence[tuple[int, Sequence[Point]]], names: dict[float, str], label: str) -> str:
    """Draw values over layers with the band of their interval, and the null as a dotted line.

    Args:
        lines: (series, points) of each line.
        names: names of the places on the axis.
        label: a description of the chart in words.
    """
    width, height = 320.0, 190.0
    points = [point for _, line in lines for point in line]
    numbers = [each for p in points for each in (p.value, p.low, p.high, p.null) if each is not None]
    y = _Axis(*_wide(min(numbers), max(numbers)), height - 28, 10)
    parts, start = _rules(y, width, {tick: _short(tick) for tick in y.ticks(4)})
    x = _Axis(*_wide(min(names), max(names), 0.0), start + 6, width - 18)
    parts += [_text(x(place), height - 10, names[place]) for place in _thinned(sorted(names), 7)]
    for series, line in lines:
        parts += _curve(series, line, x, y)
    return _svg(width, height, label, parts)


def _curve(series: int, line: Sequence[Point], x: _Axis, y: _Axis) -> list[str]:
    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x(place):.1f} {y(value):.1f}" for place, value in points)

    edge = [(p.place, p.low) for p in line] + [(p.place, p.high) for p in reversed(line)]
    parts = [f'<path class="band s{series % SERIES}" d="{path(edge)}Z"/>']
    if null := [(p.place, p.null) for p in line if p.null is not None]:
        parts.append(f'<path class="null-line" d="{path(null)}"/>')
    parts.append(_stroke(series, path([(p.place, p.value) for p in line]), dash=False))
    return parts + [marker(series, x(p.place), y(p.value), 3) for p in line]


def histogram(counts: Sequence[tuple[int, np.ndarray, Sequence[float]]], label: str) -> str:
    """Draw outlines of (series, counts, edges), counts on a logarithmic scale that shows 0."""
    width, height = 560.0, 260.0
    top = max(_log(float(values.max())) for _, values, _ in counts)
    y = _Axis(0, 1.05 * top, height - 40, 10)
    parts, start = _rules(y, width, {0.0: "0"} | {_log(10**power): f"{10**power:,}" for power in range(int(top) + 1)})
    x = _Axis(0, max(edges[-1] for _, _, edges in counts), start, width - 14)
    parts += [_text(x(tick), height - 22, _short(tick)) for tick in x.ticks(6)]
    parts.append(_text((start + width) / 2, height - 4, "token norm"))
    for series, values, edges in counts:
        there = np.flatnonzero(values)
        path = f"M{x(edges[there[0]]):.1f} {y(0):.1f}"
        for place in range(there[0], there[-1] + 1):
            path += f"V{y(_log(float(values[place]))):.1f}H{x(edges[place + 1]):.1f}"
        parts.append(_stroke(series, f"{path}V{y(0):.1f}"))
    return _svg(width, height, label, parts)


def _log(count: float) -> float:
    return float(np.log10(1 + count))


def _rules(y: _Axis, width: float, ticks: dict[float, str]) -> tuple[list[str], float]:
    """Draw horizontal lines with their numbers, and return where the numbers end."""
    start = 14 + 6.5 * max(len(text) for text in ticks.values())
    parts = [_line("grid", start, y(tick), width - 8, y(tick)) for tick in ticks]
    return parts + [_text(start - 7, y(tick) + 3.5, text, "end") for tick, text in ticks.items()], start


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _stroke(series: int, path: str, dash: bool = True) -> str:
    dashes = f' stroke-dasharray="{_DASHES[series % SERIES]}"' if dash and _DASHES[series % SERIES] else ""
    return f'<path class="line s{series % SERIES}" d="{path}"{dashes}/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str], fixed: bool = False) -> str:
    size = f' width="{width:.0f}" height="{height:.0f}"' if fixed else ""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}"{size} role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _wide(low: float, high: float, room: float = 0.06) -> tuple[float, float]:
    """Widen a range so that it is never empty."""
    span = high - low
    if span < 1e-9 * max(1.0, abs(high)):
        return low - 0.5, high + 0.5
    return low - room * span, high + room * span


def _short(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _thinned(places: Sequence[Any], most: int) -> list[Any]:
    """Keep at most `most` items, evenly spread, including the last."""
    step = -(-len(places) // most)
    return list(reversed(places[::-1][::step]))
