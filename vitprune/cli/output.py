"""What the user sees: results on stdout, messages on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import typer
from rich import box
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from vitprune.common import distributed
from vitprune.common.formatting import number as number
from vitprune.common.formatting import plain
from vitprune.common.formatting import signed as signed
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.common.stopping import deferred
from vitprune.errors import OutputError

_EXIT_LIMIT_MISSED = 3
_PIPE_COLUMNS = 200
"""Width of tables that go to a file or a pipe, which has no edge."""
_CLEAR_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
_quiet = _json_printed = False


class _Stream(io.TextIOBase):
    """stdout or stderr, of which a write may fail: its reader has left, its disk is full.

    What is said on stderr is lost then, and the work goes on; a result that cannot be told is an error.
    """

    def __init__(self, stream: TextIO, must_arrive: bool) -> None:
        self._stream = stream
        self._must_arrive = must_arrive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            # What is left in buffers would fail again when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not self._must_arrive:
                return
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(f"cannot write to stdout: {error.strerror}") from error

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def open_streams() -> None:
    """Make stdout and stderr of this process such that writing to them can be relied on.

    Closed ones (`>&-`) lead nowhere instead of into the next file that is opened.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
            os.set_blocking(descriptor, True)  # else a full pipe is an error
        except OSError:
            while os.open(os.devnull, os.O_RDWR) < descriptor:
                pass
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  while it runs
        setattr(sys, name, _Stream(stream, must_arrive=name == "stdout"))


def prepare(*, quiet: bool) -> None:
    """Set up the streams for one command, which with `quiet` shows results and errors only."""
    global _quiet, _json_printed
    _quiet, _json_printed = quiet, False
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an old console cannot show every character
    if quiet:  # read when the Hub's packages are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def is_quiet() -> bool:
    """Whether this process shows no messages: by -q, or because another process of the run does."""
    return _quiet or not distributed.is_main()


def shows_progress() -> bool:
    """Whether stderr is a terminal that can be drawn over."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def stderr_console() -> Console:
    """Where messages, progress and errors go."""
    return _console(sys.stderr)


def print_json(result: dict[str, Any]) -> None:
    """Print exactly one JSON object on stdout, with `schema_version` in front; after it nothing, whatever happens."""
    global _json_printed
    text = json.dumps({"schema_version": SCHEMA_VERSION} | result, indent=2) + "\n"
    with deferred():
        if not _json_printed:
            _json_printed = True
            sys.stdout.write(text)
            sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is left-aligned, the others hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(Text(plain(column)), justify=justify, overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))  # as Text: "[/b]" in a name is no markup
    console = _console(sys.stdout)
    console.print(Text(plain(title), style="bold"), soft_wrap=True)
    console.print(table)
    console.print()


def print_line(text: str) -> None:
    """Print one line of a result on stdout."""
    _console(sys.stdout).print(Text(plain(text)), soft_wrap=True)


def say(text: str, *, always: bool = False) -> None:
    """Print a message on stderr, unless -q forbids it; `always`: also then."""
    if distributed.is_main() and (always or not _quiet):
        console = stderr_console()
        if shows_progress():
            console.control(_CLEAR_LINE)
        console.print(Text(plain(text)), soft_wrap=True)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Name on a terminal what the user waits for, on a line that is cleared when it is done."""
    shown = shows_progress() and not is_quiet()
    if shown:
        stderr_console().print(Text(f"{plain(what)} ..."), end="", no_wrap=True)
    try:
        yield
    finally:
        if shown:
            stderr_console().control(_CLEAR_LINE)


def print_error(
    message: str, hint: str | None, exit_code: int, as_json: bool, saved: dict[str, Any] | None = None
) -> None:
    """`error: ...`, a blank line, `hint: ...` on stderr; with `as_json` also one object on stdout.

    That has `saved`, too, where a run that did not end well has written something.
    """
    console = stderr_console()
    who = "" if distributed.world_size() == 1 else f" in process {distributed.rank()}"
    console.print(Text.assemble((f"error{who}:", "bold red"), f" {plain(message)}"), soft_wrap=True)
    if hint:
        console.print()
        console.print(Text.assemble(("hint:", "bold cyan"), f" {plain(hint)}"), soft_wrap=True)
    if as_json:
        told = {"error": message, "hint": hint, "exit_code": exit_code}
        print_json(told if saved is None else told | {"saved": saved})


class Check(NamedTuple):
    """The limit that an option states, the lowest value allowed or `at_most` the highest, and what is held against it.

    A value of None was not measured, and `why` says why; a limit of None was not stated.
    """

    option: str
    value: float | None
    limit: float | None
    at_most: bool = False
    digits: int = 3
    why: str = "the images have no labels"


def enforce(checks: Sequence[Check]) -> None:
    """Exit with 3 if a stated limit is missed (--max-drop, --min-top1, --min-speedup); says which and by how much."""
    missed = False
    for each in checks:
        if each.limit is None:
            continue
        if each.value is None:
            say(f"{each.option}: cannot be checked, {each.why}", always=True)
            missed = True
        elif not (each.value <= each.limit if each.at_most else each.value >= each.limit):  # so NaN is no success
            asked = f"at {'most' if each.at_most else 'least'} {each.limit:g} was asked for"
            say(f"{each.option}: missed, measured {each.value:.{each.digits}f}, {asked}", always=True)
            missed = True
    if missed:
        raise typer.Exit(_EXIT_LIMIT_MISSED)


def _console(stream: TextIO) -> Console:
    # Rich looks at the encoding only of a stream that it is given.
    return Console(file=stream, highlight=False, width=None if stream.isatty() else _PIPE_COLUMNS)
