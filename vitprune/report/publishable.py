"""What may leave this machine: results without the paths of its folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_ELSEWHERE = re.compile(r"[/~\\]|\.\.(?:[/\\]|$)|[A-Za-z]:[/\\]")
"""Beginnings of a path that says something of the machine: absolute, of the home folder, or out of this one."""


def publishable(report: dict[str, Any]) -> dict[str, Any]:
    """A copy of a report without paths: images are named from the data folder on, all else by its last name."""
    data = report.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    result: dict[str, Any] = _cleaned(report, name if isinstance(name, str) else "")
    if isinstance(name, str) and isinstance(result["data"], dict):
        result["data"]["name"] = data_name(name)
    return result


def data_name(name: str) -> str:
    """What to call a DATA argument: a folder by its last name alone, a data set of the Hub in full."""
    return name if name.startswith("hf:") else _last(name)


def repeatable(arguments: Sequence[str]) -> list[str]:
    """A command's arguments with `path/to/name` for every path that only this machine has."""
    result = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        result.append(f"{option}{equals}{_moved(value)}")
    return result


def _moved(value: str) -> str:
    """A value with `path/to/name` for a path, also where it is one of several and has a name: a=/b/c,d=/e/f."""
    if _ELSEWHERE.match(value):
        return f"path/to/{_last(value)}"
    parts = [part.partition("=") for part in value.split(",")]
    return ",".join(
        f"{name}{equals}path/to/{_last(file)}" if _ELSEWHERE.match(file) else f"{name}{equals}{file}"
        for name, equals, file in parts
    )


def _cleaned(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(part, root) for key, part in value.items()}
    if isinstance(value, list):
        return [_cleaned(part, root) for part in value]
    if not isinstance(value, str):
        return value
    if root and value.startswith(root.rstrip("/\\") + "/"):
        return value[len(root.rstrip("/\\")) + 1 :]
    return _last(value) if _ELSEWHERE.match(value) else value


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "data"
