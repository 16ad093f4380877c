"""The options of a plan, --keep, --prune-at, --tokens-left, --align, the targets and so on, and what they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitprune.cli.options import PrecisionName, parse_numbers, parse_ratios
from vitprune.cli.output import say
from vitprune.cli.progress import RunProgress
from vitprune.cli.usage_errors import as_number
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from vitprune.budget.resolve import PlanRequest
    from vitprune.budget.speed import Prediction
    from vitprune.loading.load import Loaded
    from vitprune.schedule import Sparsity
    from vitprune.training.recipe import Recipe

_PANEL = "Pruning plan"

Align = Annotated[
    int,
    typer.Option(
        min=1,
        max=4096,
        metavar="N",
        help="Make token counts, prefix tokens included, multiples of N, such as 8, at about the same MACs.",
        rich_help_panel=_PANEL,
    ),
]


FileKeep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        metavar="RATIO",
        help="At which keep ratio, of a file that was trained for a range of them.",
        show_default="the file's",
    ),
]


@dataclass(frozen=True)
class KeepOptions:
    """How many tokens are kept."""

    keep: Annotated[
        str | None,
        typer.Option(
            metavar="RATIO",
            help="How many tokens stay, as DynamicViT's keep ratio and at its cost: 0.7 is 148/100/52 of 196; or one "
            "training for a range: 0.5-0.9.",
            show_default="0.7",
        ),
    ] = None
    tokens_left: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Shares of all tokens kept after each stage, such as .8,.6,.4, instead of --keep.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None


@dataclass(frozen=True)
class StageOptions:
    """Where tokens are pruned and what happens to them; the groups below have these too."""

    prune_at: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCKS",
            help="Blocks before which tokens are pruned, such as 3,6,9.",
            show_default="by depth",
            rich_help_panel=_PANEL,
        ),
    ] = None
    token_schedule: Annotated[
        Literal["geometric", "late"] | None,
        typer.Option(
            help="How token counts fall, at equal cost: r, r^2, r^3 as in the paper, or later and more steeply.",
            show_default="late",
            rich_help_panel=_PANEL,
        ),
    ] = None
    pruned: Annotated[
        Literal["merge", "drop"] | None,
        typer.Option(
            "--pruned",
            help="Merge pruned tokens into the most similar kept ones, or drop them.",
            show_default="merge",
            rich_help_panel=_PANEL,
        ),
    ] = None

    predictor: Annotated[
        Literal["light", "paper"] | None,
        typer.Option(
            "--predictor",
            help="What scores tokens: a network of one hidden layer, or DynamicViT's.",
            show_default="light",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def request(self, **more: Any) -> PlanRequest:
        """What these options and `more`, fields of `PlanRequest`, ask for.

        Raises:
            UsageError: options that cannot be read or do not go together.
        """
        from vitprune.budget.resolve import PlanRequest

        given: dict[str, Any] = {**vars(self), **more}
        given["keep"] = _keep(given.get("keep"))
        given["prune_at"] = parse_numbers(given["prune_at"], "--prune-at")
        given["tokens_left"] = parse_ratios(given.get("tokens_left"), "--tokens-left")
        given["precision"] = given.pop("target_precision", None)
        return PlanRequest(**given)


@dataclass(frozen=True)
class PlanOptions(StageOptions, KeepOptions):
    """A plan without a target."""


@dataclass(frozen=True)
class MacsOptions(PlanOptions):
    """Or what that may cost."""

    target_gmacs: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="Find the keep ratio that costs at most this, in GMACs.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None


@dataclass(frozen=True)
class SpeedOptions(StageOptions):
    """Or how fast it is to be."""

    align: Align = 1
    target_speedup: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Find, by measuring here, the keep ratio and stages that are this many times as fast as dense.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    target_latency_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="The same for a pass of at most MS milliseconds.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None


@dataclass(frozen=True)
class AllPlanOptions(SpeedOptions, MacsOptions):
    """All that a plan can be chosen by."""

    target_batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Images per pass where a target is measured.",
            show_default="32",
            rich_help_panel=_PANEL,
        ),
    ] = None
    target_precision: Annotated[
        PrecisionName | None,
        typer.Option(
            help="Precision of a pass where a target is measured.", show_default="fp32", rich_help_panel=_PANEL
        ),
    ] = None


def _keep(text: str | float | None) -> float | list[float] | None:
    """--keep: a ratio, or a range such as 0.5-0.9.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(text, str):
        return text  # of `bench` and `sweep`, which take several
    try:
        numbers = [float(part) for part in text.split("-")]
    except ValueError:
        way = as_number("--keep", text) or "--keep 0.7, or --keep 0.5-0.9 for a range"
        raise UsageError(f"--keep is '{text}', expected a number in (0, 1], or a range", way) from None
    return numbers if len(numbers) > 1 else numbers[0]


def resolve_plan(request: PlanRequest, model: nn.Module, recipe: Recipe) -> tuple[Sparsity, Prediction | None]:
    """`vitprune.budget.resolve.resolve`, on the screen."""
    from vitprune.backbones import wrap
    from vitprune.budget.resolve import resolve

    with RunProgress() as progress:
        return resolve(request, model, recipe.plan_for(wrap(model).depth), progress)


def say_middle(sparsity: Sparsity) -> None:
    """Say of a range which ratio is shown."""
    if sparsity.keep_range is not None:
        low, high = sparsity.keep_range
        say(f"of the range {low:g} to {high:g} its middle is shown: {sparsity.label}")


def open_as_asked(loaded: Loaded, request: PlanRequest) -> None:
    """A sparse file has its plan, in which the keep ratio can be chosen if it was trained for a range.

    Raises:
        UsageError: another one is asked for, which would do nothing.
    """
    if loaded.sparse is not None and loaded.sparse.keep_range and isinstance(request.keep, float):
        loaded.open_at(request.keep)
        request = replace(request, keep=None)
    refuse_plan(loaded.spec, request)


def refuse_plan(model: str, request: PlanRequest) -> None:
    """A file that is read as it is has its plan: an option that asks for another would do nothing.

    Raises:
        UsageError: one of the options was given.
    """
    if not request.is_empty:
        raise UsageError(
            f"'{model}' has its own plan, which options cannot change",
            "leave out --keep, --prune-at, --token-schedule, --tokens-left, --pruned, --align and the targets, or "
            "start from a timm name",
        )
