"""Charts as inline SVG by matplotlib: no script, colours of the page in light and dark, text that stays text.

Drawn about as wide as a phone, so that letters are as large there as elsewhere; wider screens show several in a row.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 30, 36
"""In points, as are all lengths here."""
_NAMES_WIDTH = 58
"""At the right of a chart with lines, where they are named."""
_SHAPES = {0: "o", 1: "s", 3: "^"}
_LABEL_GAP = 13
_LETTER_WIDTH = 6.0
"""About, of small text."""
_SMALL = 11
_POINTS = "figure points"
_DASHES, _DOTS = (0, (3, 1.5)), (0, (3, 3))

_VARIABLES = ("ink", "soft", "rule", "box", "c0", "c1", "c2", "c3")
"""Of the page's style sheet; in the drawing each is a colour of its own."""
_INK, _SOFT, _RULE, _BOX, *_SERIES = (f"#0100{number:02x}" for number in range(len(_VARIABLES)))
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _RULE,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
}


@dataclass(frozen=True)
class Chart:
    """A drawing and what is written above it."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Series:
    """One line of a chart through points (x, y), x rising, with a name at its end and one of the page's colours.

    A dashed one can be told without its colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class ChartPoint:
    """One model by cost or speed, x, and accuracy or what else models are judged by, y, with its name beside it.

    Its kind is the number of its colour and shape: 0 a circle, 1 a square, 3 a triangle. `on_front` it is filled and
    joined to others like it, else hollow. From `low` to `high` an interval is drawn as a bar.
    """

    name: str
    x: float
    y: float
    kind: int = 0
    on_front: bool = True
    low: float | None = None
    high: float | None = None


def line_chart(
    title: str,
    description: str,
    series: Sequence[Series],
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    top: float | None = None,
) -> Chart:
    """Lines over a common x axis, y from 0 to `top`; `marks` are x and text of places where something begins.

    The description says in words what is seen, for who cannot see it.
    """

    def paint(axes: Any) -> None:
        for each in series:
            style = _DASHES if each.dashed else "-"
            axes.plot(*zip(*each.points, strict=True), color=_SERIES[each.colour], linestyle=style)
        axes.set_ylim(0, top)
        axes.margins(x=0)
        _mark(axes, marks)
        named = [each for each in series if each.name]
        ends = [axes.transData.transform(each.points[-1])[1] for each in named]
        for each, height in zip(named, _spread(ends), strict=True):
            place = _WIDTH - _NAMES_WIDTH - 6, height - 4
            axes.annotate(each.name, place, xycoords=_POINTS, color=_SERIES[each.colour])

    right = _RIGHT + _NAMES_WIDTH * any(each.name for each in series)
    return _drawn(title, description, x_label, paint, right)


def models_chart(
    title: str,
    description: str,
    points: Sequence[ChartPoint],
    x_label: str,
    level: tuple[str, float] | None = None,
    left: float | None = None,
    percent: bool = True,
    curve: Sequence[tuple[float, float]] = (),
) -> Chart:
    """Models by cost or speed, from `left` on, and accuracy, in `percent` or not; a dashed line joins the front.

    `level` is name and accuracy of what is drawn as a line across, `curve` what one model could be, x rising. The
    description is as in `line_chart`.
    """

    def paint(axes: Any) -> None:
        front = sorted((point.x, point.y) for point in points if point.on_front)
        axes.plot(*zip(*front, strict=True), color=_SOFT, linewidth=1, linestyle=_DOTS)
        if curve:
            axes.plot(*zip(*curve, strict=True), color=_SERIES[3])
        for point in points:
            if point.low is not None:
                axes.plot([point.x, point.x], [point.low, point.high], color=_SOFT, linewidth=1)
        for point in points:
            colour = _SERIES[point.kind]
            filled = colour if point.on_front else _BOX
            axes.plot(point.x, point.y, _SHAPES[point.kind], color=colour, markerfacecolor=filled, markersize=10)
        if level is not None:
            axes.axhline(level[1], color=_SERIES[2], linewidth=1, linestyle=_DASHES)
        axes.margins(0.12)
        axes.set_xlim(left=left)
        if percent and axes.get_ylim()[1] > 100:
            axes.set_ylim(top=100.5)
        _name(axes, points, curve)
        if level is not None:
            height = axes.transData.transform((0, level[1]))[1]
            axes.annotate(level[0], (_LEFT + 6, height + 5), xycoords=_POINTS, color=_SERIES[2], fontsize=_SMALL)

    return _drawn(title, description, x_label, paint)


