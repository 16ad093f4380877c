"""Finished runs, made up: what a page is drawn from and what is pushed."""

import base64
import io
import json

import torch
from PIL import Image
from safetensors.torch import load_file

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.report import Report, accuracy_of

CLASSES = ["tench", "cat <b>bold</b>", 'dog"><script>alert(1)</script>']


def _side(top1, gmacs, rates):
    return {
        "top1_pct": top1,
        "top5_pct": 93.94,
        "num_images": 1172,
        "gmacs": gmacs,
        "params_m": 5.717416,
        "speed": [
            {"batch_size": size, "images_per_s": rate, "latency_ms_p50": 1000 * size / rate, "num_runs": 9}
            for size, rate in zip((1, 32), rates, strict=True)
        ],
    }


def make_report(**changes):
    """report.json as this version writes it."""
    dense, sparse = _side(75.0853, 1.2536832, (45.4, 57.8)), _side(74.49, 0.810086, (40.1, 84.3))
    report = {
        "schema_version": 2,
        "model": "deit_tiny_patch16_224.fb_in1k",
        "task": "classification",
        "label": "keep 0.7",
        "keep": 0.7,
        "keep_range": None,
        "schedule": "late",
        "pruned": "merge",
        "align": 1,
        "num_patches": 6,
        "stages": [{"block": 3, "ratio": 0.67, "num_tokens": 4}, {"block": 6, "ratio": 0.34, "num_tokens": 2}],
        "dense": dense,
        "sparse": sparse,
        "random": {
            "top1_pct": 71.587,
            "top5_pct": 92.4,
            "num_images": 1172,
            "agreement_pct": 81.2,
            "kl": 0.10275,
        },
        "delta": {
            "top1_points": -0.5953,
            "top1_points_ci95": [-1.6211, 0.4305],
            "top1_points_over_random": 2.903,
            "top1_points_over_random_ci95": [1.6, 4.2],
            "agreement_pct": 94.1126,
            "kl": 0.02322,
            "gmacs_pct": -35.3835,
            "speedup": [
                {"batch_size": 1, "speedup": 40.1 / 45.4, "slower": True},
                {"batch_size": 32, "speedup": 84.3 / 57.8, "slower": False},
            ],
        },
        "keeps": [],
        "correct": {"both_right": 850, "dense_only": 30, "sparse_only": 23, "neither": 269},
        "classes": [
            {"index": i, "name": name, "num_images": 3, "dense_top1_pct": before, "sparse_top1_pct": after}
            for i, (name, before, after) in enumerate(
                zip(CLASSES, (100.0, 200 / 3, 100 / 3), (100.0, 100 / 3, 200 / 3), strict=True)
            )
        ],
        "rare": None,
        "coverage": None,
        "target": None,
        "training": {
            "recipe": {"name": "short", "steps": 500, "weights": {"kl": 1.0, "<i>x</i>": None}, "labels": True},
            "steps_done": 8,
            "num_steps": 8,
            "num_images": 256,
            "seconds": 12.5,
            "seconds_split": {"data": 2.5, "<u>teacher": 10.0},
            "num_unreadable": 1,
            "unreadable": ["/home/somebody/images/train/cat/1.jpg"],
            "phases": {"pretraining": 4, "deployed": 4},
        },
        "data": {
            "name": "/home/somebody/images",
            "num_train_images": 3000,
            "num_val_images": 1172,
            "num_unreadable_val": 1,
            "unreadable_val": ["/home/somebody/elsewhere/<s>2.jpg"],
            "how_classes": "in the order of their names: cat, dog",
            "left_out": "2 x .txt",
            "remarks": ["3 image(s) of more than 8 bits, scaled to 8"],
            "note": "2 of 10 shards are missing",
        },
        "commands": {
            "sparsify": "vitprune sparsify deit_tiny --data 'path/to/<em>images'",
        },
        "precision": "fp32",
        "device": "cpu",
        "seconds": 123.4,
        "environment": {"torch": "2.15.0", "gpus": [{"name": "<GPU>", "memory_mib": 3}], "mps": False},
    }
    return report | changes


_OF_TASKS = {
    "classification": {},
    "multilabel": {
        "dense": {"map_pct": 80.5, "f1_pct": 70.25},
        "sparse": {"map_pct": 79.75, "f1_pct": 69.5},
        "random": {"map_pct": 60.0, "f1_pct": 51.0, "label_agreement_pct": 91.0, "kl": 0.2},
        "delta": {"map_points": -0.75, "label_agreement_pct": 98.5, "kl": 0.0123},
    },
    "regression": {
        "dense": {"mae": 151.5, "r2": 0.9},
        "sparse": {"mae": 154.0, "r2": 0.88},
        "random": {"mae": 201.0, "r2": 0.5, "pearson_r": 0.7, "rmse_to_dense": 90.0, "error_pct": 60.0},
        "delta": {"mae_change": 2.5, "pearson_r": 0.991, "rmse_to_dense": 12.5, "error_pct": 9.0},
    },
    "embedding": {
        "dense": {"knn_top1_pct": 81.0, "num_gallery_images": 3000},
        "sparse": {"knn_top1_pct": 80.75, "num_gallery_images": 3000},
        "random": {
            "knn_top1_pct": 70.0,
            "cosine": 0.9,
            "cosine_p5": 0.8,
            "neighbour_overlap_pct": 60.0,
            "same_nearest_pct": 50.0,
        },
        "delta": {
            "knn_top1_points": -0.25,
            "cosine": 0.9812,
            "cosine_p5": 0.9534,
            "neighbour_overlap_pct": 83.5,
            "same_nearest_pct": 79.5,
        },
    },
    "dense": {
        "random": {
            "token_cosine": 0.8,
            "token_cosine_p5": 0.7,
            "token_cosine_kept": 0.9,
            "token_cosine_pruned": 0.6,
        },
        "delta": {
            "token_cosine": 0.9612,
            "token_cosine_p5": 0.94,
            "token_cosine_kept": 0.98,
            "token_cosine_pruned": 0.92,
        },
    },
}
_CHANGES = {"map_points": (-1.5, 0.0), "mae_change": (1.0, 4.0), "knn_top1_points": (-1.0, 0.5)}
_OF_CLASSES = ("top1_pct", "top5_pct", "agreement_pct", "kl")


