"""A report in rows of tables and in one sentence, which never flatters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vitprune.common.formatting import flattened, number, plain, signed
from vitprune.data.classes import readable_names
from vitprune.measure import remark, unclear
from vitprune.report.schema import ClassRow, Report, SpeedUp
from vitprune.schedule import keep_in_words
from vitprune.tasks import TASKS, Change, task_named, zero_shot_task
from vitprune.tasks import Figure as TaskFigure

Figure = Callable[..., str]
Row = list[Any]

_MOVED = 8
_ZERO_SHOT = zero_shot_task()
_CHANGES: dict[str, Change] = {
    task.accuracy[0].key: task.change for task in (*TASKS.values(), _ZERO_SHOT) if task.change is not None
}
"""By the key of the figure that changes."""


def emphasised(text: str) -> Markup:
    """A remark on a speed-up, as HTML."""
    return Markup('<strong class="slower">{}</strong>').format(text)


def figures(report: Report) -> Figure:
    """A function that shows a figure of report.json by its place in it: the value as it is, the text rounded."""
    rounded = plain_figures(report)

    def figure(place: str, digits: int = 2, sign: bool = False) -> Markup:
        value = _value(report, place)
        if value is None:
            return Markup('<span title="not measured">-</span>')
        html = Markup('<data data-key="{}" value="{}">{}</data>')
        return html.format(place, json.dumps(value), rounded(place, digits, sign))

    return figure


def plain_figures(report: Report) -> Figure:
    """As `figures`, the rounded text alone."""
    return lambda place, digits=2, sign=False: (signed if sign else number)(_value(report, place), digits)


def plan_sentence(report: Report) -> str | None:
    """What the keep ratio means; None where the shares were chosen freely, or nothing is pruned."""
    if report.keep is None or report.num_patches is None or not report.stages:
        return None
    num_tokens = [stage.num_tokens for stage in report.stages]
    return keep_in_words(report.keep, report.schedule, report.num_patches, num_tokens)


def figure_rows(report: Report, fig: Figure, *, fidelity: bool = True) -> list[Row]:
    """Accuracy and cost of dense and sparse, and the change; with `fidelity` how close sparse is to dense."""
    task, rows = task_named(report.task), list[Row]()
    for each in _accuracy_figures(report):
        if getattr(report.dense, each.key) is None and getattr(report.sparse, each.key) is None:
            continue
        change = _CHANGES.get(each.key)
        cells = [fig(f"{side}.{each.key}", each.digits) for side in ("dense", "sparse")]
        rows.append([each.text, *cells, fig(f"delta.{change.key}", change.digits, True) if change else ""])
    if report.rare is not None and report.rare.top1_points is not None:
        cells = [fig(f"rare.{side}_top1_pct") for side in ("dense", "sparse")]
        rows.append(["top-1 (%) of rare classes", *cells, fig("rare.top1_points", 2, True)])
    rows += [[each.text, "", fig(f"delta.{each.key}", each.digits), ""] for each in task.fidelity if fidelity]
    return [
        *rows,
        ["GMACs", fig("dense.gmacs", 3), fig("sparse.gmacs", 3), fig("delta.gmacs_pct", 1, True) + " %"],
        ["parameters (M)", fig("dense.params_m", 3), fig("sparse.params_m", 3), ""],
    ]


def speed_rows(report: Report, fig: Figure, mark: Callable[[str], str] = emphasised) -> list[Row]:
    """A row per batch size; `mark` formats what must not be left out of a speed-up."""
    rows: list[Row] = []
    for index, change in enumerate(report.delta.speedup):
        cells: Row = [str(change.batch_size)]
        for key, digits in (("images_per_s", 1), ("latency_ms_p50", 2)):
            cells += [fig(f"{side}.speed.{index}.{key}", digits) for side in ("dense", "sparse")]
        said = remark(change.slower, change.speedup_ci95)
        rows.append([*cells, fig(f"delta.speedup.{index}.speedup") + " x" + (" " + mark(said) if said else "")])
    return rows


def ratio_rows(report: Report, fig: Figure, mark: Callable[[str], str] = emphasised) -> tuple[list[str], list[Row]]:
    """Columns and, where one training was for a range, a row per keep ratio that was measured, the lowest first."""
    found, batch = headline(report), len(report.delta.speedup) - 1
    task = task_named(report.task)
    columns = ["keep", *([found[1].text] if found else []), *(each.text for each in task.fidelity[:2])]
    columns += ["GMACs", f"images/s at batch {report.delta.speedup[batch].batch_size}", "speed-up"]
    places = [(each.keep, f"keeps.{index}.side", f"keeps.{index}.delta") for index, each in enumerate(report.keeps)]
    rows: list[Row] = []
    for keep, side, delta in sorted([*places, (report.keep or 0, "sparse", "delta")]) if places else []:
        speedup = _value(report, delta).speedup[batch]
        said = remark(speedup.slower, speedup.speedup_ci95)
        rows.append(
            [
                f"{keep:g}",
                *([fig(f"{delta}.{found[1].key}", found[1].digits, True)] if found else []),
                *(fig(f"{delta}.{each.key}", each.digits) for each in task.fidelity[:2]),
                fig(f"{side}.gmacs", 3),
                fig(f"{side}.speed.{batch}.images_per_s", 1),
                fig(f"{delta}.speedup.{batch}.speedup") + " x" + (" " + mark(said) if said else ""),
            ]
        )
    return columns, rows


def headline(report: Report) -> tuple[TaskFigure, Change] | None:
    """The figure against labels that a report is about, and its change; None where it has none."""
    for each in _accuracy_figures(report):
        change = _CHANGES.get(each.key)
        if change and None not in (getattr(report.delta, change.key, None), getattr(report.dense, each.key)):
            return each, change
    return None


def random_said(report: Report, fig: Figure) -> Markup | None:
    """What as many tokens at random give; None without labels."""
    found = headline(report)
    if found is None or getattr(report.random, found[0].key) is None:
        return None
    return Markup(found[0].said("{}")).format(fig(f"random.{found[0].key}", found[0].digits))


def likeness(report: Report, fig: Figure, of: str = "delta") -> str:
    """How close the sparse model, or that of the random baseline, is to the dense one, in words."""
    task = task_named(report.task)
    shown = {each.key: fig(f"{of}.{each.key}", each.digits) for each in task.fidelity}
    return Markup(task.said).format(images=f"{report.sparse.num_images} images", **shown)


def _accuracy_figures(report: Report) -> list[TaskFigure]:
    """Of the task, with zero-shot ones first where they were measured."""
    zero_shot = report.task == "embedding" and report.dense.zero_shot_top1_pct is not None
    return [*(_ZERO_SHOT.accuracy if zero_shot else task_named(report.task).accuracy)]


def plan_rows(report: Report, fig: Figure, total: int | None) -> list[Row]:
    """A row per stage; `total` patches of an image, None where that is not known."""
    rows: list[Row] = []
    for index, stage in enumerate(report.stages):
        left: Any = fig(f"stages.{index}.num_tokens", 0)
        share = stage.num_tokens / total if total else stage.ratio
        left = left + f" of {total}" if total else left
        rows.append([str(index + 1), str(stage.block), left, f"{100 * share:.1f} %"])
    return rows


def class_rows(report: Report, fig: Figure) -> list[Row]:
    """The classes whose accuracy moved most, worst first."""
    places = {row.index: place for place, row in enumerate(report.classes)}
    moved = sorted((row for row in report.classes if _change(row)), key=lambda row: (_change(row), row.index))
    worse = [row for row in moved if _change(row) < 0][:_MOVED]
    better = [row for row in moved if _change(row) > 0][-_MOVED:]
    names = readable_names({row.index: row.name for row in report.classes if row.name}, num_classes=1000)
    rows: list[Row] = []
    for row in worse + better:
        place = f"classes.{places[row.index]}"
        dense, sparse = (
            str(round(share * row.num_images / 100)) for share in (row.dense_top1_pct, row.sparse_top1_pct)
        )
        shares = fig(f"{place}.dense_top1_pct", 1), fig(f"{place}.sparse_top1_pct", 1)
        name = plain(names.get(row.index) or f"class {row.index}")
        rows.append([name, str(row.num_images), dense, sparse, *shares, f"{_change(row):+.1f}"])
    return rows


def unreadable(report: Report) -> list[tuple[int, list[str], str]]:
    """How many images were left out, the first of them by name, and where; nothing where none were."""
    training, data = report.training, report.data
    found = [
        (training.num_unreadable, training.unreadable[:3], "in training (repeats counted)"),
        (data.num_unreadable_val, data.unreadable_val[:3], "in the evaluation"),
    ]
    return [each for each in found if each[0]]


def flat(settings: Mapping[str, Any]) -> list[Row]:
    """Settings within settings as one list of names and texts."""
    return [[plain(key), plain(_text(value))] for key, value in flattened(settings).items()]


def verdict(report: Report) -> str:
    """What was lost and what was gained."""
    return f"{_speed_said(report)}; {_accuracy_said(report)}{_rare_said(report)}{_beside_random(report)}."


def _speed_said(report: Report) -> str:
    rows = report.delta.speedup
    largest = rows[-1]
    change = report.delta.gmacs_pct
    cost = f"{number(abs(change), 1)} % {'fewer' if change <= 0 else 'more'} GMACs"
    others = [f"{number(row.speedup)} x at batch {row.batch_size}{_remark(row)}" for row in rows[:-1]]
    also = f" ({'; '.join(others)})" if others else ""
    if largest.slower:
        start = f"With {cost} it is slower than the dense model at batch {largest.batch_size}"
        return f"{start}: {number(largest.speedup)} x{also}"
    if unclear(largest.speedup_ci95):
        start = f"With {cost} no difference of speed was measured at batch {largest.batch_size}"
        return f"{start}: {number(largest.speedup)} x, within noise{also}"
    return (
        f"With {cost} it is {number(largest.speedup)} x as fast as the dense model at batch {largest.batch_size}{also}"
    )


def _remark(row: SpeedUp) -> str:
    said = remark(row.slower, row.speedup_ci95)
    return f", {said.lower()}" if said else ""


def _beside_random(report: Report) -> str:
    """Said at once where training has not paid."""
    found = headline(report)
    if found is None:
        first = task_named(report.task).fidelity[0]
        ours, by_chance = (getattr(of, first.key) for of in (report.delta, report.random))
        closer = None not in (ours, by_chance) and by_chance > ours
        return "; as many tokens at random, untrained, come closer" if closer else ""
    _, change = found
    points = getattr(report.delta, f"{change.key}_over_random")
    if points is None or (points >= 0) == change.higher_is_better or points == 0:
        return ""
    by = f"{number(abs(points), change.digits)} {change.unit or f'of {change.text}'}"
    return f"; as many tokens at random, untrained, are {by} better"


def _accuracy_said(report: Report) -> str:
    found = headline(report)
    if found is None:
        task = task_named(report.task)
        without = " without labels" if task.accuracy and not task.gallery else ""
        return likeness(report, plain_figures(report)) + without
    _, change = found
    value, (low, high) = getattr(report.delta, change.key), getattr(report.delta, f"{change.key}_ci95")
    unit = f" {change.unit}" if change.unit else ""
    said = f"{change.text} changes by {signed(value, change.digits)}{unit} on {report.sparse.num_images} images"
    said += f" (95 %: {signed(low, change.digits)} to {signed(high, change.digits)})"
    if low <= 0 <= high:
        return f"{said}, neither a loss nor a gain beyond chance"
    return f"{said}, a gain" if (low > 0) == change.higher_is_better else f"{said}, a loss"


def _rare_said(report: Report) -> str:
    """What the mean hides where some classes have many training images and others hardly any."""
    rare = report.rare
    if rare is None:
        return ""
    by = "" if rare.counted_by == "labels" else ", by the dense model's predictions"
    where = f"on the {rare.num_images} images of classes with fewer than {rare.fewer_than} training images{by}"
    if rare.top1_points is None or rare.top1_points_ci95 is None:
        return f"; {where} on {number(rare.agreement_pct, 1)} %"
    low, high = rare.top1_points_ci95
    return f"; {where} by {signed(rare.top1_points)} points (95 %: {signed(low)} to {signed(high)})"


def _value(report: Report, place: str) -> Any:
    value: Any = report
    for part in place.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


def _change(row: ClassRow) -> float:
    return row.sparse_top1_pct - row.dense_top1_pct


def _text(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(_text(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
