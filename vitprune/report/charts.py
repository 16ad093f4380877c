"""Charts as inline SVG: no script, colours of the page in light and dark, text that stays text.

Drawn about as wide as a phone, so that letters are as large there as elsewhere; wider screens show several in a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 30, 36
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_LABEL_GAP = 13


@dataclass(frozen=True)
class Chart:
    """A drawing and what is written above it."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: written at its end; empty for none.
        points: (x, y), x rising.
        colour: number of one of the page's colours.
        dash: number of a pattern, so that lines are told apart without colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dash: int = 0


def line_chart(
    title: str,
    description: str,
    series: Sequence[Series],
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    top: float | None = None,
) -> Chart:
    """Lines over a common x axis, y from 0.

    Args:
        title: what it shows.
        description: the same in words, for who cannot see it.
        series: the lines.
        x_label: under the axis.
        marks: x and text of places where something begins.
        top: highest y; None to fit.
    """
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    frame = _Frame((min(xs), max(xs)), (0.0, top or max(ys)), right=_RIGHT + 58)
    parts = [frame.axes(x_label)]
    parts += _marks(marks, frame)
    for each in series:
        path = " ".join(f"{_n(frame.x(x))},{_n(frame.y(y))}" for x, y in each.points)
        parts.append(
            Markup('<polyline class="c{}" stroke-dasharray="{}" points="{}"/>').format(
                each.colour, _DASHES[each.dash % len(_DASHES)], path
            )
        )
    named = [each for each in series if each.name]
    heights = _spread([frame.y(each.points[-1][1]) for each in named])
    for each, height in zip(named, heights, strict=True):
        parts.append(
            Markup('<text class="t{}" x="{}" y="{}">{}</text>').format(
                each.colour, _n(_WIDTH - frame.right + 4), _n(height + 4), each.name
            )
        )
    return _drawn(title, description, parts)


def _marks(marks: Sequence[tuple[float, str]], frame: _Frame) -> list[Markup]:
    """Upright lines, and what begins there in two rows above, so that neighbours have room."""
    parts = []
    ends = [x for x, _ in marks[1:]] + [frame.xs[1]]
    inside = [
        (max(x, frame.xs[0]), text)
        for (x, text), end in zip(marks, ends, strict=True)
        if x < frame.xs[1] and end > frame.xs[0]
    ]
    for index, (x, text) in enumerate(inside):
        place, row = frame.x(x), _TOP - 4 - 12 * (index % 2)
        parts.append(
            Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                _n(place), row - 8, _HEIGHT - _BOTTOM
            )
            + Markup('<text class="small" x="{}" y="{}">{}</text>').format(_n(place + 3), row, text)
        )
    return parts


