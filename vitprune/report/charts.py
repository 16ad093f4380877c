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
_LETTER_WIDTH = 6.0
"""About, of small text."""


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


@dataclass(frozen=True)
class Spot:
    """One model in the chart of several.

    Attributes:
        point: its place, name and interval.
        kind: number of its colour and shape: 0 a circle, 1 a square, 3 a triangle.
        on_front: filled where no other model is better in both; else hollow.
    """

    point: Point
    kind: int
    on_front: bool


def spots(title: str, description: str, found: Sequence[Spot], x_label: str) -> Chart:
    """Several models by cost and accuracy; a dashed line joins those on the front.

    Args:
        title: what it shows.
        description: the same in words, for who cannot see it.
        found: the models.
        x_label: under the axis.
    """
    xs = [spot.point.x for spot in found]
    ys = [y for s in found for y in (s.point.y, s.point.low, s.point.high) if y is not None]
    x_pad, y_pad = 0.12 * (max(xs) - min(xs)) or 0.1 * max(xs), 0.1 * (max(ys) - min(ys)) or 1.0
    frame = _Frame((max(0.0, min(xs) - x_pad), max(xs) + x_pad), (min(ys) - y_pad, min(100.0, max(ys)) + y_pad))
    parts = [frame.axes(x_label)]
    places = [(frame.x(s.point.x), frame.y(s.point.y)) for s in found]
    front = sorted(place for place, s in zip(places, found, strict=True) if s.on_front)
    line = " ".join(f"{_n(x)},{_n(y)}" for x, y in front)
    parts.append(Markup('<polyline class="mark" fill="none" points="{}"/>').format(line))
    for (x, _), s in zip(places, found, strict=True):
        if s.point.low is not None and s.point.high is not None:
            ends = _n(frame.y(s.point.low)), _n(frame.y(s.point.high))
            parts.append(Markup('<line class="ruler" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(_n(x), *ends))
    parts += [_shape(s, x, y) for (x, y), s in zip(places, found, strict=True)]
    parts += _named([s.point.name for s in found], places)
    return _drawn(title, description, parts)


def _shape(spot: Spot, x: float, y: float) -> Markup:
    look = f"f{spot.kind}" if spot.on_front else f"c{spot.kind} hollow"
    if spot.kind == 0:
        return Markup('<circle class="{}" cx="{}" cy="{}" r="5"/>').format(look, _n(x), _n(y))
    half = 4.5 if spot.kind == 1 else 5.5
    corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    if spot.kind != 1:
        corners = [(0.0, -half), (half, half), (-half, half)]
    points = " ".join(f"{_n(x + dx)},{_n(y + dy)}" for dx, dy in corners)
    return Markup('<polygon class="{}" points="{}"/>').format(look, points)


def _named(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[Markup]:
    """A name beside each place, where it covers least of the other names and places."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    parts = []
    for name, (x, y) in zip(names, places, strict=True):
        width = _LETTER_WIDTH * len(name)
        sides = [(9, 4), (-9 - width, 4), (-width / 2, -9), (-width / 2, 18)]
        sides += [(dx, dy) for dy in (-9, 18) for dx in (6, -6 - width)]
        boxes = [(x + dx, y + dy - 10, x + dx + width, y + dy + 2) for dx, dy in sides]
        box = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken) + _outside(box))
        taken.append(box)
        parts.append(Markup('<text class="small" x="{}" y="{}">{}</text>').format(_n(box[0]), _n(box[3] - 2), name))
    return parts


_Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


def _overlap(one: _Box, other: _Box) -> float:
    """Area that two boxes have in common."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: _Box) -> float:
    """Area of a box outside the plot; it counts much, for there it is cut off."""
    inside = (_LEFT, 0.0, _WIDTH, _HEIGHT - _BOTTOM)
    return 10 * ((box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, inside))


def binned(points: Sequence[tuple[float, float]], most: int = 150) -> list[tuple[float, float]]:
    """At most `most` points: means over equal numbers of neighbours."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


class _Frame:
    """From figures to places in the image."""

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
