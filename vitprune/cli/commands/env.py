"""`vitprune env`."""

from __future__ import annotations

from vitprune.cli.options import AsJson
from vitprune.cli.output import print_json, print_line


def env(as_json: AsJson = False) -> None:
    """Versions and hardware, to paste into an issue.

    Examples:

      vitprune env

      vitprune env --json
    """
    from vitprune.measure import describe_environment

    environment = describe_environment()
    if as_json:
        print_json(environment)
        return
    for key, value in environment.items():
        print_line(f"{key}: {value}")
