"""`vitprune predict`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli.model_options import ModelOptions
from vitprune.cli.options import AsJson, BatchSize, Device, Model, Precision, Workers, option
from vitprune.cli.output import number, print_json, print_line, print_table, say, waiting
from vitprune.cli.plan_options import FileKeep
from vitprune.cli.progress import RunProgress
from vitprune.common import distributed
from vitprune.common.files import check_new_file, replacing, write_text
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.jobs.predict import ImagePrediction
    from vitprune.tasks import Task

_OF_VECTORS = (".npz", ".safetensors")


def predict(
    model: Model,
    weights: ModelOptions,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.", show_default=False)
    ],
    keep: FileKeep = None,
    topk: Annotated[
        int | None,
        option(
            "The K likeliest classes or labels per image.", min=1, metavar="K", shown="5 classes; all labels above 50 %"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "Write them to FILE: .csv or .json; vectors also .npz or .safetensors.", "--output", "-o", metavar="FILE"
        ),
    ] = None,
    overwrite: Annotated[bool, option("Replace an --output that exists.", "--overwrite")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """What a model says of images, without labels: classes, labels, values, or vectors, as --task says.

    With a sparse file and --checkpoint, the weights of the dense model that it was made from, dense and sparse
    predictions stand side by side. MODEL may also be a file that vitprune export wrote (.onnx, .xml, .pte, .tflite).

    Examples:

      vitprune predict runs/deit_small_patch16_224-keep0.7 cat.jpg dog.jpg

      vitprune predict deit_small path/to/images -o predictions.csv
    """
    distributed.refuse_several("predict")
    weights.refuse_class_embeddings("predict")
    _check_output(output, overwrite)
    with waiting("loading PyTorch"):
        from vitprune.common.devices import pick_device, pick_precision
        from vitprune.data import readable_names
        from vitprune.jobs.predict import image_set, predict_images
        from vitprune.loading.load import device_for, sparse_file
        from vitprune.tasks import task_named
    where = pick_device(device_for(model, device, precision))
    number_format = pick_precision(precision, where, training=False)
    found = image_set(images)
    with waiting(f"loading {model}"):
        if weights.checkpoint is not None and sparse_file(model):
            loaded = weights.load(model, checkpoint=None, checkpoint_key=None)
            loaded.open_at(keep)
            models = {"dense": weights.dense_of(loaded).model, "sparse": loaded.sparse or loaded.model}
        else:
            loaded = weights.load(model, exported=True)
            loaded.open_at(keep)
            is_sparse = loaded.sparse is not None or (loaded.metadata is not None and bool(loaded.metadata.stages))
            models = {"sparse" if is_sparse else "dense": loaded.sparse or loaded.model}
    task = task_named(loaded.task)
    _check_kind(output, task)
    names = readable_names(dict(enumerate(loaded.class_names or ())), getattr(loaded.model, "num_classes", 0))
    with RunProgress() as progress:
        progress.begin(f"predicting with {loaded.name}", len(found))
        rows, faults, likeness = predict_images(
            models,
            found,
            names,
            where,
            number_format,
            task=task,
            topk=topk,
            batch_size=batch_size,
            num_workers=workers or 0,
            listener=progress,
        )
    for name in faults.names:
        say(f"warning: '{name}' could not be read", always=True)
    for remark in faults.remarks:
        say(remark)
    result: dict[str, Any] = {
        "model": loaded.name,
        "task": task.name,
        "keep": loaded.keep,
        "num_images": len(rows),
        "num_unreadable": faults.count,
        "unreadable": faults.names,
        "remarks": faults.remarks,
        **({figure.key: None for figure in task.fidelity} if likeness is None else likeness),
    }
    if as_json or (output is not None and output.suffix == ".json"):
        result["rows"] = [row.as_json() for row in rows]
    if output is not None:
        _write(output, rows, result)
    if as_json:
        print_json(result)
        return
    if output is None:
        _print(rows, result, task)
    else:
        print_line(f"{len(rows)} image(s) written to {output}")


def _check_output(output: Path | None, overwrite: bool) -> None:
    if output is None:
        return
    if output.suffix not in (".csv", ".json", *_OF_VECTORS):
        raise UsageError(f"--output is '{output}', expected a name that ends in .csv, .json, .npz or .safetensors")
    check_new_file(output, overwrite=overwrite)


def _check_kind(output: Path | None, task: Task) -> None:
    """Make sure that a file can hold what the task puts out."""
    if output is None:
        return
    if output.suffix in _OF_VECTORS and task.name in ("classification", "multilabel"):
        raise UsageError(f"'{output}' would hold vectors, and the task is {task.name}", "name a .csv or .json file")
    if output.suffix not in _OF_VECTORS and task.name == "dense":
        raise UsageError(f"'{output}' cannot hold features of patches", "name a .npz or .safetensors file")


def _write(output: Path, rows: list[ImagePrediction], result: dict[str, Any]) -> None:
    if output.suffix == ".csv":
        write_text(output, _csv(rows))
    elif output.suffix == ".json":
        write_text(output, json.dumps({"schema_version": SCHEMA_VERSION} | result, indent=2) + "\n")
    else:
        _write_vectors(output, rows)


def _write_vectors(output: Path, rows: list[ImagePrediction]) -> None:
    """One tensor a model, a row an image; the images' names beside them."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    names = [row.image for row in rows]
    stacked = {model: torch.stack([row.vectors[model] for row in rows]) for model in rows[0].vectors}
    with replacing(output) as temporary:
        if output.suffix == ".safetensors":
            save_file(stacked, temporary, metadata={"images": json.dumps(names)})
            return
        with temporary.open("wb") as file:
            arrays: dict[str, Any] = {model: each.numpy() for model, each in stacked.items()}
            np.savez(file, images=np.array(names), **arrays)


