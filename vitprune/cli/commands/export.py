"""`vitprune export`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitprune.cli import completion
from vitprune.cli.model_options import ModelOptions
from vitprune.cli.options import AsJson, Limit, Model, TableOptions
from vitprune.cli.output import print_json, print_line, say, waiting
from vitprune.cli.plan_options import FileKeep
from vitprune.cli.progress import RunProgress
from vitprune.cli.promise_options import Adaptive, load_cascade, refuse_in_parts
from vitprune.common import distributed
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.export import Exported, Format
    from vitprune.loading.load import Loaded

_DEFAULT_LIMIT = 100


def export(
    model: Model,
    weights: ModelOptions,
    keep: FileKeep = None,
    kind: Annotated[
        Literal["onnx", "openvino", "pt2", "aoti", "executorch", "litert", "coreml", "timm"],
        typer.Option(
            "--format",
            "-f",
            help="ONNX, OpenVINO, torch.export (pt2), AOTInductor's machine code for processors like this one (aoti), "
            "ExecuTorch, LiteRT, Core ML, or a timm folder of the backbone alone.",
        ),
    ] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Output file; with --format timm or --adaptive a folder.",
            show_default="model.onnx or what the format is called beside the model's file; of a timm name here",
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(
            help="Of the weights; predictors, images and logits stay fp32. fp16 is for GPUs. int8 takes --data.",
            show_default="fp32; for coreml fp16",
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="The same as --precision fp16.")] = False,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Images at once, always.",
            show_default="any number; for executorch, litert and coreml 1",
            min=1,
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX, 18 to 24.", show_default="20")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            autocompletion=completion.data,
            help="Compare also on its images; int8 is calibrated on those to train on.",
            show_default="12 random images only",
        ),
    ] = None,
    limit: Limit = None,
    calibrate: Annotated[
        int | None, typer.Option(metavar="N", help="Images to calibrate int8 on.", show_default="128", min=1)
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            metavar="PCT",
            help="Refuse an int8 file that decides fewer images as the model does.",
            show_default="90",
            min=0,
            max=100,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an output that exists.")] = False,
    adaptive: Adaptive = None,
    features: Annotated[
        bool,
        typer.Option("--features", help="Put out the features of all patches instead, as --task dense does."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model, sparse or dense, for use without vitprune: one file, as a rule for any batch size.

    Preprocessing and, where known, class names are in it.

    With --adaptive a folder of ONNX files: what a cascade of the sparse and the dense model shares, and what each is
    from there on. `vitprune eval`, `predict` and `bench` open it.

    What is written is opened again and compared with the model; if it computes something else, nothing is kept.

    Examples:

      vitprune export runs/deit_small_patch16_224-keep0.7/model.safetensors --format onnx

      vitprune export model.safetensors --precision fp16 --data imagenet --limit 200

      vitprune export deit_small --checkpoint my.safetensors --format pt2 -o dense.pt2

      vitprune export runs/deit_small_patch16_224-keep0.5-0.9 --adaptive promise.json
    """
    distributed.refuse_several("export")
    weights.refuse_class_embeddings("export")
    precision = _precision(precision, half, calibrate is not None or min_agreement is not None)
    if adaptive is not None:
        refuse_in_parts("--adaptive", kind, precision, batch, features=features)
    if data is None and limit is not None:
        raise UsageError("--limit is of the images to compare on, and there is no --data", "add --data DATA")

    with waiting("loading PyTorch"):
        from vitprune.checkpoint.sparse_file import describe
        from vitprune.data import open_data
        from vitprune.export import (
            check_folder,
            check_output,
            export_parts,
            images_to_compare,
            known_target,
            quantisation_by,
            with_features,
        )
        from vitprune.export import export as write
        from vitprune.model import attach
    target = known_target(kind, precision, batch, opset, with_images=data is not None)
    if adaptive is None:
        loaded, cascade = weights.load(model), None
        loaded.open_at(keep)
    else:
        loaded, cascade = load_cascade(adaptive, model, weights, keep)
    sparse = loaded.sparse or attach(loaded.model, keep=1.0).eval()
    metadata = loaded.metadata or describe(
        sparse, name=loaded.name, class_names=loaded.class_names, origin=loaded.origin
    )
    if loaded.metadata is None:
        metadata.task = loaded.task
    metadata = with_features(metadata, kind) if features else metadata
    output = output or _default_output(loaded, kind, target.precision, in_parts=cascade is not None)
    if cascade is None:
        check_output(output, kind, overwrite=overwrite)
    else:
        check_folder(output, overwrite=overwrite)
    images: tuple[Iterable[Tensor], int | None] = ((), 0)
    if data is not None:
        options = TableOptions().parsed(limit or _DEFAULT_LIMIT)
        found = open_data(data, None, options, training=precision == "int8", labels=False)
        images = images_to_compare(found, loaded.model)
        if precision == "int8":
            target = target._replace(quantisation=quantisation_by(found, loaded.model, calibrate, min_agreement))
    with RunProgress() as progress:
        more: dict[str, Any] = {"images": images[0], "num_images": images[1], "listener": progress}
        if cascade is None:
            done = write(sparse, metadata, output, kind, target, **more)
        else:
            done = export_parts(cascade, metadata, output, target, **more)
    if done.format == "timm" and metadata.preprocessing.exif:
        say("warning: timm does not turn images by their EXIF orientation, as this model was trained", always=True)
    result = {
        "model": loaded.name,
        "keep": 1.0 if done.format == "timm" else metadata.keep,
        **({} if cascade is None else {"threshold": cascade.threshold}),
        "data": data,
        "input_size": list(metadata.preprocessing.input_size),
        "num_classes": sparse.num_classes,
        **done.summary(),
    }
    if as_json:
        print_json(result)
        return
    label = "dense" if done.format == "timm" else metadata.label if cascade is None else cascade.label
    _print(done, f"{loaded.name}, {label}", data)


