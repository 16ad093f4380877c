"""What a sparse and a dense model promise together: in sentences, in a table, and as one page that runs no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitprune.common.formatting import number, plain
from vitprune.measure import remark
from vitprune.report.charts import Chart, ChartPoint, models_chart
from vitprune.report.page import groups, templates
from vitprune.report.publishable import publishable
from vitprune.report.schema import KeepMaps
from vitprune.report.tables import Row, emphasised
from vitprune.tasks import Task, task_named

_ALONE = "sparse alone"


def promise_sentences(result: Mapping[str, Any], task: Task) -> list[str]:
    """What was asked, what can be promised, and what was measured."""
    calibration, asked = result["calibration"], result["asked"]
    of = f"the {'class' if task.decides == 'class' else 'labels'} of the dense model"
    percent = 100 * asked["confidence"]
    if asked["fidelity_pct"] is not None:
        promised = f"{of} on at least {asked['fidelity_pct']:g} % of images like these"
        bound = f"on {100 * (1 - calibration['bound']):.2f} % or more"
        measured = f"on {100 * (1 - result['loss']):.2f} %"
    else:
        promised = f"a mean KL divergence from the dense model of at most {asked['max_kl']:g}, counted to 1"
        bound, measured = f"{calibration['bound']:.4f} or less", f"{result['loss']:.4f}"
    threshold = result["threshold"]
    rule = "all images go on" if threshold is None else f"images whose answer leads by less than {threshold:.3f} go on"
    chosen = (
        f"chosen: {result['label']}, by {calibration['num_choosing']} images the cheapest of "
        f"{', '.join(result['chosen_from'])}"
    )
    return [
        *([chosen] if len(result["chosen_from"]) > 1 else []),
        f"promised, with {percent:g} % confidence: {promised}; by {calibration['num_images']} images {bound}: {rule}",
        f"measured on {result['num_images']} other images: {measured}",
        f"{result['went_on_pct']:.1f} % of them went on; GMACs {result['gmacs_mean']:.3f} on average and "
        f"{result['gmacs_worst']:.3f} at worst, dense {result['gmacs_dense']:.3f}",
    ]


def promise_rows(
    result: Mapping[str, Any], task: Task, mark: Callable[[str], str] = emphasised
) -> tuple[list[str], list[Row]]:
    """Columns, and the sparse model alone and both together beside dense; `mark` as in `speed_rows`."""
    first, finest = task.fidelity[0], task.finest
    sizes = [f"batch {row['batch_size']}" for row in result["delta"]["speedup"]]
    rows = [
        [
            kind,
            number(row[first.key], first.digits),
            number(row[finest.key], finest.digits),
            number(gmacs, 3),
            *(_speedup(change, mark) for change in row["speedup"]),
        ]
        for kind, row, gmacs in (
            (_ALONE, result["fixed"], result["gmacs_sparse"]),
            ("adaptive", result["delta"], result["gmacs_mean"]),
        )
    ]
    return ["", first.text, finest.text, "GMACs", *sizes], rows


def render_promise_page(result: Mapping[str, Any], maps: KeepMaps) -> str:
    """The page as HTML: `result` as in JSON, and the images to show. Paths of this machine are left out."""
    result = publishable(dict(result))
    task = task_named(result["task"])
    total = result["num_images"]
    content = {
        "title": f"{result['model']}, {result['label']}",
        "result": result,
        "sentences": promise_sentences(result, task),
        "charts": _charts(result),
        "table_of": promise_rows(result, task),
        "costs": [
            [number(row["gmacs"], 3), str(row["num_images"]), f"{100 * row['num_images'] / total:.1f} %"]
            for row in result["costs"]
        ],
        "groups": groups(maps),
        "task": task,
    }
    return templates().get_template("promise.html.j2").render(content).lstrip()


def _fidelity_chart(
    x_label: str, points: Sequence[ChartPoint], curve: Sequence[tuple[float, float]] = (), *, percent: bool = True
) -> Chart:
    """How often images have the dense model's answer, or how far from it they are, against cost or speed."""
    what = "Same answer as dense (%)" if percent else "KL from dense (nats)"
    digits = 2 if percent else 4
    said = [f"{plain(each.name)}: {number(each.y, digits)} at {number(each.x, 3)} {x_label}" for each in points]
    if curve:
        (low, worst), (high, best) = ((number(x, 3), number(y, digits)) for x, y in (curve[0], curve[-1]))
        said.append(f"the line of all thresholds goes from {worst} at {low} to {best} at {high}")
    return models_chart(f"{what} against {x_label}", "; ".join(said), points, x_label, percent=percent, curve=curve)


def fidelity_charts(
    models: Sequence[tuple[str, float, float, float, int]],
    batch_size: int,
    curve: Sequence[tuple[float, float]],
    *,
    percent: bool = True,
) -> list[Chart]:
    """The same against cost, with what all thresholds give, and against speed, of what was timed.

    Args:
        models: of each name, GMACs, images/s, fidelity, and kind as of a `ChartPoint`.
        batch_size: at which they were timed.
        curve: GMACs and fidelity.
        percent: whether fidelity is.
    """
    by_gmacs = [ChartPoint(name, gmacs, y, kind, kind != 3) for name, gmacs, _, y, kind in models]
    by_rate = [ChartPoint(name, rate, y, kind, kind != 3) for name, _, rate, y, kind in models]
    return [
        _fidelity_chart("mean GMACs", by_gmacs, curve, percent=percent),
        _fidelity_chart(f"images/s at batch {batch_size}", by_rate, percent=percent),
    ]


def _charts(result: Mapping[str, Any]) -> list[Chart]:
    percent = result["asked"]["fidelity_pct"] is not None

    def height(loss: float) -> float:
        return 100 * (1 - loss) if percent else loss

    curve = [(point["gmacs_mean"], height(point["loss"])) for point in result["curve"]]
    size = max(row["batch_size"] for row in result["speed"])
    rates = {row["model"]: row["images_per_s"] for row in result["speed"] if row["batch_size"] == size}
    models = [
        ("dense", result["gmacs_dense"], rates["dense"], height(0.0), 0),
        (_ALONE, result["gmacs_sparse"], rates["sparse"], height(result["curve"][0]["loss"]), 1),
        ("adaptive", result["gmacs_mean"], rates["adaptive"], height(result["loss"]), 3),
    ]
    return fidelity_charts(models, size, curve, percent=percent)


def _speedup(change: Mapping[str, Any], mark: Callable[[str], str]) -> str:
    said = remark(change["slower"], change["speedup_ci95"])
    return f"{number(change['speedup'])} x" + (" " + mark(said) if said else "")
