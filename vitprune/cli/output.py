"""What the user sees: results on stdout, talk on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitprune import processes
from vitprune.text import number, plain, signed

__all__ = [
    "number",
    "plain",
    "print_error",
    "print_json",
    "print_line",
    "print_table",
    "signed",
    "stderr_console",
    "talk",
]

_WIDE = 200


def stderr_console() -> Console:
    """Where talk, progress and warnings go."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    """Print exactly one JSON object on stdout."""
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is left-aligned, the others hold numbers."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))  # as Text, or a class called "[/b]" would be markup
    # What goes to a file or a pipe has no edge to be folded at.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print(plain(title), style="bold", markup=False, soft_wrap=True)
    console.print(table)


def print_line(text: str) -> None:
    """Print one line of a result on stdout."""
    Console(highlight=False, soft_wrap=True).print(plain(text), markup=False)


def talk(text: str) -> None:
    """Tell the user something, on stderr."""
    if processes.is_main():
        stderr_console().print(plain(text), markup=False)


def print_error(message: str, hint: str | None, exit_code: int, as_json: bool) -> None:
    """`error: ...`, a blank line, `hint: ...` on stderr; with `as_json` also one object on stdout."""
    console = stderr_console()
    who = "" if processes.world_size() == 1 else f" in process {processes.rank()}"
    console.print(f"error{who}: {plain(message)}", markup=False)
    if hint:
        console.print(f"\nhint: {plain(hint)}", markup=False)
    if as_json:
        print_json({"error": message, "hint": hint, "exit_code": exit_code})
