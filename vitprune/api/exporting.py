"""`vitprune.export_model`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vitprune.adaptive import AdaptiveViT
from vitprune.api.arguments import AskedTask, Images, keeps_mode, known, opened
from vitprune.checkpoint.sparse_file import describe
from vitprune.cli.promise_options import refuse_beside, refuse_in_parts
from vitprune.common.wrappers import unwrapped
from vitprune.errors import OutputError, UsageError
from vitprune.export import (
    Exported,
    ExportPrecision,
    Format,
    check_folder,
    check_output,
    export,
    export_parts,
    images_to_compare,
    known_target,
    quantisation_by,
    with_features,
)
from vitprune.export.formats import FORMATS, format_of
from vitprune.model import attach


@keeps_mode
def export_model(
    model: nn.Module,
    output: str | Path,
    format: str | None = None,
    *,
    precision: ExportPrecision | None = None,
    class_names: Sequence[str] | None = None,
    task: AskedTask = "auto",
    features: bool = False,
    batch: int | None = None,
    opset: int | None = None,
    data: Images | None = None,
    limit: int = 100,
    min_agreement: float | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a sparse or dense model for use without vitprune, and prove that it computes the same.

    Example:
        done = vitprune.export_model(sparse, "model.onnx")
        print(done.agreement.max_difference)

    Args:
        model: a SparseViT, a timm model, or an AdaptiveViT, of which a folder of ONNX files is written; not changed.
        output: `*.onnx` for ONNX, `*.xml` for OpenVINO (weights go into a .bin beside it), `*.pt2` for torch.export,
            `*.aoti.pt2` for machine code by AOTInductor (needs a C++ compiler), `*.pte` for ExecuTorch,
            `*.tflite` for LiteRT, `*.mlpackage` for Core ML (compared with PyTorch on macOS only), a name without an
            ending or a folder that exists for a timm folder of the backbone.
        format: "onnx", "openvino", "pt2", "aoti", "executorch", "litert", "coreml" or "timm"; None for `output`'s.
        precision: "fp16" halves the weights, "int8" (of ONNX and OpenVINO, calibrated on 128 images of `data`) quarters
            them; token predictors stay in fp32. None for "fp32", of Core ML "fp16".
        class_names: in output order, to be stored.
        task: what the model is for, as in `vitprune.evaluate`, which names the output; a SparseViT says it itself.
        features: put out the features of all patches instead, (N, prefix tokens + patches, C), as a model for the task
            "dense" does anyway; not for a timm folder.
        batch: how many images the program always takes; None for any number, or of ExecuTorch, LiteRT and Core ML 1.
        opset: of an ONNX file, 18 to 24; None for 20.
        data: images to compare on too, as in `vitprune.sparsify`; None for random ones alone.
        limit: compare on at most so many of them.
        min_agreement: share of decisions in percent that an INT8 file must keep; None for 90.
        overwrite: write over an output that exists.

    Raises:
        UsageError: there is no such format, task or opset, the task does not go with the model, or a timm folder is to
            have fp16, features or a batch size; INT8 has no `data`, or Core ML has, off macOS.
        OutputError: the output has another ending, exists or cannot be written.
        ExportError: a package is missing, the model cannot be exported, or the result differs.
        CheckpointError: the model was not made by timm.create_model.
    """
    output, inner = Path(output), unwrapped(model)
    adaptive = inner if isinstance(inner, AdaptiveViT) else None
    kind = "onnx" if adaptive is not None and format is None else _format(output, format)
    if adaptive is not None:
        refuse_in_parts("an AdaptiveViT", kind, precision, batch, features=features)
        refuse_beside("an AdaptiveViT", {"--task": task not in ("auto", adaptive.task)})
    target = known_target(kind, precision, batch, opset, with_images=data is not None)
    loaded = known(
        model, class_names=class_names, task="dense" if features and task == "auto" else task, progress=False
    )
    sparse = loaded.sparse or attach(loaded.model, keep=1.0)
    metadata = describe(sparse, class_names=tuple(class_names) if class_names else None)
    metadata = metadata.model_copy(update={"task": loaded.task})
    metadata = with_features(metadata, kind) if features else metadata
    if adaptive is None:
        check_output(output, kind, overwrite=overwrite)
    else:
        check_folder(output, overwrite=overwrite)
    images: Iterable[Tensor] = ()
    count: int | None = 0
    if data is not None:
        found = opened(data, loaded, None, limit, training=precision == "int8", labels=False)
        images, count = images_to_compare(found, sparse.model)
        if precision == "int8":
            target = target._replace(quantisation=quantisation_by(found, sparse.model, None, min_agreement))
    if adaptive is not None:
        adaptive = copy.deepcopy(adaptive).to("cpu", torch.float32).eval()
        return export_parts(adaptive, metadata, output, target, images=images, num_images=count)
    sparse = copy.deepcopy(sparse).to("cpu", torch.float32).eval()
    return export(sparse, metadata, output, kind, target, images=images, num_images=count)


def _format(output: Path, asked: str | None) -> Format:
    """The format that is asked for, or else the one that the output's name says."""
    if asked is not None:
        kind = next((known for known in FORMATS if known == asked), None)
        if kind is None:
            raise UsageError(f"format '{asked}' is unknown", f"choose from {', '.join(FORMATS)}")
        return kind
    kind = format_of(output) or ("timm" if output.is_dir() or not output.suffix else None)
    if kind is None:
        endings = ", ".join(its.ending for its in FORMATS.values() if its.ending)
        raise OutputError(
            f"the output '{output}' does not say its format: its ending is '{output.suffix}'",
            f"end it in {endings}, or in none for a timm folder",
            exit_code=2,
        )
    return kind
