"""From the options of a plan, --keep, --stages, --ratios, --align, the targets and so on, to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vitprune.cli.options import DroppedName, ScheduleName, parse_numbers, parse_ratios
from vitprune.cli.progress import RunProgress
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from vitprune.budget import PlanRequest, Prediction
    from vitprune.schedule import Sparsity
    from vitprune.training import Recipe

_MAX_ALIGN = 4096


def plan_request(
    *,
    keep: float | None = None,
    stages: str | None = None,
    schedule: ScheduleName | None = None,
    ratios: str | None = None,
    dropped: DroppedName | None = None,
    align: str | None = None,
    target_gmacs: float | None = None,
    target_speedup: float | None = None,
    target_latency_ms: float | None = None,
    target_batch_size: int | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> PlanRequest:
    """What the options of these names ask for.

    Raises:
        UsageError: options that cannot be read or do not go together.
    """
    from vitprune.budget import PlanRequest

    return PlanRequest(
        keep=keep,
        stages=parse_numbers(stages, "--stages"),
        ratios=parse_ratios(ratios, "--ratios"),
        schedule=schedule,
        dropped=dropped,
        align=_parse_align(align),
        target_gmacs=target_gmacs,
        target_speedup=target_speedup,
        target_latency_ms=target_latency_ms,
        target_batch_size=target_batch_size or PlanRequest.target_batch_size,
        precision=precision,
        device=device,
    )


def plan_defaults(recipe: Recipe) -> Sparsity:
    """What applies where the options of a plan say nothing."""
    from vitprune.schedule import Sparsity

    return Sparsity(schedule=recipe.schedule, dropped=recipe.dropped)


def resolve_plan(request: PlanRequest, model: nn.Module, recipe: Recipe) -> tuple[Sparsity, Prediction | None]:
    """`vitprune.budget.resolve`, on the screen."""
    from vitprune.budget import resolve

    with RunProgress() as progress:
        return resolve(request, model, plan_defaults(recipe), progress)


def refuse_plan(model: str, request: PlanRequest) -> None:
    """A sparse file has its plan: an option that asks for another would do nothing.

    Raises:
        UsageError: one of the options was given.
    """
    if not request.is_empty:
        raise UsageError(
            f"'{model}' has its own plan, which options cannot change",
            "leave out --keep, --stages, --schedule, --ratios, --dropped, --align and the targets, or start from a "
            "timm name",
        )


def _parse_align(text: str | None) -> int | Literal["auto"]:
    """`8` to 8.

    Raises:
        UsageError: neither a number in range nor auto.
    """
    if text is None:
        return 1
    if text == "auto":
        return "auto"
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_ALIGN:
        raise UsageError(f"--align is '{text}', expected a whole number from 1 to {_MAX_ALIGN}, or auto", "--align 8")
    return int(text)
