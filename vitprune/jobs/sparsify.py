"""The main job: a dense model and images in, a sparse model and the proof of what it does out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.common import distributed
from vitprune.common.progress import Listener
from vitprune.common.run_folder import RunFolder
from vitprune.data import Data, Images, explain_worker_crash
from vitprune.errors import UsageError, VitpruneError
from vitprune.jobs.identity import identity
from vitprune.jobs.label_check import check_labels
from vitprune.jobs.side_by_side import bench, evaluate, outcome, random_baseline
from vitprune.jobs.train_run import RunSettings, after_training, train_run
from vitprune.loading.load import Loaded
from vitprune.model import SparseViT, TaskName, attach, attach_as
from vitprune.report import Report, accuracy_of, build_report, object_coverage, write_results
from vitprune.schedule import Sparsity
from vitprune.tasks import task_named
from vitprune.training.checkpoints import Checkpoints, State
from vitprune.training.loop import TrainedStep, train
from vitprune.training.progress import Progress
from vitprune.training.recipe import Recipe


def run(
    loaded: Loaded, data: Data, recipe: Recipe, settings: RunSettings, listener: Listener
) -> tuple[SparseViT, Report]:
    """Sparsify, train, evaluate, measure, report: writes the run folder.

    Everything that can be wrong with the input is found before the output folder is made. The model is written as
    soon as training ends, and also when it is stopped.

    Returns:
        The sparse model and the report.

    Raises:
        Interrupted: the user stopped the run; the model so far is written, and a training checkpoint.
        Preempted: SIGTERM or SIGHUP came; likewise.
        TrainingError: training cannot continue; the model so far is written.
        UsageError: the run to resume had other settings, weights or images.
        DataError: the labels seem to be others than the model's.
        OutputError: the results cannot be written, or another run writes there.
    """
    started = time.perf_counter()
    distributed.start(settings.device)
    student = new_student(loaded.model, settings.sparsity, recipe.seed, loaded.task)
    metadata = describe_run(student, loaded, data, recipe, settings.sparsity)
    same = identity(loaded, data, recipe, settings.sparsity)
    checkpoints = Checkpoints(settings.output.checkpoints, same, settings.checkpoint_every)
    state = checkpoints.latest() if settings.resume else None
    if not (settings.resume or settings.force_labels):
        check_labels(loaded, data, settings.device, listener)
    with ExitStack() as stack:
        folder = settings.output
        if distributed.is_main():
            before = folder.path
            stack.enter_context(folder.claimed(needed_bytes=2 * num_bytes(student)))
            if folder.path != before:
                listener.say(f"'{before}' was taken meanwhile: this run is written to '{folder}'")
            kept = [] if settings.resume else folder.forget()
            if kept:
                listener.say(f"'{folder.checkpoints / kept[0]}' is not of vitprune and stays")
        settings = replace(settings, output=RunFolder(distributed.from_main(folder.path)))
        checkpoints.folder = settings.output.checkpoints
        progress = Progress() if state is None else Progress.restored(state.about["progress"])
        started -= progress.seconds
        steps = _steps(student, loaded, data, recipe, settings, progress, state)
        train_run(steps, student, metadata, recipe, settings, listener, checkpoints, progress)
        try:
            measuring = (student, loaded, data, recipe, settings, metadata, progress, listener)
            report = _measure_and_write(*measuring, started=started, same=same)
        except (KeyboardInterrupt, VitpruneError) as error:
            raise after_training(error, settings, checkpoints, progress) from error
        if distributed.is_main():
            checkpoints.clear()
        return student, distributed.from_main(report)


def _measure_and_write(
    student: SparseViT,
    loaded: Loaded,
    data: Data,
    recipe: Recipe,
    settings: RunSettings,
    metadata: Metadata,
    progress: Progress,
    listener: Listener,
    **about: Any,
) -> Report | None:
    report = measured(student, loaded, data, recipe, settings, metadata, progress, listener, **about)
    if report is not None:
        metadata.accuracy = accuracy_of(report)
        save(student, settings.output.weights, metadata)
        listener.begin("drawing the report", None)
        models = {"dense": loaded.model, "random": random_baseline(loaded.model, student), "sparse": student}
        write_results(settings.output.path, report, models, data, metadata, listener)
    return report


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
    same: Mapping[str, Any] | None = None,
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
        same: its `identity`, where it can be resumed.
    """
    device, precision, seconds = settings.device, settings.eval_precision, settings.bench_seconds
    models = {"dense": loaded.model, "random": random_baseline(loaded.model, student), "sparse": student}
    ratios = at_ratios(student)
    task = task_named(student.task, loaded.class_vectors)
    results = evaluate(models | ratios, data, recipe, device, precision, listener, task=task)
    if not distributed.is_main():
        return None
    coverage = object_coverage(models, data, device) if data.object_mask is not None else None
    timed = {name: models[name] for name in ("dense", "sparse")} | ratios
    return build_report(
        metadata=metadata,
        models=models,
        ratios=ratios,
        results=results,
        task=task,
        timings=bench(timed, device, precision, seconds, listener, settings.bench_batch_sizes),
        coverage=coverage,
        target=outcome(settings.prediction, models, device, seconds, listener),
        training={
            "recipe": recipe.model_dump(mode="json"),
            "identity": dict(same or {}),
            **asdict(progress),
        },
        data=data,
        precision=precision,
        device=str(device),
        seconds=time.perf_counter() - started,
        commands=settings.commands,
    )


