"""A finished run, read back from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vitprune.common.formatting import first_fault
from vitprune.data.source import hub_name
from vitprune.errors import CheckpointError, UsageError
from vitprune.report.publishable import publishable
from vitprune.report.schema import KeepMaps, Report

REPORT, LOG, KEEP_MAPS, PAGE, CARD = "report.json", "log.jsonl", "keepmaps.json", "report.html", "README.md"
WEIGHTS, CONFIG = "model.safetensors", "config.json"

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder says of its run, without paths of this machine.

    Attributes:
        report: report.json.
        steps: log.jsonl, a dict a step; empty where there is none.
        keep_maps: keepmaps.json; None where there is none.
        hub_data: the data set of the Hub that its images are of; None where DATA named something else.
    """

    report: Report
    steps: list[dict[str, Any]]
    keep_maps: KeepMaps | None
    hub_data: str | None = None


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UsageError: it is no folder, or holds no report.
        CheckpointError: one of its files is damaged, or not what vitprune writes.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no run folder '{folder}'", "give the folder that vitprune sparsify wrote")
    if not (folder / REPORT).is_file():
        raise UsageError(
            f"'{folder}' holds no {REPORT}, so it is no complete run",
            "sparsify writes it at the end; --resume goes on with a run that was cut",
        )
    whole = _object(folder / REPORT)
    report = checked(Report, publishable(whole), folder / REPORT)
    images = folder / KEEP_MAPS
    return FinishedRun(
        report=report,
        steps=_steps(folder / LOG),
        keep_maps=checked(KeepMaps, _object(images), images) if images.is_file() else None,
        hub_data=hub_name(whole["data"]["name"]),  # before a folder that happens to be called imagenet is cut to that
    )


def checked(model: type[_Model], content: Any, path: Path) -> _Model:
    """What a file holds, checked.

    Raises:
        CheckpointError: something is missing or of another kind; names it.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(
            f"'{path}' is not what vitprune writes: {first_fault(error)}",
            "it may come from a newer vitprune: pip install -U vitprune",
        ) from error


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}", "copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds no object")
    return content


def _steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that can be read; one that a killed process left unfinished is none."""
    if not path.is_file():
        return []
    steps = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                step = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                continue
            if isinstance(step, dict) and isinstance(step.get("step"), int):
                steps.append(step)
    return steps
