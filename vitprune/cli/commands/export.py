"""`vitprune export`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from vitprune.cli import completion
from vitprune.cli.options import AsJson, Checkpoint, ImgSize, Limit, Model, data_options
from vitprune.cli.output import print_json, print_line, waiting
from vitprune.cli.progress import RunProgress
from vitprune.common import distributed
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.export import Exported
    from vitprune.loading.load import Loaded

_DEFAULT_LIMIT = 100


def export(
    model: Model,
    kind: Annotated[
        Literal["onnx", "pt2", "timm"],
        typer.Option("--format", "-f", help="ONNX, torch.export, or a timm folder of the backbone alone."),
    ] = "onnx",
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
        Literal["fp32", "fp16"],
        typer.Option(help="Of the weights; token predictors stay in fp32, images and logits too."),
    ] = "fp32",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            autocompletion=completion.data,
            help="Compare also on its images.",
            show_default="12 random images alone",
        ),
    ] = None,
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
    distributed.refuse_several("export")
    if data is None and limit is not None:
        raise UsageError("--limit is of the images to compare on, and there is no --data", "add --data DATA")

    with waiting("loading PyTorch"):
        from vitprune.checkpoint.sparse_file import describe
        from vitprune.export import BATCH_SIZES, check_output, random_batches
        from vitprune.export import export as write
        from vitprune.export.onnx_file import require_onnx
        from vitprune.loading.load import load_model
        from vitprune.model import attach
    if kind == "onnx":
        require_onnx()
    loaded = load_model(model, checkpoint=checkpoint, img_size=img_size)
    sparse = loaded.sparse or attach(loaded.model, keep=1.0).eval()
    metadata = loaded.metadata or describe(
        sparse, name=loaded.name, class_names=loaded.class_names, origin=loaded.origin
    )
    output = output or _default_output(loaded, kind, precision)
    check_output(output, kind, precision, overwrite=overwrite)
    images = _Images(sum(BATCH_SIZES), random_batches(metadata.preprocessing.input_size))
    if data is not None:
        images = _with_images(images, loaded, data, limit or _DEFAULT_LIMIT)
    with RunProgress() as progress:
        progress.begin(f"exporting {loaded.name}", None)
        batches = _announced(progress, images)
        done = write(sparse, metadata, output, kind, precision, batches=batches, on_batch=progress.advance)
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
    from vitprune.loading.load import sparse_file

    file = sparse_file(loaded.spec)
    folder, stem = (file.parent, file.stem) if file else (Path(), loaded.short_name)
    if kind == "timm":
        return folder / ("timm" if file else f"{stem}-timm")
    return folder / f"{stem}{'' if precision == 'fp32' else '-' + precision}.{kind}"


class _Images(NamedTuple):
    """What to compare on: how many there are, where that is known, and the batches."""

    total: int | None
    batches: Iterator[Tensor]


def _with_images(images: _Images, loaded: Loaded, data: str, limit: int) -> _Images:
    """Those, and after them images of DATA, whose classes do not matter."""
    from vitprune.data import batches, count_images, eval_transform, make_loader, open_data
    from vitprune.export import in_batches

    dataset = open_data(data, None, data_options(None, None, False, limit), labels=False).val
    dataset.transform = eval_transform(loaded.model)
    opened = (image for batch, _ in batches(make_loader(dataset, 1)) for image in batch)
    count = count_images(dataset)
    total = None if count is None or images.total is None else images.total + count
    return _Images(total, chain(images.batches, in_batches(opened)))


def _announced(progress: RunProgress, images: _Images) -> Iterator[Tensor]:
    """The batches; when the first one is asked for, the file is written and the comparison begins."""
    progress.begin("comparing with PyTorch", images.total)
    yield from images.batches


def _print(done: Exported, name: str, data: str | None) -> None:
    from vitprune.export import BATCH_SIZES

    agreement, num_random = done.agreement, sum(BATCH_SIZES)
    sizes = ", ".join(map(str, agreement.batch_sizes))
    images = "" if data is None else f" and {agreement.num_images - num_random} images"
    print_line(f"{name}: {done.format}, {done.precision}, {done.size_mib:.1f} MiB")
    print_line(
        f"beside PyTorch on {num_random} random images{images}, in batches of {sizes}: logits differ by "
        f"{agreement.max_logit_difference:.1e} at most, same class for {agreement.top1_agreement_pct:.1f} %"
    )
    print_line(f"written to {done.output}")
