"""`vitprune export`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vitprune.cli import completion
from vitprune.cli.model_options import ModelOptions
from vitprune.cli.options import AsJson, Limit, Model, TableOptions
from vitprune.cli.output import print_json, print_line, say, waiting
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
    weights: ModelOptions,
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
            help="Output file; with --format timm a folder.",
            show_default="model.onnx, model.pt2 or timm/ beside the model's file; of a timm name here, called as it is",
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16"] | None,
        typer.Option(
            help="Precision of the weights. Predictors, images and logits stay fp32. On CPUs fp16 is slower.",
            show_default="fp32",
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="The same as --precision fp16.")] = False,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Images at once, always.", show_default="any number", min=1),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX, 18 to 24.", show_default="20")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            autocompletion=completion.data,
            help="Compare also on its images.",
            show_default="12 random images only",
        ),
    ] = None,
    limit: Limit = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an output that exists.")] = False,
    features: Annotated[
        bool,
        typer.Option("--features", help="Put out the features of all patches instead, as --task dense does."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model, sparse or dense, for use without vitprune: one file, as a rule for any batch size.

    Preprocessing and, where known, class names are in it.

    What is written is opened again and compared with the model; if it computes something else, nothing is kept.

    Examples:

      vitprune export runs/deit_small_patch16_224-keep0.7/model.safetensors --format onnx

      vitprune export model.safetensors --precision fp16 --data imagenet --limit 200

      vitprune export deit_small --checkpoint my.safetensors --format pt2 -o dense.pt2
    """
    distributed.refuse_several("export")
    weights.refuse_class_embeddings("export")
    if half and precision == "fp32":
        raise UsageError("--half and --precision fp32 contradict each other", "leave one out")
    precision = "fp16" if half else precision or "fp32"
    if data is None and limit is not None:
        raise UsageError("--limit is of the images to compare on, and there is no --data", "add --data DATA")

    with waiting("loading PyTorch"):
        from vitprune.checkpoint.onnx_program import require_onnx
        from vitprune.checkpoint.sparse_file import describe
        from vitprune.export import check_output, known_target, with_features
        from vitprune.export import export as write
        from vitprune.model import attach
    target = known_target(kind, batch, opset)
    if kind == "onnx":
        require_onnx()
    loaded = weights.load(model)
    sparse = loaded.sparse or attach(loaded.model, keep=1.0).eval()
    metadata = loaded.metadata or describe(
        sparse, name=loaded.name, class_names=loaded.class_names, origin=loaded.origin
    )
    if loaded.metadata is None:
        metadata.task = loaded.task
    metadata = with_features(metadata, kind) if features else metadata
    output = output or _default_output(loaded, kind, precision)
    check_output(output, kind, precision, overwrite=overwrite)
    images, count = _images(loaded, data, limit or _DEFAULT_LIMIT)
    with RunProgress() as progress:
        done = write(
            sparse,
            metadata,
            output,
            kind,
            precision,
            target,
            images=images,
            num_images=count,
            listener=progress,
        )
    if done.format == "timm" and metadata.preprocessing.exif:
        say("warning: timm does not turn images by their EXIF orientation, as this model was trained", always=True)
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


def _images(loaded: Loaded, data: str | None, limit: int) -> tuple[Iterable[Tensor], int | None]:
    """Images of DATA, whose classes do not matter, and how many they are."""
    from vitprune.data import batches, count_images, eval_transform, make_loader, open_data

    if data is None:
        return (), 0
    dataset = open_data(data, None, TableOptions().parsed(limit), labels=False).val
    dataset.transform = eval_transform(loaded.model)
    return (image for batch, _ in batches(make_loader(dataset, 1)) for image in batch), count_images(dataset)


def _print(done: Exported, name: str, data: str | None) -> None:
    from vitprune.export import batch_sizes
    from vitprune.tasks import task_named

    agreement, num_random, task = done.agreement, sum(batch_sizes(done.batch)), task_named(done.task)
    sizes = ", ".join(map(str, agreement.batch_sizes))
    images = "" if data is None else f" and {agreement.num_images - num_random} images"
    opset = "" if done.opset is None else f" of opset {done.opset}"
    takes = "" if done.batch is None else f", for batches of {done.batch}"
    print_line(f"{name}: {done.format}{opset}, {done.precision}, {done.size_mib:.1f} MiB{takes}")
    same = "" if agreement.agreement_pct is None else f", same {task.decides} for {agreement.agreement_pct:.1f} %"
    clear = f", and all {agreement.num_clear} clear {task.decides} decisions are the same"
    if agreement.num_clear is None:
        clear = ""
    elif not agreement.num_clear:
        clear = f"; no {task.decides} decision was clear" + (
            "" if data else ", of noise: --data DATA compares on images"
        )
    print_line(
        f"beside PyTorch in fp32 on {num_random} random images{images}, in batches of {sizes}: {task.outputs} differ "
        f"by {agreement.max_difference:.1e} at most{same}"
    )
    print_line(
        f"passed: a typical image's {task.outputs} differ by {agreement.typical_difference:.1e} of their standard "
        f"deviation (allowed {agreement.allowed_difference:g}){clear}"
    )
    print_line(f"written to {done.output}")
