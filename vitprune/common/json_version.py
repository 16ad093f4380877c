"""The version of what vitprune writes as JSON, and how files of versions before it are read."""

from __future__ import annotations

from typing import Any, Literal

SCHEMA_VERSION: Literal[2] = 2

RENAMED = {
    "dropped": "pruned",
    "warm_start_steps": "pretraining_steps",
    "warm_start_target": "pretraining_target",
    "warm": "pretraining",
    "num_parts": "num_microbatches",
    "seconds_by_part": "seconds_split",
    "wall_s": "seconds",
    "answers": "correct",
    "promised_speedup": "predicted_speedup",
    "promised_latency_ms": "predicted_latency_ms",
    "pictures": "images",
}
"""Keys of version 1, and what they are called now."""

_VALUES = {"pruned": {"fold": "merge"}, "phase": {"warm": "pretraining"}}


def upgraded(content: Any) -> Any:
    """What a JSON file of any version holds, in the words of this one, where it is of version 1; numbers stay."""
    if not isinstance(content, dict) or content.get("schema_version", 1) != 1:
        return content
    return _renamed(content) | ({"schema_version": SCHEMA_VERSION} if "schema_version" in content else {})


def _renamed(content: Any) -> Any:
    if isinstance(content, list):
        return [_renamed(each) for each in content]
    if not isinstance(content, dict):
        return content
    result = {}
    for old, value in content.items():
        key = str(RENAMED.get(old, old))
        words = _VALUES.get(key, {})
        result[key] = words.get(value, value) if isinstance(value, str) else _renamed(value)
    return result
