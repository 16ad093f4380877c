"""Several keep ratios, one run after another, then all of them beside the dense model and other dense models."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vitprune.backbones import input_size, preprocessing
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import load_sparse, read_metadata
from vitprune.common.files import read_json
from vitprune.common.progress import Listener
from vitprune.common.run_folder import RunFolder
from vitprune.data import Data, Faults, count_images
from vitprune.errors import DataError, Interrupted, Preempted, UsageError, VitpruneError
from vitprune.evaluation import Predictions
from vitprune.jobs.side_by_side import EVAL_BATCH_SIZE, bench, evaluate
from vitprune.jobs.sparsify import (
    RunSettings,
    checkpoints_of,
    describe_run,
    fit,
    new_student,
    num_bytes,
    recipe_settings,
    run,
    stopping_on_sigterm,
)
from vitprune.loading.load import Loaded
from vitprune.measure import describe_environment
from vitprune.model import Sparsity
from vitprune.report import Report
from vitprune.report.runs import checked
from vitprune.report.sweep import Entry, build_sweep, forget_sweep, write_sweep
from vitprune.training import Checkpoints, Progress, Recipe, State

WarmStart = Literal["each", "shared"]
"""Every run has its own warm start; or that of the highest keep ratio begins them all."""

_RESUME = "vitprune sweep with the same options and --resume goes on"


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep needs beside the model, the data and the recipe.

    Attributes:
        plans: one a run, the highest keep ratio first.
        others: dense models to compare with, by label.
        settings: of every run but for its plan and folder; `output` is the folder of the sweep.
        warm_start: see `WarmStart`.
    """

    plans: Sequence[Sparsity]
    others: Mapping[str, Loaded]
    settings: RunSettings
    warm_start: WarmStart = "each"


def check_others(dense: Loaded, others: Mapping[str, Loaded]) -> None:
    """Make sure that other models answer the same question about the same images.

    Raises:
        UsageError: one is sparse, or has other classes or another input size; names it.
    """
    size = input_size(dense.model)
    for label, other in others.items():
        if other.sparse is not None:
            raise UsageError(f"'{label}' is sparse, and --also is for dense models", "leave it out")
        counts = [getattr(model, "num_classes", 0) for model in (dense.model, other.model)]
        if counts[0] != counts[1]:
            raise UsageError(
                f"'{label}' has {counts[1]} classes and {dense.name} has {counts[0]}, so they cannot be compared",
                f"name weights of the same classes: --also {label}=FILE",
            )
        if dense.class_names and other.class_names and dense.class_names != other.class_names:
            first = next(pair for pair in zip(dense.class_names, other.class_names, strict=True) if pair[0] != pair[1])
            raise UsageError(
                f"'{label}' has other classes than {dense.name}: {first[1]} where that has {first[0]}",
                f"name weights of the same classes: --also {label}=FILE",
            )
        if input_size(other.model) != size:
            theirs, ours = ("x".join(map(str, each)) for each in (input_size(other.model), size))
            raise UsageError(
                f"'{label}' takes images of {theirs} and {dense.name} of {ours}; their speed is compared at one size",
                "--img-size builds all of them for one size",
            )


def sweep(loaded: Loaded, data: Data, recipe: Recipe, this: SweepSettings, listener: Listener) -> dict[str, Any]:
    """Train a sparse model for each plan, then measure all models together: writes the sweep's folder.

    Everything that can be wrong with the input is found before the folder is made. A run that fails does not end the
    others.

    Returns:
        The content of sweep.json.

    Raises:
        UsageError: the settings do not go together, or a run that is there has others.
        Interrupted: the user stopped it; complete runs stay.
        Preempted: SIGTERM came; a training checkpoint is written.
        VitpruneError: every run failed.
    """
    check_others(loaded, this.others)
    if this.warm_start == "shared" and recipe.warm_start_steps == 0:
        raise UsageError("there is no warm start to share: it has 0 steps", "leave out --warm-start shared")
    runs = [_one(loaded, data, recipe, this, plan) for plan in this.plans]
    done = {each.label: report for each in runs if (report := each.complete()) is not None}
    for each in runs:
        if each.label not in done:
            each.check_checkpoints()
    folder = this.settings.output
    RunFolder(folder).create(needed_bytes=2 * len(runs) * num_bytes(loaded.model))
    forget_sweep(folder)
    failed: dict[str, VitpruneError] = {}
    try:
        shared = _warm_start(runs, len(done) == len(runs), listener)
        for number, each in enumerate(runs, start=1):
            if each.label in done:
                listener.begin(f"run {number} of {len(runs)}: {each.label} is complete", None)
                continue
            listener.begin(f"run {number} of {len(runs)}: {each.label}", None)
            try:
                done[each.label] = each.run(shared, listener)
            except (Interrupted, Preempted):
                raise
            except VitpruneError as error:
                failed[each.label] = error
        if not done:
            raise next(iter(failed.values()))
        return _conclude(runs, done, failed, shared, listener)
    except (Interrupted, KeyboardInterrupt) as error:
        said = error.message if isinstance(error, Interrupted) else "stopped"
        raise Interrupted(f"{said}; {len(done)} of {len(runs)} runs are complete", _RESUME) from error
    except Preempted as error:
        raise Preempted(f"{error.message}; {len(done)} of {len(runs)} runs are complete", _RESUME) from error


