"""A finished run, read back from its folder."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vitprune.common.files import read_json
from vitprune.common.formatting import first_fault
from vitprune.common.json_version import upgraded
from vitprune.common.run_folder import RunFolder
from vitprune.data.hub import hub_name
from vitprune.errors import CheckpointError, UsageError
from vitprune.report.publishable import publishable
from vitprune.report.schema import KeepMaps, Report, Step

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class FinishedRun:
    """What report.json, log.jsonl and keepmaps.json say of a run, if they are there, without paths of this machine.

    `hub_data` is the data set of the Hub that its images are of; None where DATA named something else.
    """

    report: Report
    steps: list[Step]
    keep_maps: KeepMaps | None
    hub_data: str | None = None


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder, named by itself or by its model.safetensors.

    Raises:
        UsageError: it is no folder, or holds no report.
        CheckpointError: one of its files is damaged, or not what vitprune writes.
    """
    folder = RunFolder.of(folder)
    if not folder.is_dir():
        raise UsageError(f"run folder '{folder}' not found", "give the folder that vitprune sparsify wrote")
    files = RunFolder(folder)
    if not files.is_complete:
        raise UsageError(
            f"'{folder}' holds no {files.report.name}, so it is no complete run",
            "sparsify writes it at the end; --resume resumes a run that was cut",
        )
    content = upgraded(read_json(files.report))
    report, maps = _checked(Report, publishable(content), files.report), None
    if files.keep_maps.is_file():
        maps = _checked(KeepMaps, upgraded(read_json(files.keep_maps)), files.keep_maps)
    # Before a folder that happens to be called imagenet is cut to that:
    hub_data = hub_name(content["data"]["name"])
    return FinishedRun(report, _steps(files.log), maps, hub_data)


def _checked(model: type[_Model], content: Any, path: Path) -> _Model:
    """What a file holds, checked."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(
            f"'{path}' is not what vitprune writes: {first_fault(error)}",
            "it may come from a newer vitprune: pip install -U vitprune",
        ) from error


def _steps(path: Path) -> list[Step]:
    """The lines of a log that can be read; one that a killed process left unfinished is none."""
    steps = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            steps.append(Step.model_validate(upgraded(json.loads(line))))
    return steps
