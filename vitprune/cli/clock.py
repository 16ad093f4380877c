"""What a command spends its time on, for --verbose."""

from __future__ import annotations

import time

_START = "starting"
_seconds: dict[str, float] = {}
_part, _since = _START, time.perf_counter()


def restart() -> None:
    """A command begins."""
    _seconds.clear()
    begin(_START)
    _seconds.clear()


def begin(part: str) -> None:
    """What comes now is `part`; what came before it is over."""
    global _part, _since
    now = time.perf_counter()
    _seconds[_part] = _seconds.get(_part, 0.0) + now - _since
    _part, _since = part, now


def told() -> str:
    """The parts, in their order, and their seconds; what took next to nothing is left out."""
    begin(_part)
    parts = [f"{part} {seconds:.1f} s" for part, seconds in _seconds.items() if seconds >= 0.05]
    return f"{', '.join(parts)}; {sum(_seconds.values()):.1f} s in all"