@dataclass(frozen=True)
class _One:
    """A run of a sweep."""

    loaded: Loaded
    data: Data
    recipe: Recipe
    sweep: SweepSettings
    settings: RunSettings
    metadata: Metadata

    @property
    def label(self) -> str:
        return self.settings.sparsity.label

    @property
    def folder(self) -> Path:
        return self.settings.output

    @property
    def warm_start_of(self) -> str | None:
        """The plan whose warm start it begins with, if that is another than its own."""
        first = self.sweep.plans[0].label
        return first if self.sweep.warm_start == "shared" and first != self.label else None

    def complete(self) -> Report | None:
        """Its report, if the sweep is resumed and this run is complete.

        Raises:
            UsageError: it has other settings; names the first that differs.
        """
        path = RunFolder(self.folder).report
        if not (self.settings.resume and path.is_file()):
            return None
        report = checked(Report, read_json(path), path)
        then = _what_it_is(read_metadata(RunFolder(self.folder).weights), report.training.recipe)
        now = _what_it_is(self.metadata, recipe_settings(self.recipe))
        seen = report.data
        then |= {"data": seen.name, "warm_start_of": report.training.warm_start_of}
        now |= {"data": self.data.name, "warm_start_of": self.warm_start_of}
        for part, count in (
            ("train", seen.num_train_images),
            ("val", seen.num_val_images + seen.num_unreadable_val),
        ):
            expected = count_images(self.data.train if part == "train" else self.data.val)
            if expected is not None:
                then[f"num_{part}_images"], now[f"num_{part}_images"] = count, expected
        for name, value in now.items():
            if json.loads(json.dumps(value)) != then.get(name):
                self._refuse(name, then.get(name), value)
        return report

    def check_checkpoints(self) -> None:
        """Make sure that what a cut run left fits.

        Raises:
            UsageError: it has other settings; names the first that differs.
        """
        state = self.checkpoints().latest() if self.settings.resume else None
        if state is not None:
            before = state.about["progress"].get("warm_start_of")
            if before != self.warm_start_of:
                self._refuse("warm_start_of", before, self.warm_start_of)

    def checkpoints(self) -> Checkpoints:
        return checkpoints_of(self.loaded, self.recipe, self.settings)

    def shared_checkpoints(self) -> Checkpoints:
        """Of the warm start of all runs, as if it were this run's: they lie in the sweep's folder."""
        return checkpoints_of(self.loaded, self.recipe, replace(self.settings, output=self.sweep.settings.output))

    def _refuse(self, name: str, before: Any, now: Any) -> None:
        raise UsageError(
            f"the run in '{self.folder}' has other settings: {name} is {before!r} there, {now!r} now",
            "resume with the same settings, or start anew with --overwrite",
        )

    def run(self, shared: State | None, listener: Listener) -> Report:
        """Do it, and return its report."""
        begin = shared
        if shared is not None:
            progress = shared.about["progress"] | {"warm_start_of": self.warm_start_of}
            if self.warm_start_of is not None:  # its steps are this model's; time and images were another run's
                progress |= {"num_images": 0, "seconds": 0.0, "seconds_by_part": {}}
            begin = State(shared.tensors, shared.about | {"progress": progress})
        settings = replace(self.settings, begin=begin)
        return run(self.loaded, _afresh(self.data), self.recipe, settings, listener)[1]


def _one(loaded: Loaded, data: Data, recipe: Recipe, this: SweepSettings, plan: Sparsity) -> _One:
    settings = replace(this.settings, sparsity=plan, output=this.settings.output / plan.label.replace(" ", ""))
    student = new_student(loaded.model, plan, recipe.seed)
    return _One(loaded, data, recipe, this, settings, describe_run(student, loaded, data, plan))


