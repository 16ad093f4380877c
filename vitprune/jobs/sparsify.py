"""The main job: a dense model and images in, a sparse model and the proof of what it does out."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from vitprune.budget.speed import Prediction
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.common import distributed
from vitprune.common.devices import Precision
from vitprune.common.progress import Listener
from vitprune.common.run_folder import RunFolder
from vitprune.data import Data, Images, explain_worker_crash
from vitprune.errors import Interrupted, Preempted, TrainingError, UsageError
from vitprune.jobs.label_check import check_labels
from vitprune.jobs.side_by_side import bench, evaluate, outcome, random_baseline
from vitprune.loading.load import Loaded
from vitprune.model import SparseViT, attach, attach_as
from vitprune.report import Report, accuracy_of, build_report, object_coverage, write_results
from vitprune.schedule import Sparsity
from vitprune.training.checkpoints import Checkpoints
from vitprune.training.loop import TrainedStep, train
from vitprune.training.progress import Progress, StepRecord, step_log, tracker_log
from vitprune.training.recipe import Recipe


@dataclass(frozen=True)
class RunSettings:
    """What a run needs beside the model, the data and the recipe.

    Attributes:
        sparsity: how many tokens are pruned, where, and what happens to them.
        device: where to run.
        output: the run folder.
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
    output: Path
    eval_precision: Precision = "fp32"
    resume: bool = False
    checkpoint_every: int | None = None
    track: str | None = None
    bench_seconds: float | None = None
    bench_batch_sizes: Sequence[int] = (1, 32)
    prediction: Prediction | None = None
    force_labels: bool = False
    commands: Mapping[str, str] | None = None


def run(
    loaded: Loaded, data: Data, recipe: Recipe, settings: RunSettings, listener: Listener
) -> tuple[SparseViT, Report]:
    """Sparsify, train, evaluate, measure, report: writes the run folder.

    Everything that can be wrong with the input is found before the output folder is made. The model is written as
    soon as training ends, and also when it is stopped.

    Returns:
        The sparse model and the report.

    Raises:
        Interrupted: the user stopped the run; the model so far is written.
        Preempted: SIGTERM came; a training checkpoint is written.
        TrainingError: training cannot continue; the model so far is written.
        DataError: the labels seem to be others than the model's.
        OutputError: the results cannot be written.
    """
    started = time.perf_counter()
    device = settings.device
    distributed.start(device)
    student = new_student(loaded.model, settings.sparsity, recipe.seed)
    metadata = describe_run(student, loaded, data, recipe, settings.sparsity)
    if not (settings.resume or settings.force_labels):
        check_labels(loaded, data, device, listener)
    folder = RunFolder(settings.output)
    if distributed.is_main():
        folder.create(needed_bytes=2 * num_bytes(student))
        if not settings.resume:
            folder.forget()
    distributed.wait()

    checkpoints = _checkpoints(loaded.name, recipe, settings)
    state = checkpoints.latest() if settings.resume else None
    progress = Progress() if state is None else Progress.restored(state.about["progress"])
    seconds_before, stopped = progress.seconds, None
    images, teacher = to_train_on(student, data, recipe), attach(loaded.model, keep=1.0)
    try:
        with _sigterm() as terminated:
            if images is not None:
                steps = train(student, teacher, images, recipe, device, progress, state, terminated.is_set)
                _train(steps, recipe, settings, listener, checkpoints, progress)
    except (KeyboardInterrupt, TrainingError) as error:
        stopped = error
    metadata.training = {
        "steps_done": progress.steps_done,
        "num_steps": progress.num_steps,
        "completed": stopped is None,
    }
    if distributed.is_main():
        save(student, folder.weights, metadata)
    if stopped is not None:
        raise _explained(stopped, progress, folder.weights, checkpoints) from stopped

    report = measured(
        student, loaded, data, recipe, settings, metadata, progress, listener, started=started - seconds_before
    )
    if report is None:
        return student, distributed.from_main(None)
    metadata.accuracy = accuracy_of(report)
    save(student, folder.weights, metadata)
    listener.begin("drawing the report", None)
    models = {"dense": loaded.model, "random": random_baseline(loaded.model, student), "sparse": student}
    write_results(folder.path, report, models, data, metadata, listener)
    checkpoints.clear()
    return student, distributed.from_main(report)


