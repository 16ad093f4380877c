"""--max-drop, --min-top1, --min-speedup: a run as a check, for scripts and CI."""

from __future__ import annotations

import typer

from vitprune.cli.output import talk

EXIT_LIMIT_MISSED = 3


def enforce(checks: list[tuple[str, float | None, float | None]]) -> None:
    """Exit with 3 if a stated limit is missed; says which and by how much.

    Args:
        checks: (option, measured value, lowest value allowed); a limit of None was not stated.
    """
    missed = False
    for option, value, lowest in checks:
        if lowest is None:
            continue
        if value is None:
            talk(f"{option}: cannot be checked, the images have no labels", always=True)
            missed = True
        elif value < lowest:
            talk(f"{option}: missed, measured {value:.3f}, at least {lowest:g} was asked for", always=True)
            missed = True
    if missed:
        raise typer.Exit(EXIT_LIMIT_MISSED)
