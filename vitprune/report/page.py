"""report.html: one file that says all of a run, needs nothing from elsewhere and runs no script."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from vitprune.common.formatting import number, plain, signed
from vitprune.measure import remark
from vitprune.report.charts import Chart, ChartPoint, Series, line_chart, models_chart
from vitprune.report.drawing import mean_colours
from vitprune.report.runs import FinishedRun
from vitprune.report.schema import ImageRow, KeepMaps, Report, Step
from vitprune.report.tables import (
    Figure,
    class_rows,
    figure_rows,
    figures,
    flat,
    headline,
    likeness,
    plan_rows,
    plan_sentence,
    random_said,
    ratio_rows,
    speed_rows,
    unreadable,
    verdict,
)
from vitprune.tasks import in_words, task_named

_LOSSES = {
    "rank": "ranking of tokens against the teacher's",
    "kl": "KL divergence from the teacher's predictions",
    "error": "values against the teacher's, over their spread",
    "embedding": "1 - cosine to the teacher's vectors",
    "tokens": "features of all patches against the teacher's",
    "pooled": "what is pooled of the tokens against the teacher's",
    "token": "tokens' features against the teacher's",
    "ce": "cross-entropy with the labels",
    "ratio": "kept share against its target",
}
_LEVELS, _OPAQUE = 6, 0.85
"""Of the patches whose features differ, and how opaque the farthest are."""


def render_page(run: FinishedRun, *, images: bool = True) -> str:
    """The page as HTML, with `images` the run kept or without. Everything that comes from the run is escaped."""
    report = run.report
    fig = figures(report)
    maps = run.keep_maps
    shown = maps if images else None
    content = {
        "report": report,
        "title": f"{report.model}, {report.label}",
        "plan": plan_sentence(report),
        "verdict": verdict(report),
        "fig": fig,
        "task": task_named(report.task),
        "headline": _headline(report, fig),
        "likeness": likeness(report, fig),
        "likeness_of_random": likeness(report, fig, "random"),
        "random": _random(report, fig),
        "explanation": task_named(report.task).explanation(report.sparse.as_json()),
        "thumbnails": [] if shown is None else shown.thumbnails,
        "groups": [] if shown is None else groups(shown),
        "num_seen": 0 if shown is None else shown.num_seen,
        "speed_chart": _speed_chart(report),
        "kept_chart": _kept_chart(run.steps, report),
        "loss_charts": _loss_charts(run.steps),
        "figure_rows": figure_rows(report, fig),
        "speed_rows": speed_rows(report, fig),
        "speedup_remarks": [remark(row.slower, row.speedup_ci95) for row in report.delta.speedup],
        "ratio_rows": ratio_rows(report, fig),
        "plan_rows": plan_rows(report, fig, report.num_patches or (math.prod(maps.grid_size) if maps else None)),
        "class_rows": class_rows(report, fig),
        "faults": unreadable(report),
        "settings": flat(report.training.recipe),
        "environment": flat(report.environment),
    }
    return templates().get_template("page.html.j2").render(content).lstrip()


def templates() -> Environment:
    """The templates beside this module; what they insert is escaped, and what is missing is an error.

    What has been through no filter of ours cannot be markup.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "plain": plain}
    environment.filters["in_words"] = lambda answer: plain(in_words(answer))
    return environment


def groups(maps: KeepMaps) -> list[dict[str, Any]]:
    """The images by their group, with what covers the pruned patches."""
    found: dict[str, list[dict[str, Any]]] = {}
    for index, row in enumerate(maps.images):
        found.setdefault(row.group, []).append(_image(index, row, maps.grid_size))
    return [{"name": plain(name), "images": images} for name, images in found.items()]