def make_task_report(task, labelled=True, **changes):
    """report.json of a run for that task, with what it measures against labels or without."""
    if task == "classification":
        return make_report(**changes)
    report, known = make_report(), _OF_TASKS[task]
    for side in ("dense", "sparse", "random", "delta"):
        old = {key: value for key, value in report[side].items() if key not in _OF_CLASSES and "top1" not in key}
        report[side] = old | known.get(side, {})
    key = next((key for key in _CHANGES if key in report["delta"]), None)
    if key is not None:
        over = {f"{key}_over_random": -47.0 if key == "mae_change" else 10.0, f"{key}_over_random_ci95": [-60.0, 60.0]}
        report["delta"] |= {f"{key}_ci95": list(_CHANGES[key])} | over
    if not labelled:
        for key in report["delta"]:
            if key.startswith(tuple(_CHANGES)):
                report["delta"][key] = None
        for side in ("dense", "sparse", "random"):
            for figure in ("map_pct", "f1_pct", "mae", "r2", "knn_top1_pct"):
                report[side] |= {figure: None} if figure in report[side] else {}
            report[side].pop("num_gallery_images", None)
    return report | {"task": task, "correct": None, "classes": []} | changes


def make_task_keep_maps(task):
    """keepmaps.json of a run for that task."""
    maps = make_keep_maps()
    said = {"multilabel": maps["images"][0]["dense"], "regression": "0.25, 17"}.get(task, [])
    for place, image in zip(("nearest", "farthest"), maps["images"], strict=True):
        label = {"multilabel": "<i>a</i>; b", "regression": "0.5, 16"}.get(task)
        image |= {"group": "evaluated images", "place": place, "dense": said, "sparse": said, "label": label}
        image["distance"] = image.pop("kl")
        if task == "embedding":
            image["neighbours"] = {"dense": [0, 1], "sparse": [1, 2]}
        if task == "dense":
            image["likeness"] = [1.0, 0.5, 0.75, 0.99, 1.0, 0.5]
    if task == "embedding":
        maps["thumbnails"] = [maps["images"][0]["jpeg"]] * 3
    return maps


def make_steps(num=8):
    """log.jsonl."""
    return [
        {
            "step": step,
            "phase": "pretraining" if step <= num // 2 else "deployed",
            "losses": {"rank": 1 / step}
            if step <= num // 2
            else {"kl": 0.1 / step, "<b>new</b>": None if step == num else 1.0},
            "kept_ratios": [0.66, 0.33],
            "target_ratios": [0.67, 0.34],
        }
        for step in range(1, num + 1)
    ]


def make_keep_maps():
    """keepmaps.json: two images that are not square, on a grid of 2 x 3."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 30, 30)).save(buffer, "JPEG")
    answer = [{"index": 1, "name": CLASSES[2], "probability_pct": 61.25}]
    common = {
        "place": "farthest",
        "jpeg": base64.b64encode(buffer.getvalue()).decode(),
        "width": 48,
        "height": 32,
        "kept": [[0, 1, 2, 5], [1, 5]],
        "dense": answer,
        "sparse": answer,
        "kl": 0.125,
    }
    return {
        "schema_version": 2,
        "grid_size": [2, 3],
        "num_seen": 200,
        "images": [
            {**common, "group": "both right", "label": CLASSES[2]},
            {**common, "group": "dense right, sparse wrong", "label": None},
        ],
    }


def write_run(folder, keep_maps=True, steps=True, **changes):
    """A run folder without its model, with `changes` of report.json."""
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(make_report(**changes)))
    if steps:
        lines = [json.dumps(step) for step in make_steps()]
        (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 9, "pha']))
    if keep_maps:
        (folder / "keepmaps.json").write_text(json.dumps(make_keep_maps()))
    return folder


def write_whole_run(folder, sparse, /, origin=None, class_names=None, **changes):
    """The same with its model, `sparse`."""
    folder.mkdir(exist_ok=True)
    metadata = describe(sparse, class_names=class_names, origin=origin)
    write_run(folder, **{"model": metadata.model, "label": metadata.label} | changes)
    metadata.accuracy = accuracy_of(Report.model_validate_json((folder / "report.json").read_text()))
    save(sparse, folder / "model.safetensors", metadata)
    return folder


def same_weights(one, other):
    """Whether the models of two run folders are equal bit for bit."""
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