def _what_it_is(metadata: Metadata, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must have in common to be the same."""
    later = {"training", "accuracy", "versions"}
    of_recipe = {f"recipe.{key}": value for key, value in recipe.items()}
    return metadata.model_dump(mode="json", exclude=later) | of_recipe


def _afresh(data: Data) -> Data:
    """The same images, with unreadable ones still to be counted."""
    return replace(data, faults=Faults(allowed_share=1.0))


def _warm_start(runs: Sequence[_One], complete: bool, listener: Listener) -> State | None:
    """With a shared warm start, the first run's state after it; it is the same as if that run had done it alone."""
    first = runs[0]
    if first.sweep.warm_start == "each" or complete:
        return None
    checkpoints = first.shared_checkpoints()
    if not first.settings.resume:
        checkpoints.clear()
    state = checkpoints.latest() if first.settings.resume else None
    if state is not None and state.about["progress"]["steps_done"] == first.recipe.warm_start_steps:
        return state
    listener.begin(f"warm start for all runs, as for {first.label}", None)
    recipe = first.recipe.model_copy(update={"steps": 0, "epochs": None})
    student = new_student(first.loaded.model, first.settings.sparsity, recipe.seed)
    with stopping_on_sigterm(checkpoints):
        fit(
            *(first.loaded.model, student, first.data, recipe, first.settings.device, listener, Progress()),
            checkpoints=checkpoints,
            resume=state,
        )
    return checkpoints.latest()


def _conclude(
    runs: Sequence[_One],
    done: Mapping[str, Report],
    failed: Mapping[str, VitpruneError],
    shared: State | None,
    listener: Listener,
) -> dict[str, Any]:
    """Measure all models side by side, and write what was found."""
    started = time.perf_counter()
    first = runs[0]
    this, loaded, recipe, data = first.sweep, first.loaded, first.recipe, _afresh(first.data)
    settings = this.settings
    entries = {"dense": Entry("dense", loaded.model, loaded.name)}
    for each in runs:
        if each.label in done:
            sparse, _ = load_sparse(RunFolder(each.folder).weights)
            keep = each.settings.sparsity.keep
            entries[each.label] = Entry("sparse", sparse, loaded.name, keep, each.folder.name, done[each.label])
    entries |= {label: Entry("other", other.model, other.name) for label, other in this.others.items()}
    predictions = _predictions(entries, data, recipe, settings, listener)
    models = {label: entry.model for label, entry in entries.items()}
    timings = bench(models, settings.device, settings.eval_precision, settings.bench_seconds, listener)
    about = {
        "model": loaded.name,
        "failed": [
            {"label": each.label, "keep": each.settings.sparsity.keep, "error": failed[each.label].message}
            for each in runs
            if each.label in failed
        ],
        "warm_start": {
            "mode": this.warm_start,
            "of": first.label if this.warm_start == "shared" else None,
            "steps": recipe.warm_start_steps,
        },
        "recipe": recipe.model_dump(mode="json"),
        "data": {
            "name": data.name,
            "num_train_images": count_images(data.train),
            "num_val_images": predictions["dense"].num_images,
            "num_unreadable_val": data.faults.count,
            "note": data.note,
        },
        "commands": dict(settings.commands or {}),
        "precision": settings.eval_precision,
        "device": str(settings.device),
        "wall_s": sum(report.wall_s for report in done.values()) + time.perf_counter() - started,
        "environment": describe_environment(),
    }
    result = build_sweep(entries, predictions, timings, about)
    write_sweep(settings.output, result)
    if not failed:
        first.shared_checkpoints().clear()
    return result


def _predictions(
    entries: Mapping[str, Entry], data: Data, recipe: Recipe, settings: RunSettings, listener: Listener
) -> dict[str, Predictions]:
    """Of all models on the same images, in one pass for all that want them prepared alike; in the entries' order."""
    groups: dict[str, dict[str, nn.Module]] = {}
    for label, entry in entries.items():
        wanted = preprocessing(entries["dense"].model if entry.kind == "sparse" else entry.model)
        groups.setdefault(json.dumps(wanted, sort_keys=True), {})[label] = entry.model
    found: dict[str, Predictions] = {}
    for models in groups.values():
        reference = next(iter(models))
        predictions = evaluate(
            models,
            data if "dense" in models else _afresh(data),
            listener,
            batch_size=min(recipe.batch_size, EVAL_BATCH_SIZE),
            num_workers=recipe.workers(),
            device=settings.device,
            precision=settings.eval_precision,
            reference=reference,
        )
        if "dense" not in models:  # whose answers are what divergence is told from
            predictions = {label: replace(each, kl=None) for label, each in predictions.items()}
        found |= predictions
    if any(not torch.equal(each.labels, found["dense"].labels) for each in found.values()):
        raise DataError("the images that could be read were not the same for all models", "repair the data set")
    return {label: found[label] for label in entries}
