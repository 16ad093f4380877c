"""From the options of `sparsify` to a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.training import Recipe


def batch_settings(batch_size: str | None, grad_accum: int | None) -> dict[str, Any]:
    """Settings of the recipe.

    Raises:
        UsageError: no number of images, or two that contradict each other.
    """
    if batch_size == "auto":
        if grad_accum is not None:
            raise UsageError("--batch-size auto finds out how many passes are needed", "leave out --grad-accum")
        return {"grad_accum": "auto"}
    if batch_size is None:
        return {"grad_accum": grad_accum}
    if not batch_size.isdecimal() or int(batch_size) < 1:
        raise UsageError(f"--batch-size is '{batch_size}', expected a whole number above 0, or auto")
    return {"batch_size": int(batch_size), "grad_accum": grad_accum}


def chosen_recipe(model: str, name: str, settings: dict[str, Any], weights: dict[str, float | None]) -> Recipe:
    """The recipe with what the options replace.

    Raises:
        UsageError: a setting out of range, or one that would do nothing.
    """
    from vitprune.training.recipe import DEMO, load_recipe

    given = {key: value for key, value in settings.items() if value is not None}
    if model == "demo" and name == "short":
        base = {key: value for key, value in DEMO.items() if key != "steps" or "epochs" not in given}
        given = {**base, **given}
    recipe = load_recipe(name, **given, weights={key: value for key, value in weights.items() if value is not None})
    if weights["ratio"] is not None and recipe.decision == "topk":
        raise UsageError(
            f"--ratio-weight does nothing in recipe '{name}': its sampled steps keep the scheduled number anyway",
            "leave it out, or use a recipe with 'decision: gumbel', such as --recipe paper",
        )
    if weights["ce"] and settings["labels"] is False:
        raise UsageError("--ce-weight needs the labels that --no-labels leaves out", "give one of them")
    return recipe
