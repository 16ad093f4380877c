"""Limits that a command is given, and what they go with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.tasks import TaskName

PANEL = "Checks (exit code 3 if missed)"
MinFidelity = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Lowest likeness to dense: same predictions or labels (%), Pearson r, or cosine, as the task has it.",
        rich_help_panel=PANEL,
    ),
]


def check_goes_with(task: TaskName, min_top1: float | None) -> None:
    """Make sure that a limit is of the task.

    Raises:
        UsageError: --min-top1 is given for another task than classification.
    """
    if min_top1 is not None and task != "classification":
        way = "--max-drop limits the loss of what it measures, --min-fidelity the likeness to dense"
        raise UsageError(f"--min-top1 is of classifiers, and the task is {task}", way)


def fidelity_check(
    task: TaskName, delta: Mapping[str, Any] | None, lowest: float | None
) -> tuple[str, float | None, float | None]:
    """--min-fidelity for `enforce`: the task's first figure against the dense model, and the lowest allowed.

    Raises:
        UsageError: a percentage is given as a share.
    """
    from vitprune.tasks import task_named

    figure = task_named(task).fidelity[0]
    if lowest is not None and figure.key.endswith("_pct") and 0 < lowest <= 1:
        raise UsageError(f"--min-fidelity is {lowest:g}: {figure.text}", f"it is in percent: {100 * lowest:g}")
    return f"--min-fidelity ({figure.text})", None if delta is None else delta.get(figure.key), lowest