def _image(index: int, row: ImageRow, grid_size: tuple[int, int]) -> dict[str, Any]:
    total, stages = math.prod(grid_size), []
    for place, kept in enumerate(row.kept):
        fills, cover = dict[str, str](), ""
        if row.owners:
            fills, edges = _merged(row, row.owners[place], grid_size)
        else:
            pruned = {*range(total)}.difference(kept)
            cover = _squares(sorted(pruned), grid_size)
            edges = _edges([int(patch in pruned) for patch in range(total)], grid_size)
        text = f"stage {place + 1}: {100 * len(kept) / total:.1f} % kept"
        stages.append({"fills": fills, "cover": cover, "edges": edges, "text": text})
    scale = f"{row.width / grid_size[1]:.4f} {row.height / grid_size[0]:.4f}"
    return {
        "id": f"image-{index}",
        "row": row,
        "stages": stages,
        "scale": scale,
        "near": _near(row),
        "heat": _heat(row, grid_size),
    }


def _heat(row: ImageRow, grid_size: tuple[int, int]) -> dict[str, Any] | None:
    """Which patches' features are far from the dense model's: by opacity, the farther the less one sees through."""
    if not row.likeness:
        return None
    farthest = 1 - min(row.likeness)
    levels: dict[int, list[int]] = {}  # from 1 to _LEVELS; patches at nought are left out
    for patch, cosine in enumerate(row.likeness):
        if cosine < 1:
            levels.setdefault(math.ceil(_LEVELS * (1 - cosine) / farthest), []).append(patch)
    paths = [(f"{_OPAQUE * level / _LEVELS:.3f}", _squares(patches, grid_size)) for level, patches in levels.items()]
    return {"paths": paths, "text": f"features: cosine {min(row.likeness):.2f} to {max(row.likeness):.2f}"}


def _near(row: ImageRow) -> list[tuple[str, list[tuple[int, bool]]]]:
    """By model the thumbnails of the images nearest to it, and whether the other model finds them too."""
    by_model = row.neighbours
    both = set.intersection(*map(set, by_model.values())) if by_model else set()
    return [(name, [(number, number in both) for number in numbers]) for name, numbers in by_model.items()]


def _squares(patches: Sequence[int], grid_size: tuple[int, int]) -> str:
    """A square over each of these patches, as an SVG path in units of patches."""
    columns = grid_size[1]
    return "".join(f"M{patch % columns} {patch // columns}h1v1h-1z" for patch in patches)


def _edges(marks: Sequence[int], grid_size: tuple[int, int]) -> str:
    """Lines between neighbouring patches of different marks, likewise."""
    rows, columns = grid_size
    places = [(row * columns + column, row, column) for row in range(rows) for column in range(columns)]
    upright = [f"M{x} {y}v1" for patch, y, x in places if x and marks[patch] != marks[patch - 1]]
    level = [f"M{x} {y}h1" for patch, y, x in places if y and marks[patch] != marks[patch - columns]]
    return "".join(upright + level)


def _merged(row: ImageRow, owners: Sequence[int], grid_size: tuple[int, int]) -> tuple[dict[str, str], str]:
    """The patches of each merged token as a path, by their mean colour, and the lines around them."""
    with Image.open(io.BytesIO(base64.b64decode(row.jpeg))) as image:
        colours, merged = mean_colours(image.convert("RGB"), owners, grid_size)
    fills: dict[str, str] = {}
    for kept in sorted(merged):
        colour = "#{:02x}{:02x}{:02x}".format(*(round(part) for part in colours[kept]))
        members = [patch for patch, owner in enumerate(owners) if owner == kept]
        fills[colour] = fills.get(colour, "") + _squares(members, grid_size)
    # Tokens of one patch share a mark: between them there is no line.
    return fills, _edges([owner if owner in merged else -1 for owner in owners], grid_size)


def _headline(report: Report, fig: Figure) -> dict[str, Any]:
    """What the first card says: accuracy and its change, or without labels how close to dense."""
    found = headline(report)
    if found is None:
        first = task_named(report.task).fidelity[0]
        sides = (("sparse", "delta"), ("random tokens", "random"))
        return {"title": first.text, "rows": [(name, fig(f"{of}.{first.key}", first.digits)) for name, of in sides]}
    figure, change = found
    low, high = (fig(f"delta.{change.key}_ci95.{end}", change.digits, True) for end in (0, 1))
    rows = [(side, fig(f"{side}.{figure.key}", figure.digits)) for side in ("dense", "sparse")]
    rows.append(("change", fig(f"delta.{change.key}", change.digits, True) + f" {change.unit}"))
    return {"title": figure.text, "rows": [*rows, ("95 %", low + " to " + high)]}


