"""Numbers and names as text, the same on the terminal and in the report."""

from __future__ import annotations


def plain(text: str) -> str:
    """The text without what would act on the terminal: names in files and data sets may hold escape sequences."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference for a table."""
    return "-" if value is None else f"{value:+.{digits}f}"


def one_line(text: str) -> str:
    """`plain`, with every run of spaces and line breaks as one space."""
    return " ".join(plain(text).split())
