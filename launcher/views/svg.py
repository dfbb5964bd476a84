"""Curves as inline SVG, so that a page needs neither a library nor the network to show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 24, 44
_MOST_POINTS = 800
_LARGEST = 1e30
_SMALLEST = 1e-15
"""Differences below this, or below a billionth of the values, count as none."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """A named curve. Points that are not finite, or too large to draw, are left out."""

    name: str
    points: Sequence[Point]
    colour: str
    dots: bool = False


def line_chart(series: Sequence[Series], *, unit: str = "", marks: Sequence[float] = ()) -> str:
    """Return an SVG element: curves over steps in a unit, a vertical line at each step in `marks`.

    Without points it is empty.
    """
    shown = [Series(one.name, _thinned(one.points), one.colour, one.dots) for one in series]
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    if not xs:
        return ""
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1e-9)
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high_y - y) / (high_y - low_y) * (_HEIGHT - _TOP - _BOTTOM)
        return round(right, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    parts.append(f'<text x="{_LEFT - 8}" y="11" text-anchor="start">{escape(unit)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    for tick in y_ticks:
        _, y = place(low_x, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, low_y)
        if _LEFT <= x <= _WIDTH - _RIGHT:
            parts.append(f'<text x="{x}" y="{_HEIGHT - 24}" text-anchor="middle">{_label(tick)}</text>')
    for mark in marks:
        x, _ = place(mark, low_y)
        if _LEFT < x <= _WIDTH - _RIGHT:
            parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    parts += [_curve(one, [place(x, y) for x, y in one.points]) for one in shown]
    return "".join([*parts, "</svg>"])


def _curve(series: Series, places: Sequence[Point]) -> str:
    path = " ".join(f"{x},{y}" for x, y in places)
    curve = (
        f'<polyline points="{path}" stroke="{escape(series.colour)}"><title>{escape(series.name)}</title></polyline>'
    )
    if series.dots or len(places) == 1:
        curve += "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="{escape(series.colour)}"/>' for x, y in places)
    return curve


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most `_MOST_POINTS` of the finite points, the last one among them."""
    finite = [point for point in points if all(abs(number) < _LARGEST for number in point)]  # false for NaN too
    every = -(-len(finite) // _MOST_POINTS) or 1
    return [*finite[:-1:every], *finite[-1:]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, from one at or below `low` to one at or above `high`."""
    largest = max(abs(low), abs(high))
    span = high - low if high - low > max(_SMALLEST, 1e-9 * largest) else 0.1 * max(largest, 1.0)
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:g}"
