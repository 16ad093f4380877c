"""Several keep ratios, one run after another, then all of them beside the dense model and other dense models."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vitprune.adaptive import AdaptiveViT
from vitprune.backbones import input_size, preprocessing
from vitprune.checkpoint.sparse_file import load_sparse
from vitprune.common.progress import Listener
from vitprune.common.run_folder import RunFolder
from vitprune.common.stopping import stopped_error
from vitprune.data import Data, count_images, eval_transform
from vitprune.errors import DataError, Interrupted, Preempted, UsageError, VitpruneError
from vitprune.jobs.identity import identity
from vitprune.jobs.side_by_side import bench, evaluate, has_accuracy, over_images
from vitprune.jobs.sparsify import describe_run, new_student, num_bytes, run
from vitprune.jobs.train_run import RunSettings
from vitprune.loading.load import Loaded
from vitprune.measure import describe_environment
from vitprune.model import SparseViT
from vitprune.report.runs import read_run
from vitprune.report.schema import Report
from vitprune.report.sweep import Entry, build_sweep, forget_sweep, with_dense, write_sweep
from vitprune.schedule import Sparsity
from vitprune.tasks import Results, Task, task_named
from vitprune.training.checkpoints import check_same
from vitprune.training.recipe import Recipe

_RESUME = "vitprune sweep with the same options and --resume resumes it"


def _check_others(dense: Loaded, others: Mapping[str, Loaded]) -> None:
    """Make sure that other models predict the same classes of images of the same size.

    Raises:
        UsageError: one is sparse, or has other classes or another input size; names it.
    """
    size = input_size(dense.model)
    for label, other in others.items():
        if other.sparse is not None:
            raise UsageError(f"'{label}' is sparse, and --also is for dense models", "leave it out")
        if dense.task != other.task:
            raise UsageError(
                f"'{label}' is for {other.task} and {dense.name} for {dense.task}, so they cannot be compared",
                "name a model of the same task",
            )
        ours, theirs = (getattr(model, "num_classes", 0) for model in (dense.model, other.model))
        if ours != theirs and dense.task in ("classification", "multilabel", "regression"):
            raise UsageError(
                f"'{label}' has {theirs} classes and {dense.name} has {ours}, so they cannot be compared",
                f"name weights of the same classes: --also {label}=FILE",
            )
        if dense.class_names and other.class_names and dense.class_names != other.class_names:
            first = next(pair for pair in zip(dense.class_names, other.class_names, strict=True) if pair[0] != pair[1])
            raise UsageError(
                f"'{label}' has other classes than {dense.name}: {first[1]} where that has {first[0]}",
                f"name weights of the same classes: --also {label}=FILE",
            )
        if input_size(other.model) != size:
            needed, given = ("x".join(map(str, each)) for each in (input_size(other.model), size))
            raise UsageError(
                f"'{label}' takes images of {needed} and {dense.name} of {given}; their speed is compared at one size",
                "--img-size builds all of them for one size",
            )


def sweep(
    loaded: Loaded,
    data: Data,
    recipe: Recipe,
    plans: Sequence[Sparsity],
    others: Mapping[str, Loaded],
    settings: RunSettings,
    listener: Listener,
    *,
    ratios: Sequence[float] = (),
    trained: SparseViT | None = None,
) -> dict[str, Any]:
    """Train a sparse model for each plan, then measure all models together: writes the sweep's folder.

    Everything that can be wrong with the input is found before the folder is made. A run that fails does not end the
    others. When a sweep is resumed, a run whose folder holds a report is kept as it is.

    Args:
        loaded: the dense model.
        data: the images.
        recipe: of every run.
        plans: one a run, the highest keep ratio first; none of a model that is trained already.
        others: dense models to compare with, by label.
        settings: of every run but for its plan and folder; `output` is the folder of the sweep.
        listener: hears how far it is.
        ratios: of models that are trained for a range of keep ratios, those that are measured.
        trained: such a model, instead of training.

    Returns:
        The content of sweep.json.

    Raises:
        UsageError: the settings do not go together, or a run to be resumed or kept has others.
        Interrupted: the user stopped it; complete runs are kept.
        Preempted: SIGTERM or SIGHUP came; likewise.
        VitpruneError: every run failed.
    """
    _check_others(loaded, others)
    task = task_named(loaded.task, loaded.class_vectors)
    if others and not task.comparable and not has_accuracy(task, data):
        raise UsageError(
            f"--also needs something that models trained apart have in common, and {task.no_accuracy}", "leave it out"
        )
    for plan in plans:
        describe_run(new_student(loaded.model, plan, recipe.seed, loaded.task), loaded, data, recipe, plan)
        kept = RunFolder(settings.output.path / plan.slug)
        if settings.resume and kept.is_complete:
            before = read_run(kept.path).report.training.identity
            check_same(kept.path, before, identity(loaded, data, recipe, plan))
    with settings.output.claimed(needed_bytes=2 * len(plans) * num_bytes(loaded.model)) as folder:
        forget_sweep(folder.path)
        if trained is None:
            result = _runs(loaded, data, recipe, plans, others, settings, listener, ratios)
        else:
            entries = {"dense": Entry("dense", loaded.model, loaded.name), **_entries(trained, loaded.name, ratios)}
            entries |= _other_entries(others)
            result = _measured(loaded, entries, data, recipe, settings, listener) | {"failed": []}
        write_sweep(folder.path, result)
    return result


def _runs(
    loaded: Loaded,
    data: Data,
    recipe: Recipe,
    plans: Sequence[Sparsity],
    others: Mapping[str, Loaded],
    settings: RunSettings,
    listener: Listener,
    ratios: Sequence[float],
) -> dict[str, Any]:
    folder, num_runs = settings.output.path, len(plans)
    runs = [replace(settings, sparsity=plan, output=RunFolder(folder / plan.slug)) for plan in plans]
    entries = {"dense": Entry("dense", loaded.model, loaded.name)}
    failed: dict[str, VitpruneError] = {}
    num_complete = 0
    try:
        for number, each in enumerate(runs, start=1):
            label, complete = each.sparsity.label, each.resume and each.output.is_complete
            listener.begin(f"run {number} of {num_runs}: {label}{' is complete and kept' if complete else ''}", None)
            try:
                if not complete:
                    run(loaded, data, recipe, each, listener)
                sparse, _ = load_sparse(each.output.weights)
                report = read_run(each.output.path).report
                entries |= _entries(sparse, loaded.name, ratios, each.output.path.name, report)
                num_complete += 1
            except (Interrupted, Preempted, UsageError):
                raise
            except VitpruneError as error:
                failed[label] = error
        if len(failed) == num_runs:
            raise next(iter(failed.values()))
        entries |= _other_entries(others)
        result = _measured(loaded, entries, data, recipe, settings, listener)
    except (Interrupted, KeyboardInterrupt, Preempted) as error:
        stopped = stopped_error(error, "", None) if isinstance(error, KeyboardInterrupt) else error
        stopped.message += f"; {num_complete} of {num_runs} runs are complete"
        stopped.hint = _RESUME
        stopped.saved = {"output": str(folder), "num_complete": num_complete, "num_runs": num_runs}
        raise stopped from error
    result["failed"] = [
        {"label": plan.label, "keep": plan.keep, "error": failed[plan.label].message}
        for plan in plans
        if plan.label in failed
    ]
    return result


def _entries(
    sparse: SparseViT, name: str, ratios: Sequence[float], run: str | None = None, report: Report | None = None
) -> dict[str, Entry]:
    """A model by its label; of one of a range one for each ratio."""
    models = [sparse] if sparse.keep_range is None else [sparse.at(keep) for keep in ratios]
    return {each.label: Entry("sparse", each, name, each.keep or 1.0, run, report) for each in models}


def _other_entries(others: Mapping[str, Loaded]) -> dict[str, Entry]:
    return {label: Entry("other", other.model, other.name) for label, other in others.items()}


def _measured(
    loaded: Loaded,
    entries: Mapping[str, Entry],
    data: Data,
    recipe: Recipe,
    settings: RunSettings,
    listener: Listener,
) -> dict[str, Any]:
    """All models side by side: the content of sweep.json."""
    started = time.perf_counter()
    task = task_named(loaded.task, loaded.class_vectors)
    results = _results(task, entries, data, recipe, settings, listener)
    models, behind = {label: entry.model for label, entry in entries.items()}, with_dense(entries, results)
    sizes, chosen = settings.bench_batch_sizes, behind.chosen
    if chosen is not None and chosen.went_on_pct and behind.saves:
        data.val.transform = eval_transform(loaded.model)
        adaptive = AdaptiveViT([models[chosen.first], loaded.model], chosen.threshold)
        models["adaptive"] = over_images(adaptive, data.val, sizes)
    timings = bench(models, settings.device, settings.eval_precision, settings.bench_seconds, listener, sizes)
    about = {
        "model": entries["dense"].name,
        "recipe": recipe.model_dump(mode="json") if recipe.trains else {},
        "data": {
            "name": data.name,
            "num_train_images": count_images(data.train),
            "num_val_images": results["dense"].num_images,
            "num_unreadable_val": data.faults.count,
            "left_out": data.left_out or None,
            "remarks": data.faults.remarks,
            "note": data.note,
        },
        "commands": dict(settings.commands or {}),
        "precision": settings.eval_precision,
        "device": str(settings.device),
        "seconds": sum({entry.run: entry.report.seconds for entry in entries.values() if entry.report}.values())
        + time.perf_counter()
        - started,
        "environment": describe_environment(),
    }
    return build_sweep(task, entries, results, timings, behind, about)


def _results(
    task: Task,
    entries: Mapping[str, Entry],
    data: Data,
    recipe: Recipe,
    settings: RunSettings,
    listener: Listener,
) -> dict[str, Results]:
    """Of all models on the same images, in one pass for all that need them prepared alike; in the entries' order."""
    groups: dict[str, dict[str, nn.Module]] = {}
    for label, entry in entries.items():
        prepared = preprocessing(entries["dense"].model if entry.kind == "sparse" else entry.model)
        groups.setdefault(json.dumps(prepared, sort_keys=True), {})[label] = entry.model
    found: dict[str, Results] = {}
    for models in groups.values():
        found |= evaluate(models, data, recipe, settings.device, settings.eval_precision, listener, task=task)
    if any(not torch.equal(each.targets, found["dense"].targets) for each in found.values()):
        raise DataError("the images that could be read were not the same for all models", "repair the data set")
    return {label: found[label] for label in entries}
