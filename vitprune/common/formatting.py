"""Numbers and names as text, the same on the terminal and in the report."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


def plain(text: str) -> str:
    """The text without what would act on the terminal: names in files and data sets may hold escape sequences."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def writable(name: object) -> str:
    """A path or a name as text that every file takes: bytes of a file name that are not UTF-8 become question marks."""
    return str(name).encode("utf-8", "replace").decode()


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference for a table."""
    return "-" if value is None else f"{value:+.{digits}f}"


def one_line(text: str) -> str:
    """`plain`, with every run of spaces and line breaks as one space."""
    return " ".join(plain(text).split())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_fault(error: ValidationError) -> str:
    """The first field that pydantic refuses and why: `stages.0.ratio: Input should be less than or equal to 1`."""
    fault = error.errors()[0]
    reason = fault["msg"].removeprefix("Value error, ")
    return ": ".join((".".join(map(str, fault["loc"])), reason)) if fault["loc"] else reason


JOIN_WITH_COMMAS = "values of one option are joined with commas, such as 3,6,9"


def is_number(text: str) -> bool:
    """Whether an argument is a number, so most likely a further value of the option before it."""
    return re.fullmatch(r"[\d.]+", text) is not None


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings by dotted names: `{"weights": {"kl": 1.0}}` is `{"weights.kl": 1.0}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def duration(seconds: float) -> str:
    """A time span for people: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def close_match(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that somebody who wrote `word` may have meant: it begins so, or is spelt much like it."""
    by_lower = {each.lower(): each for each in known}
    starting = [each for each in by_lower if word and each.startswith(word.lower())]
    found = starting or difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None