def _precision(
    asked: Literal["fp32", "fp16", "int8"] | None, half: bool, quantising: bool
) -> Literal["fp32", "fp16", "int8"] | None:
    """The precision meant; None for the format's usual one.

    Raises:
        UsageError: options contradict each other.
    """
    if half and asked not in (None, "fp16"):
        raise UsageError(f"--half and --precision {asked} contradict each other", "leave one out")
    if asked != "int8" and quantising:
        raise UsageError("--calibrate and --min-agreement are of --precision int8", "leave them out, or add it")
    return "fp16" if half else asked


def _default_output(loaded: Loaded, kind: Format, precision: str, *, in_parts: bool) -> Path:
    """Beside a file of ours, else in the working directory, named by the model."""
    from vitprune.export.formats import FORMATS
    from vitprune.loading.load import sparse_file

    file = sparse_file(loaded.spec)
    folder, stem = (file.parent, file.stem) if file else (Path(), loaded.short_name)
    if kind == "timm" or in_parts:
        name = "adaptive" if in_parts else "timm"
        return folder / (name if file else f"{stem}-{name}")
    its = FORMATS[kind]
    return folder / f"{stem}{'' if precision == its.precisions[0] else '-' + precision}{its.ending}"


def _print(done: Exported, name: str, data: str | None) -> None:
    from vitprune.export import batch_sizes
    from vitprune.tasks import task_named

    agreement, task = done.agreement, task_named(done.task)
    opset = "" if done.opset is None else f" of opset {done.opset}"
    takes = "" if done.batch is None else f", for batches of {done.batch}"
    print_line(f"{name}: {done.format}{opset}, {done.precision}, {done.size_mib:.1f} MiB{takes}")
    if agreement is None:
        print_line(f"converted to {done.output}, and not compared with PyTorch: {done.format} runs on macOS only")
        return
    num_random = 0 if done.precision == "int8" else sum(batch_sizes(done.batch))
    sizes = ", ".join(map(str, agreement.batch_sizes))
    compared = [f"{num_random} random images"] if num_random else []
    compared += [f"{agreement.num_images - num_random} images"] if data else []
    same = "" if agreement.agreement_pct is None else f", same {task.decides} for {agreement.agreement_pct:.1f} %"
    clear = f", and all {agreement.num_clear} clear {task.decides} decisions are the same"
    if agreement.num_clear is None or done.precision == "int8":
        clear = ""
    elif not agreement.num_clear:
        clear = f"; no {task.decides} decision was clear" + (
            "" if data else ", of noise: --data DATA compares on images"
        )
    print_line(
        f"beside PyTorch in fp32 on {' and '.join(compared)}, in batches of {sizes}: {task.outputs} differ "
        f"by {agreement.max_difference:.1e} at most{same}"
    )
    print_line(
        f"passed: a typical image's {task.outputs} differ by {agreement.typical_difference:.1e} of their standard "
        f"deviation (allowed {agreement.allowed_difference:g}){clear}"
    )
    print_line(f"written to {done.output}")