def _drawn(title: str, description: str, x_label: str, paint: Callable[[Any], None], right: float = _RIGHT) -> Chart:
    """An empty chart for `paint` to draw on, and what becomes of it."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its font lacks: the page's has them
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, facecolor="none")
        width, height = _WIDTH - _LEFT - right, _HEIGHT - _BOTTOM - _TOP
        axes = figure.add_axes((_LEFT / _WIDTH, _BOTTOM / _HEIGHT, width / _WIDTH, height / _HEIGHT))
        axes.grid(axis="y")
        axes.set_xlabel(x_label)
        axes.locator_params(nbins=5)
        paint(axes)
        for artist in figure.findobj():
            artist.set_clip_on(False)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Chart(title, _inline(text.getvalue(), f"{title}. {description}"))


def _inline(svg: str, label: str) -> Markup:
    """A file of matplotlib's as an element of the page: nothing but shapes and text, colours by the page's names."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;]*; ", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"| transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"#0100(\w\w)", lambda found: f"var(--{_VARIABLES[int(found[1], 16)]})", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("xlink:href", "href")
    start = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, label)
    return Markup(re.sub(r"<svg[^>]*>", lambda _: start, svg, count=1))


def _mark(axes: Any, marks: Sequence[tuple[float, str]]) -> None:
    """Upright lines, and what begins there in two rows above, so that neighbours have room."""
    low, high = axes.get_xlim()
    ends = [x for x, _ in marks[1:]] + [high]
    inside = [(max(x, low), text) for (x, text), end in zip(marks, ends, strict=True) if x < high and end > low]
    for index, (x, text) in enumerate(inside):
        rise = 4 + 12 * (index % 2)
        axes.axvline(x, ymax=1 + (rise + 8) / (_HEIGHT - _TOP - _BOTTOM), color=_SOFT, linewidth=1, linestyle=_DOTS)
        where = {"xycoords": ("data", "axes fraction"), "xytext": (3, rise), "textcoords": "offset points"}
        axes.annotate(text, (x, 1), **where, color=_SOFT, fontsize=_SMALL)


def _spread(heights: Sequence[float]) -> list[float]:
    """The heights of labels, moved apart where they would lie on one another."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    result = list(heights)
    for before, index in pairwise(order):
        result[index] = max(result[index], result[before] + _LABEL_GAP)
    return result


def _name(axes: Any, points: Sequence[ChartPoint], curve: Sequence[tuple[float, float]]) -> None:
    """Write each name beside its point, where it covers least of other names, points and the curve."""
    from matplotlib.transforms import Bbox

    places = axes.transData.transform([(point.x, point.y) for point in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    taken += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in (axes.transData.transform(curve) if curve else ())]
    plot = Bbox.from_extents(_LEFT, _BOTTOM, _WIDTH, _HEIGHT)

    def common(one: Any, other: Any) -> float:
        both = Bbox.intersection(one, other)
        return 0.0 if both is None else float(both.width * both.height)

    def cost(box: Any) -> float:
        outside = common(box, box) - common(box, plot)  # counts much, for there it is cut off
        return 10 * outside + sum(common(box, other) for other in taken)

    for point, (x, y) in zip(points, places, strict=True):
        width = _LETTER_WIDTH * len(point.name)
        moves: list[tuple[float, float]] = [(dx, dy) for dy in (7, -19) for dx in (-width / 2, 6, -6 - width)]
        moves += [(9, -6), (-9 - width, -6)]  # beside it last: a line may be there
        box = min((Bbox.from_bounds(x + dx, y + dy, width, 12) for dx, dy in moves), key=cost)
        taken.append(box)
        axes.annotate(point.name, (box.x0, box.y0 + 2), xycoords=_POINTS, fontsize=_SMALL)