def at_ratios(student: SparseViT) -> dict[str, SparseViT]:
    """Of a student that is trained for a range, the keep ratios that a report shows beside its own, by label."""
    if student.keep_range is None:
        return {}
    low, high = student.keep_range
    number = min(4, max(1, round((high - low) / 0.1)))
    shown = [round(low + (high - low) * index / number, 3) for index in range(number + 1)]
    return {f"keep {keep:g}": student.at(keep) for keep in shown if keep != student.keep}


def describe_run(student: SparseViT, loaded: Loaded, data: Data, recipe: Recipe, sparsity: Sparsity) -> Metadata:
    """What the file of a run will say of itself, if the run is possible at all.

    Raises:
        UsageError: there is nothing to train on, or the recipe does not go with the task.
        CheckpointError: a file could not be loaded again.
    """
    to_train_on(student, data, recipe)
    return describe(
        student,
        name=loaded.name,
        sparsity=sparsity,
        class_names=loaded.class_names or _names_in(data, student),
        origin=loaded.origin,
    )


def _names_in(data: Data, student: SparseViT) -> tuple[str, ...] | None:
    """The outputs' names as the data has them; None where it does not say, or the outputs have none."""
    has_names = task_named(student.task).targets in ("class", "labels")
    return data.class_names(student.num_classes) if has_names else None


def new_student(model: nn.Module, sparsity: Sparsity, seed: int, task: TaskName) -> SparseViT:
    """A sparse copy of `model` with new predictors, the same ones for the same seed."""
    torch.manual_seed(seed)
    student = attach_as(copy.deepcopy(model), sparsity)
    student.task = task
    return student


def fit(
    model: nn.Module, student: SparseViT, data: Data, recipe: Recipe, device: torch.device, listener: Listener
) -> Progress:
    """Train `student` in place against `model`, the teacher; writes nothing.

    Raises:
        UsageError: there is nothing to train on, or the recipe does not go with the task.
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


def _steps(
    student: SparseViT,
    loaded: Loaded,
    data: Data,
    recipe: Recipe,
    settings: RunSettings,
    progress: Progress,
    state: State | None,
) -> Callable[[Callable[[], int]], Generator[TrainedStep, None, None]]:
    """The steps still to be taken, once it is known how a signal is noticed; none of a recipe that does not train."""
    images = to_train_on(student, data, recipe)
    if images is None:
        return lambda _: (step for step in list[TrainedStep]())
    teacher = attach(loaded.model, keep=1.0)
    return lambda signalled: train(
        student, teacher, images, recipe, settings.device, progress, state, lambda: bool(signalled())
    )


def to_train_on(student: SparseViT, data: Data, recipe: Recipe) -> Images | None:
    """The images to train on, if that is possible at all; None of a recipe that does not train."""
    if not recipe.trains:
        return None
    if recipe.augmentation.mixes and recipe.weights.ce > 0 and student.task != "classification":
        raise UsageError(
            f"mixup and cutmix mix the labels of classes, and the task is {student.task}",
            "--set augmentation.mixup=0 --set augmentation.cutmix=0, or train without labels: --no-labels",
        )
    if data.train is None:
        raise UsageError(f"'{data.name}' has no images to train on")
    return data.train
