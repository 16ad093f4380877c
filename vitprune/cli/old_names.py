"""Options under the names that they had before, for one release."""

from __future__ import annotations

from collections.abc import Sequence

_RENAMED = {
    "--stages": "--prune-at",
    "--ratios": "--tokens-left",
    "--schedule": "--token-schedule",
    "--dropped": "--pruned",
    "--grad-accum": "--grad-accum-steps",
    "--track": "--report-to",
    "--warm-start-steps": "--pretraining-steps",
    "--no-pictures": "--no-images",
    "--floor": "--bound",
    "--no-floor": "--no-bound",
}
_SPLIT = {"--splits": ("--train-split", "--val-split"), "--columns": ("--input-key", "--target-key")}
"""Options that took two values with a comma between them."""


def renamed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in today's names, and a line for each old name in it."""
    found: list[str] = []
    lines: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in _RENAMED:
            new = _RENAMED[name]
            if new == "--pruned":
                value = (value if equals else next(rest, "")).replace("fold", "merge")
                equals = "="
            found.append(f"{new}{equals}{value}")
            lines.append(f"{name} is now {new}")
        elif name in _SPLIT:
            values = (value if equals else next(rest, "")).split(",")
            found += [f"{new}={each}" for new, each in zip(_SPLIT[name], values, strict=False) if each]
            lines.append(f"{name} is now {' and '.join(_SPLIT[name])}")
        else:
            found.append(argument)
    return found, lines