@dataclass(frozen=True)
class Point:
    """One model in the chart of accuracy against throughput.

    Attributes:
        name: written beside it.
        x: images a second.
        y: top-1 in percent.
        low, high: of an interval, drawn as a bar; None for none.
    """

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def scatter(title: str, description: str, dense: Point, sparse: Point, floor: Point | None, x_label: str) -> Chart:
    """Dense and sparse by throughput and accuracy, and what the same number of random tokens reach.

    Args:
        title: what it shows.
        description: the same in words, for who cannot see it.
        dense: drawn as a circle.
        sparse: drawn as a square, with its interval.
        floor: accuracy with random tokens, drawn as a line across; its x does not count.
        x_label: under the axis.
    """
    ys = [y for p in (dense, sparse, floor) if p for y in (p.y, p.low, p.high) if y is not None]
    pad = 0.15 * (max(ys) - min(ys)) or 1.0
    frame = _Frame((0.0, 1.15 * max(dense.x, sparse.x)), (max(0.0, min(ys) - pad), min(100.0, max(ys) + pad)))
    parts = [frame.axes(x_label)]
    if floor is not None:
        level = _n(frame.y(floor.y))
        parts.append(
            Markup('<line class="c2" stroke-dasharray="6 3" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, _WIDTH - _RIGHT, level, level
            )
            + Markup('<text class="t2" x="{}" y="{}">{}</text>').format(_LEFT + 6, _n(frame.y(floor.y) - 5), floor.name)
        )
    x0, y0, x1, y1 = frame.x(dense.x), frame.y(dense.y), frame.x(sparse.x), frame.y(sparse.y)
    parts.append(Markup('<line class="mark" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(_n(x0), _n(y0), _n(x1), _n(y1)))
    if sparse.low is not None and sparse.high is not None:
        parts.append(
            Markup('<line class="c1" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                _n(x1), _n(frame.y(sparse.low)), _n(frame.y(sparse.high))
            )
        )
    parts.append(Markup('<circle class="f0" cx="{}" cy="{}" r="6"/>').format(_n(x0), _n(y0)))
    parts.append(Markup('<rect class="f1" x="{}" y="{}" width="11" height="11"/>').format(_n(x1 - 5.5), _n(y1 - 5.5)))
    # Each name on the side of its point that is away from the other.
    for point, x, y, other in ((dense, x0, y0, y1), (sparse, x1, y1, y0 - 0.1)):
        anchor, offset = ("end", -10) if x > _WIDTH / 2 else ("start", 10)
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
                _n(x + offset), _n(y - 10 if y <= other else y + 20), anchor, point.name
            )
        )
    return _drawn(title, description, parts)


def binned(points: Sequence[tuple[float, float]], most: int = 150) -> list[tuple[float, float]]:
    """At most `most` points: means over equal numbers of neighbours."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


class _Frame:
    """From figures to places in the picture."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], right: int = _RIGHT) -> None:
        self.xs = xs if xs[0] < xs[1] else (xs[0] - 1, xs[1] + 1)
        self.y_ticks = _ticks(*ys)
        self.ys = (min(ys[0], self.y_ticks[0]), max(ys[1], self.y_ticks[-1]))
        if self.ys[0] == self.ys[1]:
            self.ys = (self.ys[0], self.ys[0] + 1)
        self.right = right

    def x(self, value: float) -> float:
        return _LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (_WIDTH - self.right - _LEFT)

    def y(self, value: float) -> float:
        share = (value - self.ys[0]) / (self.ys[1] - self.ys[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def axes(self, x_label: str) -> Markup:
        parts = [
            Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, _WIDTH - self.right, _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM
            )
        ]
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(
                Markup('<line class="ruler" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    _LEFT, _WIDTH - self.right, _n(y), _n(y)
                )
                + Markup('<text x="{}" y="{}" text-anchor="end">{:g}</text>').format(_LEFT - 6, _n(y + 4), tick)
            )
        for tick in _ticks(*self.xs, most=4):
            if self.xs[0] <= tick <= self.xs[1]:
                parts.append(
                    Markup('<text x="{}" y="{}" text-anchor="middle">{:g}</text>').format(
                        _n(self.x(tick)), _HEIGHT - _BOTTOM + 15, tick
                    )
                )
        middle = (_LEFT + _WIDTH - self.right) / 2
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(_n(middle), _HEIGHT - 4, x_label)
        )
        return Markup("").join(parts)


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from about `low` to about `high`."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    rough = span / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _spread(heights: Sequence[float]) -> list[float]:
    """The heights of labels, moved apart where they would lie on one another."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    result = list(heights)
    for before, index in pairwise(order):
        result[index] = max(result[index], result[before] + _LABEL_GAP)
    lowest = float(_HEIGHT - _BOTTOM)
    for index in reversed(order):
        result[index] = min(result[index], lowest)
        lowest = result[index] - _LABEL_GAP
    return result


def _drawn(title: str, description: str, parts: Sequence[Markup]) -> Chart:
    svg = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, f"{title}. {description}", Markup("").join(parts)
    )
    return Chart(title, svg)


def _n(value: float) -> str:
    return f"{value:.1f}"
