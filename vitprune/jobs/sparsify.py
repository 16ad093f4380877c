"""The main job: a dense model and images in, a sparse model and the proof of what it does out."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vitprune.budget import Promise
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.common import distributed
from vitprune.common.devices import pick_precision
from vitprune.common.progress import Listener
from vitprune.common.run_folder import RunFolder
from vitprune.data import Data, Images, train_transform
from vitprune.errors import Interrupted, TrainingError, UsageError
from vitprune.evaluation import Predictions
from vitprune.jobs.side_by_side import bench, evaluate, outcome, random_baseline
from vitprune.loading.load import Loaded
from vitprune.model import SparseViT, Sparsity, attach, attach_as
from vitprune.report import Report, accuracy_of, build_report, object_coverage, write_results
from vitprune.training import Checkpoints, Progress, Recipe, State, StepLog, Tracking, train


@dataclass(frozen=True)
class RunSettings:
    """What a run needs beside the model, the data and the recipe.

    Attributes:
        sparsity: how many tokens leave, where, and what becomes of them.
        device: where to run.
        output: the run folder.
        eval_precision: precision of accuracy and speed figures.
        resume: go on with the run in `output`, if one is there.
        begin: the state to begin from where there is none to go on from: a warm start that was done elsewhere.
        keep_checkpoints: how many training checkpoints to keep, the last ones; they go when the run is complete.
        checkpoint_every: steps between two; None for about every two minutes.
        track: also log the steps to this tracker of accelerate's.
        bench_seconds: how long each model is timed at each batch size of the report; None for 2.
        promise: the speed that the plan was chosen for, to be compared with what comes of it; None where there is none.
        commands: the command line that began the run, by the command's name; None where none did.
    """

    sparsity: Sparsity
    device: torch.device
    output: Path
    eval_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    resume: bool = False
    begin: State | None = None
    keep_checkpoints: int = 2
    checkpoint_every: int | None = None
    track: str | None = None
    bench_seconds: float | None = None
    promise: Promise | None = None
    commands: Mapping[str, str] | None = None


def run(
    loaded: Loaded, data: Data, recipe: Recipe, settings: RunSettings, listener: Listener
) -> tuple[SparseViT, Report]:
    """Sparsify, train, evaluate, measure, report: writes the run folder.

    Everything that can be wrong with the input is found before the output folder is made. The checkpoint is written
    as soon as training ends, and also when it is stopped.

    Returns:
        The sparse model and the report.

    Raises:
        Interrupted: the user stopped the run; the model so far is written.
        Preempted: SIGTERM came; a training checkpoint is written.
        TrainingError: training cannot go on; the checkpoint of the last finite step is written.
        OutputError: the results cannot be written.
    """
    started = time.perf_counter()
    distributed.start(settings.device)
    student = new_student(loaded.model, settings.sparsity, recipe.seed)
    metadata = describe_run(student, loaded, data, settings.sparsity)
    this = _Run(loaded, data, recipe, settings, listener, student, metadata, checkpoints_of(loaded, recipe, settings))
    state = this.prepare()
    earlier = 0.0 if state is None else state.about["progress"]["seconds"]
    progress = this.train(state)
    models = {"dense": loaded.model, "random": random_baseline(loaded.model, student), "sparse": student}
    predictions = evaluate(models, data, recipe, settings.device, settings.eval_precision, listener)
    report = None
    if distributed.is_main():
        report = this.report(models, predictions, progress, started - earlier)
    return student, distributed.from_main(report)


@dataclass(frozen=True)
class _Run:
    """What a run is about."""

    loaded: Loaded
    data: Data
    recipe: Recipe
    settings: RunSettings
    listener: Listener
    student: SparseViT
    metadata: Metadata
    checkpoints: Checkpoints

    def prepare(self) -> State | None:
        """Make the run folder; the state to go on from, where there is one."""
        output, resume = self.settings.output, self.settings.resume
        if distributed.is_main():
            RunFolder(output).create(needed_bytes=2 * num_bytes(self.student))
            if not resume:  # what a run that is written over has left would be taken for this one's
                RunFolder(output).forget()
        distributed.wait()
        return (self.checkpoints.latest() if resume else None) or self.settings.begin

    def train(self, resume: State | None) -> Progress:
        """Train the student and write it, also when training stops early."""
        output, progress = self.settings.output, Progress()
        tracking = None if self.settings.track is None else Tracking(self.settings.track, output)
        stopped: BaseException | None = None
        done = 0 if resume is None else resume.about["progress"]["steps_done"]
        main = distributed.is_main()
        logging = StepLog(RunFolder(output).log, self.listener, done) if main else nullcontext(self.listener)
        with logging as log, stopping_on_sigterm(self.checkpoints):
            try:
                fit(
                    *(self.loaded.model, self.student, self.data, self.recipe, self.settings.device, log, progress),
                    checkpoints=self.checkpoints,
                    resume=resume,
                    tracking=tracking,
                )
            except (KeyboardInterrupt, TrainingError) as error:
                stopped = error
        self.metadata.training = {
            "steps_done": progress.steps_done,
            "num_steps": progress.num_steps,
            "completed": stopped is None,
        }
        path = RunFolder(output).weights
        if main:
            save(self.student, path, self.metadata)
        if stopped is None:
            return progress
        where = f"after {progress.steps_done} of {progress.num_steps} steps; the model so far is in {path}"
        if isinstance(stopped, TrainingError):
            raise TrainingError(f"{stopped.message}, {where}", stopped.hint) from stopped
        going_on = self.checkpoints.latest_step()
        hint = f"vitprune eval {path} DATA tells how good it is"
        if going_on is not None:
            hint += f"; the same command with --resume goes on after step {going_on}"
        raise Interrupted(f"stopped {where}", hint) from stopped

    def report(
        self,
        models: dict[str, nn.Module],
        predictions: dict[str, Predictions],
        progress: Progress,
        started: float,
    ) -> Report:
        """What is measured by one process alone, and the files of a complete run.

        Args:
            models: "dense", "random" and "sparse".
            predictions: of the same.
            progress: of the training.
            started: when the run began, by `time.perf_counter`.
        """
        data, settings, metadata = self.data, self.settings, self.metadata
        coverage = object_coverage(models, data, settings.device) if data.object_mask is not None else None
        report = build_report(
            metadata=metadata,
            models=models,
            predictions=predictions,
            timings=bench(
                {name: models[name] for name in ("dense", "sparse")},
                settings.device,
                settings.eval_precision,
                settings.bench_seconds,
                self.listener,
            ),
            coverage=coverage,
            target=outcome(settings.promise, models, settings.device, settings.bench_seconds, self.listener),
            training={"recipe": self.recipe.model_dump(mode="json")} | asdict(progress),
            data=data,
            precision=settings.eval_precision,
            device=str(settings.device),
            wall_s=time.perf_counter() - started,
            commands=settings.commands,
        )
        metadata.accuracy = accuracy_of(report)
        save(self.student, RunFolder(settings.output).weights, metadata)
        self.listener.begin("drawing the report", None)
        write_results(settings.output, report, models, data, metadata, self.listener)
        self.checkpoints.clear()
        return report


def describe_run(student: SparseViT, loaded: Loaded, data: Data, sparsity: Sparsity) -> Metadata:
    """What the file of a run will say of itself, if the run is possible at all.

    Raises:
        UsageError: the model has no classifier, or there is nothing to train on.
        CheckpointError: a file could not be loaded again.
    """
    _check_trainable(student, data)
    return describe(
        student,
        name=loaded.name,
        sparsity=sparsity,
        class_names=loaded.class_names or data.class_names(student.num_classes),
        origin=loaded.origin,
    )


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Those that a run must have in common with another to end as it does; the others change at most its rounding."""
    return recipe.model_dump(mode="json", exclude={"num_workers", "name", "grad_accum", "compile"})


