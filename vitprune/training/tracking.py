"""Steps to TensorBoard and the like, by accelerate's trackers; log.jsonl is written beside them always."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from vitprune.common.formatting import flattened
from vitprune.errors import UsageError
from vitprune.training.progress import StepRecord
from vitprune.training.recipe import Recipe


def check_tracker(name: str) -> None:
    """Make sure that there is such a tracker.

    Raises:
        UsageError: accelerate knows no such tracker, or its package is not installed.
    """
    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(LOGGER_TYPE_TO_CLASS)
        raise UsageError(f"--track is '{name}', which accelerate does not know", f"choose from {known}")
    if name not in map(str, get_available_trackers()):
        package = "'vitprune[track]'" if name == "tensorboard" else name
        raise UsageError(f"--track {name} needs a package that is not installed", f"pip install {package}")


@contextmanager
def tracker_log(name: str, folder: Path, recipe: Recipe, after: int = 0) -> Iterator[Callable[[StepRecord], None]]:
    """In the block, a function that logs a step.

    Args:
        name: as accelerate has it; trackers that need no account write to `folder`/`name`.
        folder: the run folder.
        recipe: logged as the settings of the run.
        after: the step after which a run is resumed.

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
        raise UsageError(f"--track {name} does not start: {error}", "set it up, or leave it out") from error

    def log(record: StepRecord) -> None:
        values = {f"loss/{name}": value for name, value in record.losses.items()}
        values |= {f"kept/stage {stage}": ratio for stage, ratio in enumerate(record.kept_ratios, start=1)}
        values |= {"loss/total": record.total, "lr": record.lr, "images_per_s": record.images_per_s}
        tracker.log(values | {"skipped": int(record.skipped)}, step=record.step)

    try:
        yield log
    finally:
        tracker.finish()
