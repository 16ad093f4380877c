"""What is known of timm's architectures without building them: a table of one timm version, and what was added to it.

Building all of them takes minutes. `examples/describe_architectures.py` writes the table, for the plan that nobody
asked to change; of another timm what it adds is built, and of another plan what can be pruned. That is kept in the
user's cache folder. Nothing here imports torch where the table has all that is asked for.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitprune.common.files import write_text
from vitprune.common.progress import SILENT, Listener
from vitprune.errors import UnknownModelError, VitpruneError

if TYPE_CHECKING:
    from vitprune.schedule import Sparsity

TABLE = Path(__file__).with_name("architectures.json")
_BILLION, _MILLION = 1e9, 1e6

Row = dict[str, Any]
"""An architecture as `vitprune.loading.names.describe_architecture` has it."""


class Table(NamedTuple):
    """Architectures of a version of timm by name, in timm's order."""

    timm: str
    rows: dict[str, Row]


@cache
def shipped_table() -> Table:
    """The table of this package."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    return Table(content["timm"], {name: _row(name, entry, content) for name, *entry in content["rows"]})


def _row(name: str, entry: Sequence[Any], content: dict[str, Any]) -> Row:
    family, reason, *more = entry
    row = {"model": name, "family": content["families"][family]}
    if reason is not None:
        return row | {"reason": content["reasons"][reason], "num_weights": more[0]}
    task, weights, size, depth, prefix, patches, classes, stages, dense, sparse = more
    macs = {"dense": dense[0], "sparse": sparse[0]}
    return {
        **row,
        "reason": None,
        "task": task,
        "weights": weights,
        **content["plan"],
        "input_size": size,
        "depth": depth,
        "num_prefix_tokens": prefix,
        "num_patches": patches,
        "num_classes": classes,
        "stages": [dict(zip(("block", "ratio", "num_tokens"), stage, strict=True)) for stage in stages],
        **{
            side: {"gmacs": cost[0] / _BILLION, "params_m": cost[1] / _MILLION}
            for side, cost in (("dense", dense), ("sparse", sparse))
        },
        "delta": {"gmacs_pct": 100 * (macs["sparse"] / macs["dense"] - 1)},
    }


def table_text(timm: str, rows: Sequence[Row]) -> str:
    """The table as the file has it, an architecture a line."""
    families = sorted({row["family"] for row in rows})
    reasons = sorted({row["reason"] for row in rows if row["reason"] is not None})
    first = next(row for row in rows if row["reason"] is None)
    plan = {key: first[key] for key in ("keep", "schedule", "pruned", "align")}
    head = {"timm": timm, "plan": plan, "families": families, "reasons": reasons}
    lines = []
    for row in rows:
        reason = row["reason"]
        entry = [row["model"], families.index(row["family"]), None if reason is None else reasons.index(reason)]
        if reason is not None:
            entry.append(row["num_weights"])
        else:
            entry += [
                row[key]
                for key in ("task", "weights", "input_size", "depth", "num_prefix_tokens", "num_patches", "num_classes")
            ]
            entry.append([list(stage.values()) for stage in row["stages"]])
            entry += [
                [round(row[side]["gmacs"] * _BILLION), round(row[side]["params_m"] * _MILLION)]
                for side in ("dense", "sparse")
            ]
        lines.append(json.dumps(entry, separators=(",", ":")))
    opening = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    return f'{{{opening},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def count_weights(rows: Sequence[Row]) -> dict[str, Any]:
    """How many of timm's pretrained weights there are by task, and how many are refused, for which reason.

    Returns:
        `by_task`, the most frequent first; `num_refused`; and `reasons` with `reason`, `num_weights` and
        `num_architectures`.
    """
    by_task: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    architectures: Counter[str] = Counter()
    for row in rows:
        if row["reason"] is None:
            by_task.update({task: len(tags) for task, tags in row["weights"].items()})
        else:
            weights[row["reason"]] += row["num_weights"]
            architectures[row["reason"]] += 1
    reasons = [
        {"reason": reason, "num_weights": count, "num_architectures": architectures[reason]}
        for reason, count in weights.most_common()
    ]
    return {"by_task": dict(by_task.most_common()), "num_refused": weights.total(), "reasons": reasons}


def known_names() -> list[str]:
    """Architectures of the installed timm, and LV-ViT, in timm's order; timm is imported only where it must be."""
    if "timm" not in sys.modules and version("timm") == shipped_table().timm:
        return list(shipped_table().rows)
    import timm

    import vitprune.backbones  # noqa: F401  makes LV-ViT known to timm

    names: list[str] = timm.list_models()
    return names


def match_names(pattern: str | None = None) -> list[str]:
    """Architectures of timm whose name matches wildcards as timm has them ("deit*") or holds a text, in timm's order.

    Raises:
        UnknownModelError: none does; offers close matches.
    """
    everything = known_names()
    if pattern is None:
        return everything
    wild = any(mark in pattern for mark in "*?[")
    names = fnmatch.filter(everything, pattern) if wild else [name for name in everything if pattern in name]
    if not names:
        close = difflib.get_close_matches(pattern, everything, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "try a wildcard: vitprune models 'vit*'"
        raise UnknownModelError(f"timm has no model that matches '{pattern}'", hint)
    return names


def describe_all(names: Sequence[str], sparsity: Sparsity | None = None, listener: Listener = SILENT) -> list[Row]:
    """Architectures, of the table, the cache, or built; costs are those of a plan, None for the default one."""
    table = shipped_table().rows
    rows = {name: table[name] for name in names if name in table and (sparsity is None or table[name]["reason"])}
    if missing := [name for name in names if name not in rows]:
        rows |= _described(missing, sparsity, listener)
    return [rows[name] for name in names]


def _described(names: list[str], sparsity: Sparsity | None, listener: Listener) -> dict[str, Row]:
    """Rows that are not in the table, of the cache or built."""
    from vitprune.loading.names import describe_architecture
    from vitprune.training.recipe import load_recipe

    if sparsity is None:
        sparsity = load_recipe("short").plan_defaults
    of_code = zlib.crc32(TABLE.read_bytes())  # the table changes with whatever changes a cost
    file = cache_folder() / f"architectures-{version('timm')}-{of_code:08x}.json"
    kept = _read_cache(file)
    known: dict[str, Row] = kept.setdefault(repr(sparsity), {})
    missing = [name for name in names if name not in known]
    if missing:
        listener.begin("building models", len(missing))
        for name in missing:
            known[name] = describe_architecture(name, sparsity)
            listener.advance(1)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(kept))
        except (OSError, VitpruneError):
            pass  # then they are built again
    return {name: known[name] for name in names}


def _read_cache(file: Path) -> dict[str, dict[str, Row]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and all(isinstance(rows, dict) for rows in content.values()) else {}


def cache_folder() -> Path:
    """Where this system keeps what a program can make again."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  Path's own fails where there is no home
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "vitprune" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "vitprune"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "vitprune"
