"""What may leave this machine: results without the paths of its folders."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from vitprune.common import distributed
from vitprune.common.formatting import writable

_ELSEWHERE = re.compile(r"(?:[/~\\]|\.\.(?:[/\\]|$)|[A-Za-z]:[/\\])")
"""Beginnings of a path that says something of the machine: absolute, of the home folder, or out of this one."""
_PATHS = re.compile(rf"^(--[\w-]+=)?{_ELSEWHERE.pattern}.*|(?<=[=,]){_ELSEWHERE.pattern}[^,]*", re.DOTALL)
"""Such paths in one argument: the whole of it, or one of several with names, as in a=/b/c,d=/e/f."""


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


def command_line(arguments: Sequence[str]) -> str:
    """The command that is running, by its arguments, with `path/to/name` for every path that only this machine has."""
    world = distributed.world_size()
    program = ["vitprune"] if world == 1 else ["torchrun", "--nproc-per-node", str(world), "-m", "vitprune"]
    return writable(shlex.join([*program, *(_PATHS.sub(_moved, argument) for argument in arguments)]))


def _moved(path: re.Match[str]) -> str:
    option = path[1] or ""
    return f"{option}path/to/{_last(path[0].removeprefix(option))}"


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
