"""`vitprune predict`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli.model_options import ModelOptions
from vitprune.cli.options import AsJson, BatchSize, Device, Model, Precision, Workers
from vitprune.cli.output import print_json, print_line, print_table, say, waiting
from vitprune.cli.progress import RunProgress
from vitprune.common import distributed
from vitprune.common.files import check_new_file, write_text
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.jobs.predict import ImagePrediction

"""Classes in a row of the table."""


def predict(
    model: Model,
    weights: ModelOptions,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.", show_default=False)
    ],
    topk: Annotated[int, typer.Option(min=1, metavar="K", help="Likeliest classes per image.")] = 5,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the predictions to FILE (.csv or .json)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Classify images: the likeliest classes of each; labels are not needed.

    With a sparse file and --checkpoint, the weights of the dense model that it was made from, dense and sparse
    predictions stand side by side. MODEL may also be an .onnx file.

    Examples:

      vitprune predict runs/deit_small_patch16_224-keep0.7 cat.jpg dog.jpg

      vitprune predict deit_small path/to/images -o predictions.csv
    """
    distributed.refuse_several("predict")
    _check_output(output, overwrite)
    with waiting("loading PyTorch"):
        from vitprune.common.devices import pick_device, pick_precision
        from vitprune.data import readable_names
        from vitprune.jobs.predict import image_set, predict_images
        from vitprune.loading.load import device_for, sparse_file
    where = pick_device(device_for(model, device, precision))
    number_format = pick_precision(precision, where, training=False)
    found = image_set(images)
    with waiting(f"loading {model}"):
        if weights.checkpoint is not None and sparse_file(model):
            loaded = weights.load(model, checkpoint=None, checkpoint_key=None)
            models = {"dense": weights.dense_of(loaded).model, "sparse": loaded.sparse or loaded.model}
        else:
            loaded = weights.load(model, exported=True)
            is_sparse = loaded.sparse is not None or (loaded.metadata is not None and bool(loaded.metadata.stages))
            models = {"sparse" if is_sparse else "dense": loaded.sparse or loaded.model}
    names = readable_names(dict(enumerate(loaded.class_names or ())), getattr(loaded.model, "num_classes", 0))
    with RunProgress() as progress:
        progress.begin(f"predicting with {loaded.name}", len(found))
        rows, faults = predict_images(
            models,
            found,
            names,
            where,
            number_format,
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
        "keep": loaded.metadata.keep if loaded.metadata else 1.0,
        "num_images": len(rows),
        "num_unreadable": faults.count,
        "unreadable": faults.names,
        "remarks": faults.remarks,
        "agreement_pct": 100 * sum(row.agree for row in rows) / len(rows) if len(models) > 1 else None,
        "rows": [row.as_json() for row in rows],
    }
    if output is not None:
        as_text = json.dumps({"schema_version": SCHEMA_VERSION} | result, indent=2) + "\n"
        write_text(output, _csv(rows) if output.suffix == ".csv" else as_text)
    if as_json:
        print_json(result)
        return
    if output is None:
        _print(rows, result)
    else:
        print_line(f"{len(rows)} image(s) written to {output}")


def _check_output(output: Path | None, overwrite: bool) -> None:
    if output is None:
        return
    if output.suffix not in (".csv", ".json"):
        raise UsageError(f"--output is '{output}', expected a name that ends in .csv or .json")
    check_new_file(output, overwrite=overwrite)


def _csv(rows: list[ImagePrediction]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "model", "rank", "index", "name", "probability_pct"))
    for row in rows:
        for model, classes in row.classes.items():
            for rank, each in enumerate(classes, start=1):
                writer.writerow((row.image, model, rank, each.index, each.name or "", f"{each.probability_pct:.4f}"))
    return text.getvalue()


def _print(rows: list[ImagePrediction], result: dict[str, Any]) -> None:
    models = list(rows[0].classes)
    cells = [[row.image, *("; ".join(each.text for each in row.classes[model]) for model in models)] for row in rows]
    kept = "" if result["keep"] == 1 else f", keep {result['keep']:g}"
    print_table(result["model"] + kept, ["image", *models], cells)
    if result["agreement_pct"] is not None:
        print_line(f"same class as dense on {result['agreement_pct']:.1f} % of {len(rows)} image(s)")
