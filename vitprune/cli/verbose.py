"""What -v tells beside results: the plan, the settings that apply, the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vitprune.cli.output import detail
from vitprune.cli.terminal import Level, level

if TYPE_CHECKING:
    from vitprune.loading.load import Loaded
    from vitprune.schedule import Schedule


def explain_plan(schedule: Schedule, dropped: str) -> None:
    """Tokens per stage."""
    if not schedule.stages:
        detail("plan: all tokens stay")
        return
    left = ", ".join(f"{stage.num_tokens} from block {stage.block} on" for stage in schedule.stages)
    fate = "folded into those that stay" if dropped == "fold" else "gone"
    detail(f"plan: of {schedule.num_patches} patch tokens are left {left}; the others are {fate}")


def explain_model(loaded: Loaded) -> None:
    """Where the weights come from, and how images are prepared for them."""
    from vitprune.backbones import input_size

    origin = {key: value for key, value in loaded.origin.items() if value}
    explain_settings("model", {"name": loaded.name, **origin, "input": "x".join(map(str, input_size(loaded.model)))})


def explain_settings(title: str, settings: Mapping[str, Any]) -> None:
    """`title: name value, ...`; what is None is left out, and what is in parts is told part by part."""
    flat = dict(_flat(settings))
    detail(f"{title}: " + ", ".join(f"{key} {value}" for key, value in flat.items() if value is not None))


def explain_environment() -> None:
    """The block of `vitprune env`, on a few lines."""
    if level() >= Level.VERBOSE:
        from vitprune.measure import describe_environment

        known = {key: value for key, value in describe_environment().items() if value not in (None, [], False)}
        explain_settings("environment", known)


def _flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            items += _flat(value, f"{before}{key}.")
        else:
            items.append((f"{before}{key}", value))
    return items
