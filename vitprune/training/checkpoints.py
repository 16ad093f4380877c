"""Training checkpoints: safetensors files from which a run resumes bit-identically."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitprune.common.files import replacing, write_error
from vitprune.common.run_folder import CHECKPOINT, RunFolder
from vitprune.errors import UsageError

_KEY = "vitprune-training"
_KEPT = 2
_EVERY_S = 120.0
_DIFFERENCES_SHOWN = 3


@dataclass
class State:
    """A run between two steps: weights ("student.*"), their average ("average.*") and moments ("optimizer.*").

    And `about` them "part", the number of the optimiser; "step", how many steps it has made; "progress"; "settings".
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


@dataclass
class Checkpoints:
    """The checkpoints of a run: one every so many steps, None for about every two minutes.

    The settings, as JSON, must be the same for a run to be resumed.
    """

    folder: Path
    settings: dict[str, Any]
    every: int | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        return step % self.every == 0 if self.every else time.monotonic() - self._saved_at > _EVERY_S

    def save(self, state: State, step: int) -> None:
        """Write a checkpoint whole or not at all, then remove all but the last two.

        Raises:
            OutputError: it cannot be written; earlier ones are kept.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        header = {_KEY: json.dumps(state.about | {"settings": self.settings})}
        with replacing(self.folder / f"step-{step:09d}.safetensors") as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}, temporary, header)
        for old in self._files()[:-_KEPT]:
            old.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def latest(self) -> State | None:
        """The last checkpoint that can be read; None if there is none.

        Raises:
            UsageError: it is of a run with other settings; names what differs.
        """
        for path in reversed(self._files()):
            state = _read(path)
            if state is not None:
                check_same(self.folder.parent, state.about["settings"], self.settings)
                return state
        return None

    def latest_step(self) -> int | None:
        """The step after which the last checkpoint was written; None where there is none."""
        files = self._files()
        return int(files[-1].stem.removeprefix("step-")) if files else None

    def clear(self) -> None:
        """Remove all of them, and the unfinished files of a killed process; what others put beside them stays."""
        RunFolder(self.folder.parent).forget_checkpoints()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(CHECKPOINT)) if self.folder.is_dir() else []


def check_same(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Make sure that the run in the folder `run` was begun with the settings that it is to be resumed with.

    Raises:
        UsageError: it was not; names what differs, how it was and how it is.
    """
    now = json.loads(json.dumps(now))
    differing = [name for name in sorted({*before, *now}) if name not in before or before[name] != now.get(name)]
    if not differing:
        return
    said = [
        f"{name} is {before[name]!r} there, {now.get(name)!r} now" if name in before else f"{name} is not known there"
        for name in differing
    ]
    more = f"; and {len(said) - _DIFFERENCES_SHOWN} more" if len(said) > _DIFFERENCES_SHOWN else ""
    raise UsageError(
        f"the run in '{run}' has other settings: {'; '.join(said[:_DIFFERENCES_SHOWN])}{more}",
        "resume with the same settings, or start over with --overwrite",
    )


def _read(path: Path) -> State | None:
    """A checkpoint, None if the file is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
        return State(load_file(path), about)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
