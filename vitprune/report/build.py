"""report.json: every figure of a run, with units in the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from vitprune.backbones import input_size
from vitprune.checkpoint.metadata import Metadata
from vitprune.data import Data, count_images
from vitprune.evaluation import Predictions, class_accuracy, paired_difference
from vitprune.measure import Timing, count_macs, count_params, describe_environment
from vitprune.report.schema import SCHEMA_VERSION


def build_report(
    *,
    metadata: Metadata,
    models: Mapping[str, nn.Module],
    predictions: Mapping[str, Predictions],
    timings: Sequence[Timing],
    coverage: Mapping[str, float] | None,
    target: Mapping[str, Any] | None,
    training: Mapping[str, Any],
    data: Data,
    precision: str,
    device: str,
    wall_s: float,
    commands: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        metadata: of the sparse model.
        models: "dense", "random" (the same number of tokens, at random) and "sparse".
        predictions: of the same three, on the same images.
        timings: of "dense" and "sparse", from one benchmark.
        coverage: object coverage in percent by model, where known.
        target: a speed that was promised, and what came of it.
        training: recipe and what was done.
        data: the images.
        precision: of the accuracy and speed figures.
        device: of the accuracy and speed figures.
        wall_s: duration of the run so far, in seconds.
        commands: how to do it again, by what they do; None where it was not begun by a command.
    """
    size = input_size(models["dense"])
    sides = {
        name: predictions[name].summary()
        | {"gmacs": count_macs(models[name], size) / 1e9, "params_m": count_params(models[name]) / 1e6}
        | {"speed": [_speed(row) for row in timings if row.model == name]}
        for name in ("dense", "sparse")
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "model": metadata.model,
        "label": metadata.label,
        "keep": metadata.keep,
        "schedule": metadata.schedule,
        "dropped": metadata.dropped,
        "align": metadata.align,
        "num_patches": metadata.num_patches,
        "stages": [stage.model_dump() for stage in metadata.stages],
        "dense": sides["dense"],
        "sparse": sides["sparse"],
        "random": predictions["random"].summary(),
        "delta": _delta(sides, predictions),
        "answers": _answers(predictions),
        "classes": _classes(predictions, metadata, data),
        "coverage": None if coverage is None else {f"{name}_pct": share for name, share in coverage.items()},
        "target": None if target is None else dict(target),
        "training": dict(training),
        "data": {
            "name": data.name,
            "num_train_images": count_images(data.train),
            "num_val_images": predictions["dense"].num_images,
            "num_unreadable_val": data.faults.count,
            "unreadable_val": data.faults.names,
            "note": data.note,
        },
        "commands": dict(commands or {}),
        "precision": precision,
        "device": device,
        "wall_s": wall_s,
        "environment": describe_environment(),
    }


def _delta(sides: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    dense, sparse = sides["dense"], sides["sparse"]
    to_dense = paired_difference(predictions["sparse"], predictions["dense"])
    to_random = paired_difference(predictions["sparse"], predictions["random"])
    return {
        "top1_points": None if to_dense is None else to_dense.points,
        "top1_points_ci95": None if to_dense is None else [to_dense.low, to_dense.high],
        "top1_points_over_random": None if to_random is None else to_random.points,
        "top1_points_over_random_ci95": None if to_random is None else [to_random.low, to_random.high],
        "agreement_pct": predictions["sparse"].agreement_pct(predictions["dense"]),
        "kl": predictions["sparse"].mean_kl,
        "kl_random": predictions["random"].mean_kl,
        "gmacs_pct": 100 * (sparse["gmacs"] / dense["gmacs"] - 1),
        "speedup": [
            {
                "batch_size": after["batch_size"],
                "speedup": after["images_per_s"] / before["images_per_s"],
                "slower": after["images_per_s"] < before["images_per_s"],
            }
            for before, after in zip(dense["speed"], sparse["speed"], strict=True)
        ],
    }


def _answers(predictions: Mapping[str, Predictions]) -> dict[str, int] | None:
    """How many images each model got right; None without labels."""
    dense, sparse = predictions["dense"], predictions["sparse"]
    if not dense.labelled:
        return None
    return {
        "both_right": int((dense.correct & sparse.correct).sum()),
        "dense_only": int((dense.correct & ~sparse.correct).sum()),
        "sparse_only": int((~dense.correct & sparse.correct).sum()),
        "neither": int((~dense.correct & ~sparse.correct).sum()),
    }


def _classes(predictions: Mapping[str, Predictions], metadata: Metadata, data: Data) -> list[dict[str, Any]]:
    names = data.val.class_names | dict(enumerate(metadata.class_names or []))
    return [
        {
            "index": row.index,
            "name": names.get(row.index),
            "num_images": row.num_images,
            "dense_top1_pct": row.top1_pct[0],
            "sparse_top1_pct": row.top1_pct[1],
        }
        for row in class_accuracy(predictions["dense"], predictions["sparse"])
    ]


def _speed(row: Timing) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "model"}
