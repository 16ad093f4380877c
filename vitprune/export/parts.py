"""A cascade of passes as a folder of ONNX files: its trunk, what each pass is from there on, and adaptive.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune.adaptive import AdaptiveHeader, AdaptiveProgram, AdaptiveViT, read_adaptive
from vitprune.checkpoint.metadata import Metadata
from vitprune.common.files import write_json
from vitprune.common.formatting import first_line
from vitprune.common.progress import SILENT, Listener
from vitprune.common.run_folder import ADAPTIVE
from vitprune.errors import ExportError, UsageError
from vitprune.export.agreement import BATCH_SIZES, Agreement, compare, in_batches, random_images
from vitprune.export.job import Exported, placed, size_mib
from vitprune.export.onnx_file import write_onnx
from vitprune.export.target import ANY, Ports, Target
from vitprune.model import SparseViT
from vitprune.tasks import task_named

_TRUNK = "trunk.onnx"


def export_parts(
    adaptive: AdaptiveViT,
    metadata: Metadata,
    output: Path,
    target: Target = ANY,
    *,
    images: Iterable[Tensor] = (),
    num_images: int | None = 0,
    listener: Listener = SILENT,
) -> Exported:
    """Write an adaptive model as ONNX, for batches of any size, and compare each of its passes with PyTorch.

    Args:
        adaptive: in eval mode, on the CPU; what was promised of it goes along.
        metadata: of the file that its sparse passes are from.
        output: the folder; see `check_folder`.
        target: what the programs are written for, without a batch size or quantisation.
        images: to compare on, beside random ones, (C, H, W) each; read once a pass.
        num_images: how many these are; None where that is not known.
        listener: hears how far it is.

    Raises:
        UsageError: all images go on.
        ExportError: the model cannot be exported, or a pass differs; nothing is kept.
        OutputError: the output cannot be written.
    """
    if adaptive.threshold > 1:
        raise UsageError(
            f"at a threshold of {adaptive.threshold:g} all images go on, which costs more than the dense model",
            "promise less, or choose a threshold of at most 1",
        )
    promised = adaptive.promise and {key: adaptive.promise[key] for key in ("asked", "calibration")}
    names = [f"tail-{_name(each)}.onnx" for each in adaptive.models]
    with placed(output, folder=True) as folder:
        listener.begin(f"exporting {metadata.model}", len(names) + 1)
        _write(adaptive, metadata, folder, names, target, listener)
        header = AdaptiveHeader(threshold=adaptive.threshold, trunk=_TRUNK, passes=names, promise=promised)
        write_json(folder / ADAPTIVE, header.model_dump())
        try:
            program = read_adaptive(folder)
        except Exception as error:  # onnxruntime's errors have no common class
            raise ExportError(f"what was written cannot be opened again: {first_line(error)}") from error
        total = None if num_images is None else sum(BATCH_SIZES) + num_images
        listener.begin("comparing with PyTorch", None if total is None else total * len(names))
        agreement, size = _compared(adaptive, program, metadata, images, listener), size_mib(folder)
    return Exported("onnx", metadata.task, "fp32", output, size, None, target.opset, agreement)


def _write(
    adaptive: AdaptiveViT, metadata: Metadata, folder: Path, names: list[str], target: Target, listener: Listener
) -> None:
    backbone = adaptive.models[0].backbone
    tokens = (backbone.num_prefix_tokens + backbone.num_patches, backbone.embed_dim)
    images = Ports("images", metadata.preprocessing.input_size, ("tokens",))
    write_onnx(adaptive.trunk(), metadata, folder / _TRUNK, target, images)
    listener.advance(1)
    ports = Ports("tokens", tokens, (task_named(metadata.task).output, "certainty"))
    for name, model, tail in zip(names, adaptive.models, adaptive.tails(), strict=True):
        write_onnx(tail, _of_pass(metadata, model), folder / name, target, ports)
        listener.advance(1)


def _compared(
    adaptive: AdaptiveViT, program: AdaptiveProgram, metadata: Metadata, images: Iterable[Tensor], listener: Listener
) -> Agreement:
    """Every pass with PyTorch's, of all images; of the pass that differs most."""
    task, size = task_named(metadata.task), metadata.preprocessing.input_size
    found = [
        compare(
            model, _OnePass(program, number), in_batches(chain(random_images(size), images)), "fp32", task, listener
        )
        for number, model in enumerate(adaptive.models)
    ]
    worst = max(found, key=lambda each: each.typical_difference)
    return replace(worst, max_difference=max(each.max_difference for each in found))


class _OnePass(nn.Module):
    """One pass of a cascade, for all images."""

    def __init__(self, program: AdaptiveProgram, number: int) -> None:
        super().__init__()
        self.program, self.number = program, number

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.program.tails[self.number].run(*self.program.trunk.run(images))[0]
        return outputs


def _name(model: SparseViT) -> str:
    """Of a pass, for a file."""
    if not model.schedule.stages:
        return "dense"
    return "sparse" if model.keep is None else f"{model.keep:g}"


def _of_pass(metadata: Metadata, model: SparseViT) -> Metadata:
    """What the file of a pass says of it."""
    if model.schedule.stages:
        return metadata.at(model.keep, model.schedule.stages)
    of_dense: dict[str, Any] = {"keep": 1.0, "keep_range": None, "stages": [], "accuracy": None, "training": None}
    return metadata.model_copy(update=of_dense)
