"""The terminal: what it can show, how wide it is, and how much the user wants to read."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
import unicodedata
from enum import IntEnum
from typing import IO, TextIO

from rich.console import Console

from vitprune.common.formatting import plain

_PIPE_COLUMNS = 200
"""Of tables that go to a file or a pipe, which has no edge."""
_NARROWEST = 20
_FALLBACK = "vitprune"
_ASCII = {"±": "+-", "→": "->", "×": "x", "·": "*", "…": "...", "–": "-", "—": "-", "−": "-", "²": "^2", "³": "^3"}


class Level(IntEnum):
    """How much is told beside results and errors."""

    QUIET = -1
    NORMAL = 0
    VERBOSE = 1


_level = Level.NORMAL


def set_level(level: Level) -> None:
    """Set how much is told from now on."""
    global _level
    _level = level


def level() -> Level:
    """How much is told."""
    return _level


def prepare_streams() -> None:
    """No character that a console cannot show, as `±` on an old Windows console, ends a command.

    Its likeness in ASCII is shown, or a question mark.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_FALLBACK)


def showable(text: str, encoding: str) -> str:
    """The text without what would act on the terminal and what `encoding` cannot express, so that tables stay even."""
    return plain(text).encode(encoding, _FALLBACK).decode(encoding)


def stdout_console() -> Console:
    """Where results go: as wide as the terminal, or wide enough where there is none."""
    return _console(sys.stdout)


def stderr_console() -> Console:
    """Where talk, progress and warnings go."""
    return _console(sys.stderr)


def is_screen(stream: IO[str]) -> bool:
    """Whether a person reads this, and lines have an edge to be folded at."""
    return stream.isatty()


def is_live() -> bool:
    """Whether stderr can be drawn over, as progress does."""
    return is_screen(sys.stderr) and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def columns() -> int:
    """Width of the terminal, in characters."""
    return max(_NARROWEST, shutil.get_terminal_size().columns)


def _console(stream: TextIO) -> Console:
    # Rich looks at the encoding only of a stream that it is given.
    return Console(file=stream, highlight=False, width=columns() if is_screen(stream) else _PIPE_COLUMNS)


def _likeness(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_ASCII.get(each) or _unaccented(each) for each in characters), error.end


def _unaccented(character: str) -> str:
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return letters or "?"


codecs.register_error(_FALLBACK, _likeness)
