"""The results of a run: its report, built from what was measured, and the files that show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.backbones import input_size
from vitprune.checkpoint.metadata import Metadata
from vitprune.common.files import write_json, write_text
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.common.progress import SILENT, Listener
from vitprune.common.run_folder import RunFolder
from vitprune.data import Data, count_classes, count_images, readable_names
from vitprune.evaluation import compared
from vitprune.measure import Timing, count_macs, count_params, describe_environment
from vitprune.model import SparseViT
from vitprune.report.card import KEPT_CARD, write_card
from vitprune.report.page import render_page
from vitprune.report.publishable import publishable
from vitprune.report.runs import read_run
from vitprune.report.samples import choose_images
from vitprune.report.schema import (
    Accuracy,
    AtKeep,
    ClassRow,
    Correct,
    DataSummary,
    Delta,
    Rare,
    Report,
    Side,
    Target,
    Training,
)
from vitprune.tasks import Predictions, Results, Task, class_accuracy, on_rare_classes, task_named

_HARDLY = 5
"""A class of fewer training images is rare."""


def build_report(
    *,
    metadata: Metadata,
    models: Mapping[str, nn.Module],
    ratios: Mapping[str, SparseViT],
    results: Mapping[str, Results],
    task: Task,
    timings: Sequence[Timing],
    coverage: Mapping[str, float] | None,
    target: Mapping[str, Any] | None,
    training: Mapping[str, Any],
    data: Data,
    precision: str,
    device: str,
    seconds: float,
    commands: Mapping[str, str] | None = None,
) -> Report:
    """Everything that was measured, as one report.

    Models and results are "dense", "random" (the same number of tokens, at random) and "sparse", on the same
    images; timings are of "dense" and "sparse", from one benchmark. `ratios` are those of a model of a range beside its
    own, measured likewise. `coverage` is that of the object in percent by model, `target` a speed target, predicted and
    measured, `training` the recipe and what was done, see `vitprune.training.Progress`. Precision and device are those
    of accuracy and speed; `seconds` is the duration of the run so far, in seconds.
    """
    size = input_size(models["dense"])  # of LV-ViT, the sparse model does not say
    dense, sparse = (Side(**model_figures(name, models[name], size, results, timings)) for name in ("dense", "sparse"))
    others = {name: Side(**model_figures(name, each, size, results, timings)) for name, each in ratios.items()}
    by_class = {"dense_top1_pct": results["dense"], "sparse_top1_pct": results["sparse"]}
    names = data.val.class_names | dict(enumerate(metadata.class_names or []))
    plan = ("model", "label", "keep", "keep_range", "schedule", "pruned", "align", "num_patches", "stages")
    return Report(
        schema_version=SCHEMA_VERSION,
        task=task.name,
        **{key: getattr(metadata, key) for key in plan},
        dense=dense,
        sparse=sparse,
        random=Accuracy(**results["random"].summary() | results["random"].fidelity(results["dense"])),
        delta=_delta("sparse", dense, sparse, results, task, timings),
        keeps=[
            AtKeep(keep=ratios[name].keep, side=side, delta=_delta(name, dense, side, results, task, timings))
            for name, side in others.items()
        ],
        correct=_correct(results["dense"], results["sparse"]),
        classes=[ClassRow(**row) for row in class_accuracy(names, **by_class)],
        rare=_rare(data, training.get("shown", ()), results["dense"], results["sparse"]),
        coverage=None if coverage is None else {f"{name}_pct": share for name, share in coverage.items()},
        target=None if target is None else Target(**target),
        training=Training(**{key: value for key, value in training.items() if key != "shown"}),
        data=DataSummary(
            name=data.name,
            num_train_images=count_images(data.train),
            num_val_images=results["dense"].num_images,
            num_unreadable_val=data.faults.count,
            unreadable_val=data.faults.names,
            how_classes=data.how_classes or None,
            left_out=data.left_out or None,
            remarks=data.faults.remarks,
            note=data.note,
        ),
        commands=dict(commands or {}),
        precision=precision,
        device=device,
        seconds=seconds,
        environment=describe_environment(),
    )


def accuracy_of(report: Report) -> dict[str, Any]:
    """What a file's header says of its accuracy; without paths, for the file may be published."""
    content = publishable(report.as_json())
    fidelity = {figure.key: content["delta"].get(figure.key) for figure in task_named(report.task).fidelity}
    accuracy = {name: content[name] for name in ("dense", "sparse", "data")} | {"fidelity": fidelity}
    if report.keeps:
        accuracy["keeps"] = [{"keep": row["keep"], **row["side"], **row["delta"]} for row in content["keeps"]]
    return accuracy