def measured(
    student: SparseViT,
    loaded: Loaded,
    data: Data,
    recipe: Recipe,
    settings: RunSettings,
    metadata: Metadata,
    progress: Progress,
    listener: Listener,
    *,
    started: float,
) -> Report | None:
    """Evaluate and time a trained student beside the dense model; writes nothing. None in all but the main process.

    Args:
        student: trained.
        loaded: the dense model.
        data: its `val` is evaluated.
        recipe: what it was trained by.
        settings: device, precision and time of measuring.
        metadata: of the student.
        progress: of its training.
        listener: shows how far it is.
        started: when the run began, by `time.perf_counter`.
    """
    device, precision, seconds = settings.device, settings.eval_precision, settings.bench_seconds
    models = {"dense": loaded.model, "random": random_baseline(loaded.model, student), "sparse": student}
    predictions = evaluate(models, data, recipe, device, precision, listener)
    if not distributed.is_main():
        return None
    coverage = object_coverage(models, data, device) if data.object_mask is not None else None
    timed = {name: models[name] for name in ("dense", "sparse")}
    return build_report(
        metadata=metadata,
        models=models,
        predictions=predictions,
        timings=bench(timed, device, precision, seconds, listener, settings.bench_batch_sizes),
        coverage=coverage,
        target=outcome(settings.prediction, models, device, seconds, listener),
        training={"recipe": recipe.model_dump(mode="json")} | asdict(progress),
        data=data,
        precision=precision,
        device=str(device),
        seconds=time.perf_counter() - started,
        commands=settings.commands,
    )


def describe_run(student: SparseViT, loaded: Loaded, data: Data, recipe: Recipe, sparsity: Sparsity) -> Metadata:
    """What the file of a run will say of itself, if the run is possible at all.

    Raises:
        UsageError: the model has no classifier, or there is nothing to train on.
        CheckpointError: a file could not be loaded again.
    """
    to_train_on(student, data, recipe)
    return describe(
        student,
        name=loaded.name,
        sparsity=sparsity,
        class_names=loaded.class_names or data.class_names(student.num_classes),
        origin=loaded.origin,
    )


def new_student(model: nn.Module, sparsity: Sparsity, seed: int) -> SparseViT:
    """A sparse copy of `model` with new predictors, the same ones for the same seed."""
    torch.manual_seed(seed)
    return attach_as(copy.deepcopy(model), sparsity)


def fit(
    model: nn.Module, student: SparseViT, data: Data, recipe: Recipe, device: torch.device, listener: Listener
) -> Progress:
    """Train `student` in place against `model`, the teacher; writes nothing.

    Raises:
        UsageError: the model has no classifier, or there is nothing to train on.
    """
    images, progress = to_train_on(student, data, recipe), Progress()
    if images is None:
        return progress
    steps = train(student, attach(model, keep=1.0), images, recipe, device, progress)
    with explain_worker_crash(), closing(steps):
        for step in steps:
            listener.step(step.record)
    return progress


def num_bytes(model: nn.Module) -> int:
    """Size of the weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _train(
    steps: Generator[TrainedStep, None, None],
    recipe: Recipe,
    settings: RunSettings,
    listener: Listener,
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """Take the steps; log them, show them, and save what a run needs to be resumed."""
    folder, done = RunFolder(settings.output), progress.steps_done
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
            if step.stop_requested:
                hint = "vitprune sparsify with the same options and --resume resumes it"
                raise Preempted("the run was terminated", hint)


def _checkpoints(model: str, recipe: Recipe, settings: RunSettings) -> Checkpoints:
    """The run's training checkpoints, and what a resumed run must have in common with them.

    The settings left out change at most the rounding.
    """
    same = recipe.model_dump(mode="json", exclude={"num_workers", "name", "grad_accum", "compile"})
    same = {"model": model, **asdict(settings.sparsity), **same}
    return Checkpoints(RunFolder(settings.output).checkpoints, same, settings.checkpoint_every)


def _explained(
    error: KeyboardInterrupt | TrainingError, progress: Progress, weights: Path, checkpoints: Checkpoints
) -> Interrupted | TrainingError:
    """Why training stopped, where, and what there is now."""
    where = f"after {progress.steps_done} of {progress.num_steps} steps; the model so far is in {weights}"
    if isinstance(error, TrainingError):
        return TrainingError(f"{error.message}, {where}", error.hint)
    step = checkpoints.latest_step()
    hint = f"vitprune eval {weights} DATA measures its accuracy"
    if step is not None:
        hint += f"; the same command with --resume resumes after step {step}"
    return Interrupted(f"stopped {where}", hint)


def to_train_on(student: SparseViT, data: Data, recipe: Recipe) -> Images | None:
    """The images to train on, if that is possible at all; None of a recipe that does not train."""
    if student.num_classes < 1:
        raise UsageError("the model has no classifier (num_classes is 0), so there are no predictions to distil")
    if not recipe.trains:
        return None
    if data.train is None:
        raise UsageError(f"'{data.name}' has no images to train on")
    return data.train


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """In the block, SIGTERM, by which schedulers preempt a job, ends nothing but sets the event."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
