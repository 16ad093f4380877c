"""Limits that a command is given: whether they go with the task and the images, and what they are held against."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from vitprune.cli.options import option
from vitprune.cli.output import Check
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.data import Data
    from vitprune.report.schema import Report
    from vitprune.tasks import Task

of_checks = partial(option, panel="Checks (exit code 3 if missed)")
MinFidelity = Annotated[
    float | None,
    of_checks(
        "Lowest likeness to dense: same predictions or labels (%), Pearson r, or cosine, as the task has it.",
        metavar="X",
    ),
]


def check_goes_with(
    task: Task, *, min_top1: float | None = None, max_drop: float | None = None, min_fidelity: float | None = None
) -> None:
    """Make sure that stated limits are of the task and can be met.

    Raises:
        UsageError: one is of another task, or out of the figure's range.
    """
    figure = task.fidelity[0]
    instead = f"--min-fidelity limits this: {figure.text}"
    if min_top1 is not None and task.name != "classification":
        drop = f"; sparsify's --max-drop the loss of {task.change.text}" if task.change is not None else ""
        raise UsageError(f"--min-top1 is of classifiers, and the task is {task.name}", instead + drop)
    if max_drop is not None and task.change is None:
        raise UsageError(f"--max-drop has nothing to limit: {task.no_accuracy}", instead)
    if min_fidelity is None:
        return
    if figure.in_percent and 0 < min_fidelity <= 1:
        raise UsageError(f"--min-fidelity is {min_fidelity:g}: {figure.text}", f"in percent: {100 * min_fidelity:g}")
    if min_fidelity > 1 and not figure.in_percent:
        raise UsageError(f"--min-fidelity is {min_fidelity:g}, and this is at most 1: {figure.text}", "such as 0.95")


def check_measured(task: Task, data: Data, **limits: float | None) -> None:
    """Make sure, before anything runs, that limits of accuracy, such as `max_drop`, can be held against something.

    Raises:
        UsageError: the images do not have what the task's accuracy needs.
    """
    from vitprune.jobs.side_by_side import has_accuracy

    stated = ["--" + name.replace("_", "-") for name, value in limits.items() if value is not None]
    if stated and not has_accuracy(task, data):
        raise UsageError(
            f"{' and '.join(stated)} cannot be checked: {task.no_accuracy}",
            f"--min-fidelity needs none: {task.fidelity[0].text}",
        )


def fidelity_check(task: Task, delta: Mapping[str, Any] | None, lowest: float | None) -> Check:
    """--min-fidelity: the task's first figure against the dense model, and the lowest allowed."""
    figure = task.fidelity[0]
    value = None if delta is None else delta.get(figure.key)
    why = "the dense model gives the same for all images"
    return Check(f"--min-fidelity ({figure.text})", value, lowest, digits=1 + figure.digits, why=why)


def drop_check(task: Task, report: Report, max_drop: float | None) -> Check:
    """--max-drop: the change of what the task measures against labels, and the largest loss allowed."""
    from vitprune.report.tables import headline

    found = headline(report)
    if found is None:
        return Check("--max-drop", None, max_drop, why=task.no_accuracy)
    _, change = found
    option, value = f"--max-drop (as change of {change.text})", getattr(report.delta, change.key)
    if change.higher_is_better:
        return Check(option, value, None if max_drop is None else -max_drop, digits=1 + change.digits)
    return Check(option, value, max_drop, at_most=True, digits=1 + change.digits)
