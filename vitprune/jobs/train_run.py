"""Training as a part of a run: logged, saved, stopped by signals, and what is there when it was stopped."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch

from vitprune.budget.speed import Prediction
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import save
from vitprune.common import distributed, stopping
from vitprune.common.devices import Precision
from vitprune.common.progress import Listener
from vitprune.common.run_folder import RunFolder
from vitprune.data import explain_worker_crash
from vitprune.errors import OutputError, VitpruneError
from vitprune.model import SparseViT
from vitprune.schedule import Sparsity
from vitprune.training.checkpoints import Checkpoints
from vitprune.training.loop import TrainedStep
from vitprune.training.progress import Progress, StepRecord, step_log, tracker_log
from vitprune.training.recipe import Recipe

_NOTICE = "\nstopping after this step; once more stops at once\n"


@dataclass(frozen=True)
class RunSettings:
    """What a run needs beside the model, the data and the recipe.

    Attributes:
        sparsity: how many tokens are pruned, where, and what happens to them.
        device: where to run.
        output: the run folder, not made yet.
        eval_precision: precision of accuracy and speed figures.
        resume: resume the run in `output`, if there is a checkpoint.
        checkpoint_every: steps between two training checkpoints; None for about every two minutes.
        track: also log the steps to this tracker of accelerate's.
        bench_batch_sizes: of the report's timings, rising.
        bench_seconds: how long each model is timed at each batch size of the report; None for 2.
        prediction: of a plan chosen for a speed, to be compared with what is measured after training; else None.
        force_labels: go on although the labels seem to be others than the model's.
        commands: the command line that began the run, by the command's name; None where none did.
    """

    sparsity: Sparsity
    device: torch.device
    output: RunFolder
    eval_precision: Precision = "fp32"
    resume: bool = False
    checkpoint_every: int | None = None
    track: str | None = None
    bench_seconds: float | None = None
    bench_batch_sizes: Sequence[int] = (1, 32)
    prediction: Prediction | None = None
    force_labels: bool = False
    commands: Mapping[str, str] | None = None


def train_run(
    steps: Callable[[Callable[[], int]], Generator[TrainedStep, None, None]],
    student: SparseViT,
    metadata: Metadata,
    recipe: Recipe,
    settings: RunSettings,
    listener: Listener,
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """Take the steps, then write the model, also where they are stopped.

    Raises:
        Interrupted, Preempted: it was stopped; says what there is now, as do errors of training.
    """

    def write() -> None:
        metadata.training = {
            "steps_done": progress.steps_done,
            "num_steps": progress.num_steps,
            "completed": progress.steps_done == progress.num_steps,
        }
        if distributed.is_main():
            save(student, settings.output.weights, metadata)

    try:
        with stopping.deferred(_NOTICE) as signalled:
            _take(steps(signalled), signalled, recipe, settings, listener, checkpoints, progress)
            write()
    except (KeyboardInterrupt, VitpruneError) as error:
        if progress.steps_done and not metadata.training and not isinstance(error, OutputError):
            write()
        if not progress.steps_done and distributed.is_main():
            settings.output.log.unlink(missing_ok=True)
        raise _in_training(error, settings, checkpoints, progress) from error


def _take(
    steps: Generator[TrainedStep, None, None],
    signalled: Callable[[], int],
    recipe: Recipe,
    settings: RunSettings,
    listener: Listener,
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """Take the steps; log them, show them, and save what a run needs to be resumed."""
    folder, done = settings.output, progress.steps_done
    with ExitStack() as stack:
        writers: list[Callable[[StepRecord], None]] = [listener.step]
        if distributed.is_main():
            writers.insert(0, stack.enter_context(step_log(folder.log, after=done)))
            if settings.track is not None:
                writers.append(stack.enter_context(tracker_log(settings.track, folder.path, recipe, after=done)))
        stack.enter_context(explain_worker_crash())
        for step in stack.enter_context(closing(steps)):
            for write in writers:
                write(step.record)
            last = step.stop_requested or progress.steps_done == progress.num_steps
            if distributed.is_main() and (last or checkpoints.due(progress.steps_done)):
                checkpoints.save(step.state(), progress.steps_done)
            if step.stop_requested and progress.steps_done < progress.num_steps:
                raise stopping.Stopped(signalled() or signal.SIGTERM)


def _in_training(
    error: KeyboardInterrupt | VitpruneError, settings: RunSettings, checkpoints: Checkpoints, progress: Progress
) -> VitpruneError:
    """Why training stopped, where, and what there is now."""
    weights, step = settings.output.weights, checkpoints.latest_step()
    where, hint = " before the first training step; nothing was saved", None
    if progress.steps_done:
        where = f" after {progress.steps_done} of {progress.num_steps} steps; the model so far is in {weights}"
        hint = f"vitprune eval {shlex.quote(str(weights))} DATA measures its accuracy"
    if step is not None:
        hint = f"{_how_to_resume(settings)} resumes after step {step}" + (f"; {hint}" if hint else "")
    if isinstance(error, KeyboardInterrupt):
        error = stopping.stopped_error(error, where, hint)
    elif progress.steps_done and not isinstance(error, OutputError):
        error.message += f",{where}"
    error.saved = _saved(settings, progress, step)
    return error


def after_training(
    error: KeyboardInterrupt | VitpruneError, settings: RunSettings, checkpoints: Checkpoints, progress: Progress
) -> VitpruneError:
    """Why there is no report, and what there is."""
    weights, step = settings.output.weights, checkpoints.latest_step()
    there = f"the trained model is in {weights}"
    hint = f"vitprune eval {shlex.quote(str(weights))} DATA measures it"
    if settings.output.is_complete:
        hint = f"vitprune report {shlex.quote(str(settings.output))} draws its page"
    elif step is not None:
        hint = f"{_how_to_resume(settings)} measures it and writes the report"
    if isinstance(error, KeyboardInterrupt):
        error = stopping.stopped_error(error, f" after training, before the report was whole; {there}", hint)
    else:
        error.hint = "; ".join(part for part in (error.hint, there, hint) if part)
    error.saved = _saved(settings, progress, step)
    return error


def _how_to_resume(settings: RunSettings) -> str:
    if settings.prediction is None:
        return "the same command with --resume"
    found = settings.sparsity
    plan = f"--keep {found.keep!r}" + (f" --prune-at {','.join(map(str, found.prune_at))}" if found.prune_at else "")
    return f"the same command with {plan} in place of the target, and --resume,"


def _saved(settings: RunSettings, progress: Progress, step: int | None) -> dict[str, Any] | None:
    if not progress.steps_done and step is None and not settings.output.weights.is_file():
        return None
    return {
        "output": str(settings.output),
        "steps_done": progress.steps_done,
        "num_steps": progress.num_steps,
        "resumes_after_step": step,
    }
