"""What the user sees: results on stdout, talk on stderr."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from vitprune.cli import clock
from vitprune.cli.table import draw
from vitprune.cli.terminal import Level, is_live, is_screen, level, showable, stderr_console, stdout_console
from vitprune.common import distributed
from vitprune.common.formatting import number, plain, signed

__all__ = [
    "detail",
    "number",
    "plain",
    "print_error",
    "print_json",
    "print_line",
    "print_table",
    "signed",
    "stderr_console",
    "talk",
    "waiting",
]

_CLEAR_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
_waiting_for = ""


def print_json(result: dict[str, Any]) -> None:
    """Print exactly one JSON object on stdout."""
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is left-aligned, the others hold numbers."""
    console = stdout_console()
    _print(console, title, style="bold")
    draw(console, columns, rows)
    console.print()


def print_line(text: str) -> None:
    """Print one line of a result on stdout."""
    _print(stdout_console(), text)


def talk(text: str, *, always: bool = False) -> None:
    """Tell the user something, on stderr, unless -q forbids it; `always`: also then."""
    if distributed.is_main() and (always or level() > Level.QUIET):
        _erase()
        _print(stderr_console(), text)
        _show()


def detail(text: str) -> None:
    """Tell those who asked for it with -v, on stderr."""
    if level() >= Level.VERBOSE:
        talk(text)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Name on a terminal what keeps the user waiting, on a line that goes when it is done, and time it for -v."""
    global _waiting_for
    clock.begin(what)
    if is_live() and distributed.is_main() and level() > Level.QUIET:
        _waiting_for = showable(what, stderr_console().encoding)
        _show()
    try:
        yield
    finally:
        _erase()
        _waiting_for = ""


def print_error(message: str, hint: str | None, exit_code: int, as_json: bool) -> None:
    """`error: ...`, a blank line, `hint: ...` on stderr; with `as_json` also one object on stdout."""
    console = stderr_console()
    who = "" if distributed.world_size() == 1 else f" in process {distributed.rank()}"
    _print(console, f"error{who}: {message}", label="bold red")
    if hint:
        console.print()
        _print(console, f"hint: {hint}", label="bold cyan")
    if as_json:
        print_json({"error": message, "hint": hint, "exit_code": exit_code})


def _print(console: Console, text: str, *, style: str = "", label: str = "") -> None:
    """Print text that is no markup, broken between words on a terminal and nowhere else; `label`: style up to the `:`.

    A word longer than the line, such as a path, stays whole, so that it can be copied.
    """
    shown = showable(text, console.encoding)
    if is_screen(console.file):
        shown = "\n".join(_broken(line, console.width) for line in shown.split("\n"))
    styled = Text(shown, style=style)
    if label:
        styled.stylize(label, 0, styled.plain.index(":") + 1)
    console.print(styled, soft_wrap=True)  # as it is


def _broken(line: str, width: int) -> str:
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def _show() -> None:
    if _waiting_for:
        sys.stderr.write(f"{_waiting_for[: stderr_console().width - 5]} ...")
        sys.stderr.flush()


def _erase() -> None:
    if _waiting_for:
        stderr_console().control(_CLEAR_LINE)