def _csv(rows: list[ImagePrediction]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows[0].vectors:
        width = len(next(iter(rows[0].vectors.values())))
        writer.writerow(("image", "model", *(f"value_{index}" for index in range(width))))
        for row in rows:
            writer.writerows((row.image, model, *vector.tolist()) for model, vector in row.vectors.items())
        return text.getvalue()
    writer.writerow(("image", "model", "rank", "index", "name", "probability_pct"))
    for row in rows:
        for model, classes in row.classes.items():
            if not classes:  # no label, which is not an image that could not be read
                writer.writerow((row.image, model, "", "", "", ""))
            for rank, each in enumerate(classes, start=1):
                writer.writerow((row.image, model, rank, each.index, each.name or "", f"{each.probability_pct:.4f}"))
    return text.getvalue()


def _print(rows: list[ImagePrediction], result: dict[str, Any], task: Task) -> None:
    models, apart = list(rows[0].classes), rows[0].distance is not None
    if apart:
        columns = ["image", f"{task.distance}, dense to sparse"]
        cells = [[row.image, number(row.distance, 4)] for row in rows]
    else:
        columns = ["image", *models]
        cells = [[row.image, *(_said(row, model, task) for model in models)] for row in rows]
    kept = "" if result["keep"] in (1, None) else f", keep {result['keep']:g}"
    print_table(result["model"] + kept, columns, cells)
    if len(models) > 1:
        known = [each for each in task.fidelity if result[each.key] is not None]  # of one image not all are
        parts = ", ".join(each.said(number(result[each.key], each.digits)) for each in known)
        print_line(f"on {len(rows)} image(s): {parts}")
    if task.name in ("embedding", "dense"):
        print_line("-o FILE.safetensors or FILE.npz writes the vectors")


def _said(row: ImagePrediction, model: str, task: Task) -> str:
    """What a model says of an image, in one line."""
    vector = row.vectors.get(model)
    if vector is None:
        return "; ".join(each.text for each in row.classes[model]) or "no label"
    if task.name == "regression":
        return ", ".join(f"{value:.4g}" for value in vector.tolist())
    first = ", ".join(f"{value:.3g}" for value in vector.flatten()[:3].tolist())
    return f"{' x '.join(map(str, vector.shape))} numbers: {first}, ..."
