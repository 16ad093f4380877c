"""`vitprune models`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vitprune.cli.options import AsJson
from vitprune.cli.output import number, print_json, print_line, print_table, waiting
from vitprune.cli.plan_options import PlanOptions, say_middle
from vitprune.cli.progress import RunProgress


def models(
    plan: PlanOptions,
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="PATTERN", help="A part of the name, or with wildcards: 'deit*'.", show_default="all"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is supported: timm's architectures, what they are for, tokens and cost, dense and sparse. Needs no weights.

    Examples:

      vitprune models deit

      vitprune models 'vit_*dinov3*' --keep 0.5
    """
    from vitprune.loading.architectures import count_weights, describe_all, match_names

    asked = None
    if plan != PlanOptions():
        with waiting("loading PyTorch"):
            from vitprune.training.recipe import load_recipe
        asked = plan.request().sparsity(load_recipe("short").plan_defaults)
        say_middle(asked)
    names = match_names(pattern)
    with RunProgress() as progress:
        entries = describe_all(names, asked, progress)
    supported = [entry for entry in entries if entry["reason"] is None]
    weights = count_weights(entries)
    if as_json:
        counts: dict[str, Any] = {"num_supported": len(supported), "num_refused": len(entries) - len(supported)}
        print_json(counts | {"weights": weights, "rows": supported})
        return
    names_of_families = sorted({entry["family"] for entry in supported})
    families = {family: [entry for entry in supported if entry["family"] == family] for family in names_of_families}
    for family, members in families.items():
        _print(family, members, f"keep {members[0]['keep']:g}" if asked is None else asked.label)
    print_line(f"{len(supported)} of {len(entries)} architectures can be sparsified")
    if families:
        by_task = ", ".join(f"{count} {task}" for task, count in weights["by_task"].items())
        print_line(f"pretrained weights of these by task: {by_task or 'none'}")
        print_line("shown: " + ", ".join(f"{family} {len(members)}" for family, members in families.items()))
    else:
        print_line(f"{entries[0]['model']}: {entries[0]['reason']}")


def _print(family: str, entries: list[dict[str, Any]], plan: str) -> None:
    rows = [
        [
            entry["model"],
            entry["task"] or "?",
            f"{entry['num_prefix_tokens']}+{entry['num_patches']}",
            number(entry["dense"]["params_m"], 1),
            number(entry["dense"]["gmacs"], 2),
            number(entry["sparse"]["gmacs"], 2),
        ]
        for entry in entries
    ]
    print_table(family, ["name", "task", "tokens", "params (M)", "GMACs", plan], rows)