def checkpoints_of(loaded: Loaded, recipe: Recipe, settings: RunSettings) -> Checkpoints:
    """The run's training checkpoints, and what a resumed run must have in common with them."""
    same = {"model": loaded.name, **asdict(settings.sparsity), **recipe_settings(recipe)}
    return Checkpoints(
        RunFolder(settings.output).checkpoints, same, settings.keep_checkpoints, settings.checkpoint_every
    )


def new_student(model: nn.Module, sparsity: Sparsity, seed: int) -> SparseViT:
    """A sparse copy of `model` with new predictors, the same ones for the same seed."""
    torch.manual_seed(seed)
    return attach_as(copy.deepcopy(model), sparsity)


def fit(
    model: nn.Module,
    student: SparseViT,
    data: Data,
    recipe: Recipe,
    device: torch.device,
    listener: Listener,
    progress: Progress,
    *,
    checkpoints: Checkpoints | None = None,
    resume: State | None = None,
    tracking: Tracking | None = None,
) -> None:
    """Train `student` in place against `model`, the teacher.

    Raises:
        UsageError: the model has no classifier, or there is nothing to train on.
    """
    images = _check_trainable(student, data)
    images.transform = train_transform(model, recipe.augmentation)
    teacher = attach(model, keep=1.0)
    train(
        student.to(device),
        teacher.to(device),
        images,
        recipe,
        device=device,
        precision=pick_precision(recipe.precision, device, training=True),
        listener=listener,
        progress=progress,
        checkpoints=checkpoints,
        resume=resume,
        tracking=tracking,
    )


def _check_trainable(student: SparseViT, data: Data) -> Images:
    """The images to train on, if that is possible at all."""
    if student.num_classes < 1:
        raise UsageError("the model has no classifier (num_classes is 0), so there is no answer to distil")
    if data.train is None:
        raise UsageError(f"'{data.name}' has no images to train on")
    return data.train


@contextmanager
def stopping_on_sigterm(checkpoints: Checkpoints) -> Iterator[None]:
    """In the block SIGTERM, by which schedulers preempt a job, means: end the step, write a checkpoint, stop."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return

    def stop(*_: object) -> None:
        checkpoints.stop = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def num_bytes(model: nn.Module) -> int:
    """Size of the weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
