"""How training goes: a record of each step, how far the run is, log.jsonl, and accelerate's trackers beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from vitprune.common.files import write_error
from vitprune.common.formatting import flattened
from vitprune.errors import UsageError
from vitprune.training.recipe import Phase, Recipe


@dataclass(frozen=True)
class StepRecord:
    """One training step, as it goes to the log and the progress display.

    Attributes:
        step: 1-based, over all phases.
        losses: unweighted components by name.
        total: weighted sum that was minimised.
        kept_ratios: share of the original tokens kept after each stage.
        lr: of the predictors, or of the backbone where predictors do not train.
        images_per_s: of this step, data included.
        skipped: True if the loss or gradient was not finite and the weights were not changed.
        keep: the step's keep ratio, where one training is for a range of them.
    """

    step: int
    num_steps: int
    phase: Phase
    losses: dict[str, float]
    total: float
    kept_ratios: tuple[float, ...]
    target_ratios: tuple[float, ...]
    lr: float
    images_per_s: float
    skipped: bool = False
    keep: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The record for log.jsonl; a loss that is not finite becomes null."""
        record = asdict(self)
        if self.keep is None:
            del record["keep"]
        record["losses"] = {name: _finite(value) for name, value in self.losses.items()}
        record["total"] = _finite(self.total)
        return record


@dataclass
class Progress:
    """What a run has done so far, in this process and in those that it resumes.

    Attributes:
        num_steps: planned, over all phases.
        num_skipped: steps skipped because loss or gradient was not finite.
        num_microbatches: microbatches that share a process' batch.
        num_images: seen, repeats counted.
        num_unreadable: images skipped because they could not be read, repeats counted.
        unreadable: names of the first of them.
        seconds: spent on steps, data included.
        seconds_split: waiting for images ("data") and the rest ("compute").
        phases: steps done by phase.
        sampled_ratios: share of the original tokens kept after each stage at the last sampled step.
        backbone_lr: peak rate of the backbone, see `Recipe.rate_reference_kl`.
        shown: how many images the teacher gave each class, repeats counted; empty where it was not asked.
    """

    steps_done: int = 0
    num_steps: int = 0
    num_skipped: int = 0
    num_microbatches: int = 1
    num_images: int = 0
    num_unreadable: int = 0
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seconds_split: dict[str, float] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    sampled_ratios: tuple[float, ...] | None = None
    backbone_lr: float | None = None
    shown: list[int] = field(default_factory=list)

    @classmethod
    def restored(cls, content: Mapping[str, Any]) -> Progress:
        """From a checkpoint; what other versions of vitprune counted besides is ignored."""
        return cls(**{each.name: content[each.name] for each in fields(cls) if each.name in content})

    def add(
        self, record: StepRecord, num_images: int, seconds: float, waited: float, shown: Sequence[int] = ()
    ) -> None:
        """Count a step on `num_images` images that took `seconds`, `waited` of them for its images."""
        self.steps_done += 1
        self.num_skipped += record.skipped
        if record.phase == "sampled":
            self.sampled_ratios = record.kept_ratios
        self.num_images += num_images
        self.seconds += seconds
        for name, spent in (("data", waited), ("compute", seconds - waited)):
            self.seconds_split[name] = self.seconds_split.get(name, 0.0) + spent
        self.phases[record.phase] = self.phases.get(record.phase, 0) + 1
        if shown:
            self.shown = [sum(pair) for pair in zip_longest(self.shown, shown, fillvalue=0)]


@contextmanager
def step_log(path: Path, after: int = 0) -> Iterator[Callable[[StepRecord], None]]:
    """In the block, a function that writes a line of log.jsonl, on disk as soon as its step is done.

    Lines after the step `after`, after which a run is resumed, are dropped.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        kept = _lines(path, after) if after and path.is_file() else []
        file = path.open("w", encoding="utf-8")
        file.writelines(kept)
    except OSError as error:
        raise write_error(path, error) from error

    def write(record: StepRecord) -> None:
        try:
            file.write(json.dumps(record.as_json()) + "\n")
            file.flush()
        except OSError as error:
            raise write_error(path, error) from error

    with file:
        yield write


def check_tracker(name: str) -> None:
    """Make sure that accelerate knows such a tracker, and that its package is installed.

    Raises:
        UsageError: it does not, or is not.
    """
    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(LOGGER_TYPE_TO_CLASS)
        raise UsageError(f"--report-to is '{name}', which accelerate does not know", f"choose from {known}")
    if name not in map(str, get_available_trackers()):
        raise UsageError(f"--report-to {name} needs a package that is not installed", f"pip install {name}")


@contextmanager
def tracker_log(name: str, folder: Path, recipe: Recipe, after: int = 0) -> Iterator[Callable[[StepRecord], None]]:
    """In the block, a function that logs a step of a run, which may be resumed after the step `after`.

    The name is accelerate's; trackers that need no account write to `folder`/`name`.

    Raises:
        UsageError: the tracker does not start.
    """
    settings = flattened(recipe.model_dump(mode="json"))
    # What a killed run logged beyond its checkpoint must not be shown.
    options = {"purge_step": after + 1} if after and name == "tensorboard" else {}
    try:
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(name, folder, **options) if kind.requires_logging_directory else kind(name)
        tracker.start()
        tracker.store_init_configuration(
            {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()}
        )
    except Exception as error:  # each tracker has errors of its own
        raise UsageError(f"--report-to {name} does not start: {error}", "set it up, or leave it out") from error

    def log(record: StepRecord) -> None:
        values = {f"loss/{name}": value for name, value in record.losses.items()}
        values |= {f"kept/stage {stage}": ratio for stage, ratio in enumerate(record.kept_ratios, start=1)}
        values |= {"loss/total": record.total, "lr": record.lr, "images_per_s": record.images_per_s}
        tracker.log(values | {"skipped": int(record.skipped)}, step=record.step)

    try:
        yield log
    finally:
        tracker.finish()


def _lines(path: Path, last: int) -> list[str]:
    """The lines of a log up to a step; one that a killed process did not finish is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
