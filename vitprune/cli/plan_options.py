"""The options of a plan, --keep, --prune-at, --tokens-left, --align, the targets and so on, and what they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from vitprune.cli.options import PrecisionName, option, parse_numbers, parse_ratios
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

_of_plan = partial(option, panel="Pruning plan")

Align = Annotated[
    int,
    _of_plan(
        "Make token counts, prefix tokens included, multiples of N, such as 8, at about the same MACs.",
        min=1,
        max=4096,
        metavar="N",
    ),
]
FileKeep = Annotated[
    float | None,
    option(
        "At which keep ratio, of a file that was trained for a range of them.",
        "--keep",
        metavar="RATIO",
        shown="the file's",
    ),
]


@dataclass(frozen=True)
class KeepOptions:
    """How many tokens are kept."""

    keep: Annotated[
        str | None,
        option(
            "How many tokens stay, as DynamicViT's keep ratio and at its cost: 0.7 is 148/100/52 of 196; or one "
            "training for a range: 0.5-0.9.",
            metavar="RATIO",
            shown="0.7",
        ),
    ] = None
    tokens_left: Annotated[
        str | None,
        _of_plan(
            "Shares of all tokens kept after each stage, such as .8,.6,.4, instead of --keep.",
            metavar="SHARES",
            shown=False,
        ),
    ] = None


@dataclass(frozen=True)
class StageOptions:
    """Where tokens are pruned and what happens to them; the groups below have these too."""

    prune_at: Annotated[
        str | None,
        _of_plan("Blocks before which tokens are pruned, such as 3,6,9.", metavar="BLOCKS", shown="by depth"),
    ] = None
    token_schedule: Annotated[
        Literal["geometric", "late"] | None,
        _of_plan(
            "How token counts fall, at equal cost: r, r^2, r^3 as in the paper, or later and more steeply.",
            shown="late",
        ),
    ] = None
    pruned: Annotated[
        Literal["merge", "drop"] | None,
        _of_plan("Merge pruned tokens into the most similar kept ones, or drop them.", shown="merge"),
    ] = None
    predictor: Annotated[
        Literal["light", "paper"] | None,
        _of_plan("What scores tokens: a network of one hidden layer, or DynamicViT's.", shown="light"),
    ] = None

    def request(self, **more: Any) -> PlanRequest:
        """What these options and `more`, fields of `PlanRequest`, ask for."""
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
        float | None, _of_plan("Find the keep ratio that costs at most this, in GMACs.", metavar="G", shown=False)
    ] = None


@dataclass(frozen=True)
class SpeedOptions(StageOptions):
    """Or how fast it is to be."""

    align: Align = 1
    target_speedup: Annotated[
        float | None,
        _of_plan(
            "Find, by measuring here, the keep ratio and stages that are this many times as fast as dense.",
            metavar="X",
            shown=False,
        ),
    ] = None
    target_latency_ms: Annotated[
        float | None, _of_plan("The same for a pass of at most MS milliseconds.", metavar="MS", shown=False)
    ] = None


@dataclass(frozen=True)
class AllPlanOptions(SpeedOptions, MacsOptions):
    """All that a plan can be chosen by."""

    target_batch_size: Annotated[
        int | None, _of_plan("Images per pass where a target is measured.", min=1, metavar="N", shown="32")
    ] = None
    target_precision: Annotated[
        PrecisionName | None, _of_plan("Precision of a pass where a target is measured.", shown="fp32")
    ] = None


def _keep(text: str | float | None) -> float | list[float] | None:
    """--keep: a ratio, or a range such as 0.5-0.9."""
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
    """A sparse file has its plan, in which the keep ratio can be chosen if it was trained for a range."""
    if loaded.sparse is not None and loaded.sparse.keep_range and isinstance(request.keep, float):
        loaded.open_at(request.keep)
        request = replace(request, keep=None)
    refuse_plan(loaded.spec, request)


def refuse_plan(model: str, request: PlanRequest) -> None:
    """A file that is read as it is has its plan: an option that asks for another would do nothing, and is refused."""
    if not request.is_empty:
        raise UsageError(
            f"'{model}' has its own plan, which options cannot change",
            "leave out --keep, --prune-at, --token-schedule, --tokens-left, --pruned, --align and the targets, or "
            "start from a timm name",
        )
