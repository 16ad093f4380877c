"""Steps to TensorBoard and the like, by accelerate's trackers; log.jsonl is written beside them always."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from vitprune.common.formatting import flattened
from vitprune.errors import UsageError
from vitprune.training.progress import StepRecord
from vitprune.training.recipe import Recipe


@dataclass(frozen=True)
class Tracking:
    """Which tracker, and where it keeps its files.

    Attributes:
        name: as accelerate's `log_with` has it; those that need no account write to `folder`/`name`.
        folder: the run folder.

    Raises:
        UsageError: accelerate knows no such tracker, or its package is not installed.
    """

    name: str
    folder: Path

    def __post_init__(self) -> None:
        check_tracker(self.name)

    def start(self, accelerator: Accelerator, recipe: Recipe, steps_done: int) -> None:
        """Begin, or go on after `steps_done` steps.

        Raises:
            UsageError: the tracker does not start.
        """
        # What a killed run logged beyond its checkpoint is not to be shown.
        settings = flattened(recipe.model_dump(mode="json"))
        config = {
            key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()
        }
        options = {"tensorboard": {"purge_step": steps_done + 1}} if steps_done else {}
        try:
            accelerator.init_trackers(self.name, config=config, init_kwargs=options)
        except Exception as error:  # each tracker has errors of its own
            raise UsageError(f"--track {self.name} does not start: {error}", "set it up, or leave it out") from error


def check_tracker(name: str) -> None:
    """Whether there is such a tracker.

    Raises:
        UsageError: accelerate knows no such tracker, or its package is not installed.
    """
    known = [str(each) for each in LoggerType if each != LoggerType.ALL]
    if name not in known:
        raise UsageError(f"--track is '{name}', which accelerate does not know", f"choose from {', '.join(known)}")
    if name not in map(str, get_available_trackers()):
        package = "'vitprune[track]'" if name == "tensorboard" else name
        raise UsageError(f"--track {name} needs a package that is not installed", f"pip install {package}")


def track(accelerator: Accelerator, record: StepRecord) -> None:
    """Log a step, where anything tracks."""
    values = {f"loss/{name}": value for name, value in record.losses.items()}
    values |= {f"kept/stage {stage}": ratio for stage, ratio in enumerate(record.kept_ratios, start=1)}
    values |= {"loss/total": record.total, "lr": record.lr, "images_per_s": record.images_per_s}
    accelerator.log(values | {"skipped": int(record.skipped)}, step=record.step)


def finish(accelerator: Accelerator) -> None:
    """Have everything written. Not accelerate's `end_training`, which also ends the talk of the processes."""
    for tracker in accelerator.trackers:
        tracker.finish()
