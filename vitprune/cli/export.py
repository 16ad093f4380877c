"""`vitprune export`."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune import processes
from vitprune.cli.options import AsJson, Checkpoint, DataDir, ImgSize, Limit, Model, data_options
from vitprune.cli.output import print_json, print_line
from vitprune.cli.progress import RunProgress
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.export import Exported
    from vitprune.zoo import Loaded

_DEFAULT_LIMIT = 100


class FormatName(str, Enum):
    """Choices of --format."""

    ONNX = "onnx"
    PT2 = "pt2"
    TIMM = "timm"


class WeightsName(str, Enum):
    """Choices of --precision."""

    FP32 = "fp32"
    FP16 = "fp16"


def export(
    model: Model,
    kind: Annotated[
        FormatName,
        typer.Option("--format", "-f", help="ONNX, torch.export, or a timm folder of the backbone alone."),
    ] = FormatName.ONNX,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="What to write; of timm a folder.",
            show_default="beside the model: model.onnx, model.pt2, timm/",
        ),
    ] = None,
    precision: Annotated[
        WeightsName, typer.Option(help="Of the weights; token predictors stay in fp32, images and logits too.")
    ] = WeightsName.FP32,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Compare on its pictures, not on random ones.", show_default="12 random images"
        ),
    ] = None,
    data_dir: DataDir = None,
    limit: Limit = None,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an output that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """A model for use without vitprune, sparse or dense: one file for any batch size, with preprocessing and classes.

    What is written is opened again and compared with the model; if it computes something else, nothing is kept.

    Examples:

      vitprune export runs/deit_small_patch16_224-keep0.7/model.safetensors --format onnx

      vitprune export model.safetensors --precision fp16 --data imagenet --limit 200

      vitprune export deit_small --checkpoint my.safetensors --format pt2 -o dense.pt2
    """
    processes.refuse_several("export")
    if data is None and limit is not None:
        raise UsageError("--limit is of the pictures to compare on, and there is no --data", "add --data DATA")

    from vitprune.checkpoint import describe
    from vitprune.export import BATCH_SIZES, check_output
    from vitprune.export import export as write
    from vitprune.export.onnx_file import require_onnx
    from vitprune.model import attach
    from vitprune.zoo import load_model

    if kind is FormatName.ONNX:
        require_onnx()
    loaded = load_model(model, checkpoint=checkpoint, img_size=img_size)
    sparse = loaded.sparse or attach(loaded.model, keep=1.0).eval()
    metadata = loaded.metadata or describe(
        sparse, name=loaded.name, class_names=loaded.class_names, origin=loaded.origin
    )
    output = output or _default_output(loaded, kind.value, precision.value)
    check_output(output, kind.value, precision.value, overwrite=overwrite)
    pictures = (sum(BATCH_SIZES), None) if data is None else _pictures(loaded, data, data_dir, limit or _DEFAULT_LIMIT)
    num_images, batches = pictures
    with RunProgress() as progress:
        progress.begin(f"exporting {loaded.name} and comparing", num_images)
        done = write(
            sparse,
            metadata,
            output,
            kind.value,
            precision.value,
            batches=batches,
            on_batch=progress.advance,
        )
    result = {
        "model": loaded.name,
        "keep": 1.0 if done.format == "timm" else metadata.keep,
        "data": data,
        "input_size": list(metadata.preprocessing.input_size),
        "num_classes": sparse.num_classes,
        **done.summary(),
    }
    if as_json:
        print_json(result)
        return
    _print(done, f"{loaded.name}, {'dense' if done.format == 'timm' else metadata.label}", data)


def _default_output(loaded: Loaded, kind: str, precision: str) -> Path:
    """Beside a file of ours, else in the working directory, named by the model."""
    from vitprune.zoo import sparse_file

    file = sparse_file(loaded.spec)
    folder, stem = (file.parent, file.stem) if file else (Path(), loaded.short_name)
    if kind == "timm":
        return folder / ("timm" if file else f"{stem}-timm")
    return folder / f"{stem}{'' if precision == 'fp32' else '-' + precision}.{kind}"


def _pictures(loaded: Loaded, data: str, data_dir: Path | None, limit: int) -> tuple[int | None, Iterator[Tensor]]:
    """How many there are, where that is known, and the pictures in batches."""
    from vitprune.data import ModelClasses, batches, count_pictures, eval_transform, make_loader, open_data
    from vitprune.export import in_batches

    classes = ModelClasses(getattr(loaded.model, "num_classes", 0), loaded.class_names)
    pictures = open_data(data, classes, data_options(data_dir, None, None, False, limit)).val
    pictures.transform = eval_transform(loaded.model)
    images = (image for batch, _ in batches(make_loader(pictures, 1)) for image in batch)
    return count_pictures(pictures), in_batches(images)


def _print(done: Exported, name: str, data: str | None) -> None:
    agreement: Any = done.agreement
    sizes = ", ".join(map(str, agreement.batch_sizes))
    images = f"{agreement.num_images} {'random images' if data is None else 'pictures'}"
    print_line(f"{name}: {done.format}, {done.precision}, {done.size_mib:.1f} MiB")
    print_line(
        f"beside PyTorch on {images}, in batches of {sizes}: logits differ by {agreement.max_logit_difference:.1e} "
        f"at most, same class for {agreement.top1_agreement_pct:.1f} %"
    )
    print_line(f"written to {done.output}")
