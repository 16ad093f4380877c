"""From the options --keep, --stages, --schedule, --ratios, --dropped and --target-gmacs to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitprune.cli.options import DroppedName, ScheduleName, parse_numbers, parse_ratios
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from vitprune.model import Sparsity
    from vitprune.training import Recipe

DEFAULT_KEEP = 0.7


def parse_sparsity(
    recipe: Recipe,
    keep: float | None,
    stages: str | None,
    schedule: ScheduleName | None,
    ratios: str | None,
    dropped: DroppedName | None,
    target_gmacs: float | None,
) -> Sparsity:
    """What the options ask for; what they leave open is the recipe's. --target-gmacs is still to be looked for.

    Raises:
        UsageError: options that cannot be read or do not go together.
    """
    from vitprune.model import Sparsity
    from vitprune.schedule import check_keep

    given = {"--keep": keep, "--target-gmacs": target_gmacs, "--ratios": ratios}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} say the same thing in two ways", "give one of them")
    if ratios is not None and schedule is not None:
        raise UsageError("--ratios are a schedule of their own; --schedule goes with --keep or --target-gmacs")
    if keep is not None:
        check_keep(keep)
    free = parse_ratios(ratios, "--ratios")
    return Sparsity(
        keep=DEFAULT_KEEP if keep is None else keep,
        stages=parse_numbers(stages, "--stages"),
        schedule=recipe.schedule if schedule is None else schedule.value,
        ratios=None if free is None else tuple(free),
        dropped=recipe.dropped if dropped is None else dropped.value,
    )


def refuse_plan(model: str, *options: object) -> None:
    """A sparse file has its plan: an option that asks for another would do nothing.

    Raises:
        UsageError: one of the options was given.
    """
    if any(option is not None for option in options):
        raise UsageError(
            f"'{model}' has its own plan, which options cannot change",
            "leave out --keep, --stages, --schedule, --ratios, --dropped and --target-gmacs, or start from a timm name",
        )


def resolve_sparsity(model: nn.Module, sparsity: Sparsity, target_gmacs: float | None) -> Sparsity:
    """Find the keep ratio for --target-gmacs, and make sure that the plan fits the model.

    Raises:
        UsageError: it does not, or the budget cannot be met.
    """
    from vitprune.backbones import wrap
    from vitprune.cli.output import talk
    from vitprune.measure import keep_for_gmacs

    if target_gmacs is not None:
        sparsity = keep_for_gmacs(model, sparsity, target_gmacs)
        talk(f"--target-gmacs {target_gmacs:g}: keep ratio {sparsity.keep:g}")
    sparsity.plan(wrap(model))
    return sparsity