def write_results(
    folder: Path,
    report: Report,
    models: Mapping[str, nn.Module],
    data: Data,
    metadata: Metadata,
    listener: Listener = SILENT,
) -> None:
    """Write keepmaps.json, report.json, report.html and, where there is no README.md, the model card.

    Page and card come last: whatever goes wrong with them, `vitprune report` makes them again.

    The models, "dense" and "sparse", are on one device; the transform of `data.val` is set; the metadata is complete.

    Raises:
        OutputError: a file cannot be written.
    """
    sparse = models["sparse"]
    assert isinstance(sparse, SparseViT)
    names = readable_names(data.val.class_names | dict(enumerate(metadata.class_names or [])), sparse.num_classes)
    chosen = choose_images(sparse, models["dense"], data, names, torch.device(report.device))
    files = RunFolder(folder)
    if chosen is not None:
        write_json(files.keep_maps, chosen.model_dump(mode="json", by_alias=True))
    write_json(files.report, report.as_json())
    run = read_run(folder)
    write_text(files.page, render_page(run))
    if not write_card(folder, run, metadata):
        listener.say(KEPT_CARD.format(files.card))


def model_figures(
    name: str,
    model: nn.Module,
    size: tuple[int, int, int],
    results: Mapping[str, Results],
    timings: Sequence[Timing],
) -> dict[str, Any]:
    """Accuracy, cost on images of `size` (C, H, W), and speed of one of several models, for JSON."""
    rows = [asdict(timing) for timing in timings if timing.model == name]
    return {
        **results[name].summary(),
        "gmacs": count_macs(model, size) / 1e9,
        "params_m": count_params(model) / 1e6,
        "speed": [{key: value for key, value in row.items() if key != "model"} for row in rows],
    }


def _delta(
    name: str, dense: Side, sparse: Side, results: Mapping[str, Results], task: Task, timings: Sequence[Timing]
) -> Delta:
    to_random = results[name].change(results["random"])
    if task.change is not None:
        key = task.change.key
        to_random = {f"{key}_over_random": to_random[key], f"{key}_over_random_ci95": to_random[f"{key}_ci95"]}
    return Delta(
        **compared(name, results, timings),
        **to_random,
        gmacs_pct=100 * (sparse.gmacs / dense.gmacs - 1),
    )


def _correct(dense: Results, sparse: Results) -> Correct | None:
    """None without labels, and where the task is no classification."""
    if not (isinstance(dense, Predictions) and isinstance(sparse, Predictions) and dense.labelled):
        return None
    return Correct(
        both_right=int((dense.correct & sparse.correct).sum()),
        dense_only=int((dense.correct & ~sparse.correct).sum()),
        sparse_only=int((~dense.correct & sparse.correct).sum()),
        neither=int((~dense.correct & ~sparse.correct).sum()),
    )


def _rare(data: Data, shown: Sequence[int], dense: Results, sparse: Results) -> Rare | None:
    """Of classes that the training images hardly show, by their labels or else by what the dense model saw there."""
    counts: Mapping[int, float] | None = count_classes(data.train)
    by = "labels" if counts is not None else "predictions"
    if counts is None:
        repeats = max(1.0, sum(shown) / (count_images(data.train) or math.inf))
        counts = {index: number / repeats for index, number in enumerate(shown)}
    found = on_rare_classes(counts, _HARDLY, dense, sparse)
    return None if found is None else Rare(fewer_than=_HARDLY, counted_by=by, **found)