def _random(report: Report, fig: Figure) -> str | None:
    """What as many tokens at random give, beside the trained choice; None without labels."""
    found, said = headline(report), random_said(report, fig)
    if found is None or said is None:
        return None
    change, key = found[1], f"{found[1].key}_over_random"
    if getattr(report.delta, key) is None:
        return said
    said += "; with the trained choice " + fig(f"delta.{key}", change.digits, True) + f" {change.unit or change.text}"
    if getattr(report.delta, f"{key}_ci95") is None:
        return said
    low, high = (fig(f"delta.{key}_ci95.{end}", change.digits, True) for end in (0, 1))
    return said + " (95 %: " + low + " to " + high + ")"


def _speed_chart(report: Report) -> Chart | None:
    found = headline(report)
    if found is None:
        return None
    figure, change = found
    x_label = f"images/s at batch {report.sparse.speed[-1].batch_size}"
    dense, sparse, by_chance = (getattr(side, figure.key) for side in (report.dense, report.sparse, report.random))
    low, high = (dense + bound for bound in getattr(report.delta, f"{change.key}_ci95"))
    points = [
        ChartPoint(f"dense {number(dense, figure.digits)}", report.dense.speed[-1].images_per_s, dense),
        ChartPoint(
            f"sparse {number(sparse, figure.digits)}", report.sparse.speed[-1].images_per_s, sparse, 1, True, low, high
        ),
    ]
    said = [f"{point.name} at {number(point.x, 1)} images/s" for point in points]
    level = None
    if by_chance is not None:
        level = f"random tokens {number(by_chance, figure.digits)}", by_chance
        said.append(level[0])
    title = f"{figure.text[0].upper()}{figure.text[1:]} against {x_label}"
    return models_chart(title, "; ".join(said), points, x_label, level, left=0, percent=figure.in_percent)


def _kept_chart(steps: Sequence[Step], report: Report) -> Chart | None:
    lines, said = [], []
    for stage, plan in enumerate(report.stages):
        known = [step for step in steps if stage < min(len(step.kept_ratios), len(step.target_ratios))]
        if not known:
            return None
        kept = _binned([(step.step, step.kept_ratios[stage]) for step in known])
        target = _binned([(step.step, step.target_ratios[stage]) for step in known])
        lines += [Series(f"stage {stage + 1}", kept, stage % 4), Series("", target, stage % 4, dashed=True)]
        said.append(f"stage {stage + 1} ends at {kept[-1][1]:.3f} of a target of {plan.ratio:.3f}")
    title = "Share of patches kept after each stage (lines) and target (dashed)"
    return line_chart(title, "; ".join(said), lines, "step", _phases(steps), top=1.0) if lines else None


def _loss_charts(steps: Sequence[Step]) -> list[Chart]:
    found: dict[str, list[tuple[float, float]]] = {}
    for step in steps:
        for name, value in step.losses.items():
            if value is not None:
                found.setdefault(name, []).append((step.step, value))
    charts = []
    for index, (name, points) in enumerate(list(found.items())[: len(_LOSSES)]):
        title = plain(f"{name}: {_LOSSES[name]}" if name in _LOSSES else name)
        line = _binned(points)
        said = f"from {line[0][1]:.4g} at the start to {line[-1][1]:.4g} at the end, not weighted"
        charts.append(line_chart(title, said, [Series("", line, index % 4)], "step", _phases(steps)))
    return charts


def _phases(steps: Sequence[Step]) -> list[tuple[float, str]]:
    """Where each phase begins."""
    first = {step.phase: step.step for step in reversed(steps)}
    return sorted((step, plain(phase)) for phase, step in first.items())


def _binned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 150 points: means over equal numbers of neighbours."""
    size = math.ceil(len(points) / 150)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
