"""Tables as wide as the terminal allows, and lists where it does not."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitprune.cli.terminal import showable

_ASCII_HEAD = box.Box(str(box.SIMPLE_HEAD).replace("\N{BOX DRAWINGS LIGHT HORIZONTAL}", "-"), ascii=True)
_BETWEEN = 2
"""Characters between two columns."""
_NARROWEST = 10
"""Characters that the first column, of names, may be folded to; numbers are never folded."""


def draw(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: names in the first column, numbers in the others.

    Where it does not fit, names are folded; where that does not help, each row becomes a short list.
    """
    head = [showable(column, console.encoding) for column in columns]
    cells = [[showable(cell, console.encoding) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(head, *cells, strict=True)]
    room = console.width - sum(widths[1:]) - _BETWEEN * (len(widths) - 1)
    if room >= min(widths[0], _NARROWEST):
        _draw_table(console, head, cells, min(widths[0], room))
    else:
        _draw_list(console, head, cells)


def _draw_table(console: Console, head: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> None:
    head_rule = _ASCII_HEAD if console.options.ascii_only else box.SIMPLE_HEAD
    table = Table(box=head_rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(head):
        first = index == 0
        table.add_column(
            Text(column), justify="left" if first else "right", overflow="fold", width=width if first else None
        )
    for row in cells:
        table.add_row(*map(Text, row))  # as Text, or a class called "[/b]" would be markup
    console.print(table)


def _draw_list(console: Console, head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A line with the row's name, then `column  value` for all that is there."""
    label = max(map(cell_len, head[1:]))
    for row in cells:
        console.print(Text(row[0] or "-", style="bold"), overflow="fold")
        for column, cell in zip(head[1:], row[1:], strict=True):
            if cell:
                line = f"  {column}{' ' * (label - cell_len(column))}  {cell}"
                console.print(Text(line), overflow="fold")
