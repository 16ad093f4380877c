"""`--help` for people: plain text that fits any terminal, examples before the options, a line per option."""

from __future__ import annotations

import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from vitprune.cli.terminal import stdout_console

_WIDEST = 110
"""Longer lines are hard to read."""
_NAMES_SHARE = 0.4
_MARGIN = "  "
_USAGE = "Usage: "


class Command(TyperCommand):
    """A command that explains itself in this layout."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it; `formatter` stays empty."""
        arguments = " ".join(str(param.metavar or param.name) for param in self.params if _is_argument(param))
        page = _Page()
        page.usage(" ".join(filter(None, [ctx.command_path, arguments, "[OPTIONS]"])))
        page.description(self.help or "")
        page.parameters(self, ctx)


class Group(TyperGroup):
    """The program, with its commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it; `formatter` stays empty."""
        page = _Page()
        page.usage(f"{ctx.command_path} COMMAND [ARGUMENTS] [OPTIONS]")
        page.description(self.help or "")
        names = self.list_commands(ctx)
        about = [(name, _first_paragraph(self.commands[name].help or "")) for name in names]
        page.section("Commands", about)
        page.parameters(self, ctx)


class _Page:
    """Prints the parts of a help text."""

    def __init__(self) -> None:
        self.console: Console = stdout_console()
        self.width = min(self.console.width, _WIDEST)

    def usage(self, line: str) -> None:
        """The first line."""
        first, *others = textwrap.wrap(line, self.width - len(_USAGE)) or [""]
        self._line((_USAGE, "bold"), first)
        for each in others:
            self._line(" " * len(_USAGE), each)

    def description(self, text: str) -> None:
        """Paragraphs, filled; those that are commands, one a line."""
        for paragraph in inspect.cleandoc(text).split("\n\n"):
            filled = " ".join(paragraph.split())
            if filled.startswith("vitprune "):
                for line in _continued(filled, self.width - len(_MARGIN)):
                    self._line(_MARGIN, line)
            elif filled:
                self._line()
                for line in textwrap.wrap(filled, self.width):
                    self._line((line, "bold" if filled == "Examples:" else ""))

    def parameters(self, command: TyperCommand | TyperGroup, context: Any) -> None:
        """Arguments, then options by panel."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in command.get_params(context):
            record = param.get_help_record(context)
            if record is not None:
                panel = getattr(param, "rich_help_panel", None)
                panel = panel or ("Arguments" if _is_argument(param) else "Options")
                sections.setdefault(panel, []).append((_name(record[0]), _about(record[1])))
        for title, rows in sections.items():
            self.section(title, rows)

    def section(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what they mean, side by side; under each other where a name takes too much of the line."""
        if not rows:
            return
        self._line()
        self._line((f"{title}:", "bold"))
        limit = int(_NAMES_SHARE * self.width)
        column = max((len(name) for name, _ in rows if len(name) <= limit), default=2) + 2 * len(_MARGIN)
        for name, about in rows:
            lines = textwrap.wrap(about, self.width - column, break_on_hyphens=False)
            beside = len(name) + 2 * len(_MARGIN) <= column
            padded = f"{name:<{column - len(_MARGIN)}}" if beside and lines else name
            self._line(_MARGIN, (padded, "bold cyan"), *lines[:beside])
            for line in lines[beside:]:
                self._line(" " * column, line)

    def _line(self, *parts: str | tuple[str, str]) -> None:
        # Not broken again: a word that is longer than the line stays whole.
        self.console.print(Text.assemble(*parts), soft_wrap=True)


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _first_paragraph(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


def _continued(command: str, width: int) -> Iterator[str]:
    """A command as lines that a shell takes as one."""
    line = ""
    for word in shlex.split(command, posix=False):
        if line and len(line) + len(word) + 3 > width:
            yield f"{line} \\"
            line = " " * 3
        line = f"{line} {word}" if line else word
    yield line


def _name(text: str) -> str:
    """`-j, --workers <int range>` as `-j, --workers N`."""
    text = re.sub(r" <(?:str|list\[\w+\]|path)>$", "", text)
    text = re.sub(r" <int(?: range)?>$", " N", text)
    text = re.sub(r" <float(?: range)?>$", " X", text)
    return re.sub(r" <([^<>]+)>$", r" \1", text)


def _about(text: str) -> str:
    """The help without what the name says and without brackets in brackets."""
    text = re.sub(r"\s*\[required\]$", "", text)
    text = re.sub(r";? ?(?:-?[\d.]+<=)?x[<>]=-?[\d.]+\]$|-?[\d.]+<=x<=-?[\d.]+\]$", "]", text)
    text = re.sub(r"\[default: \((.*)\)\]$", r"[default: \1]", text)
    return re.sub(r"\s*\[\]$", "", text)
