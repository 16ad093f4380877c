"""The formats: how each is written from a model, and how it is opened again to be compared with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from vitprune.checkpoint.executorch_program import read_executorch, require_executorch, write_executorch_file
from vitprune.checkpoint.litert_program import read_litert, require_litert, write_litert_file
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.onnx_program import read_onnx, require_onnx
from vitprune.checkpoint.openvino_program import read_openvino, require_openvino
from vitprune.export.onnx_file import write_onnx, write_openvino
from vitprune.export.target import ExportPrecision, Ports, Target, converting, example
from vitprune.export.timm_folder import read_timm, write_timm
from vitprune.export.torch_program import exported_program, read_aoti, read_pt2, write_aoti, write_pt2

Format = Literal["onnx", "openvino", "pt2", "aoti", "executorch", "litert", "timm"]
_ALL: tuple[ExportPrecision, ...] = ("fp32", "fp16", "int8")


def write_executorch(model: nn.Module, metadata: Metadata, path: Path, target: Target) -> None:
    """Write a model for ExecuTorch's XNNPACK kernels.

    Raises:
        ExportError: the package is missing, or the model cannot be exported.
    """
    require_executorch()
    program = exported_program(model, metadata, target)
    with converting("ExecuTorch"):
        write_executorch_file(program, metadata, target.precision, path)


def write_litert(model: nn.Module, metadata: Metadata, path: Path, target: Target) -> None:
    """Write a model for LiteRT.

    Raises:
        ExportError: a package is missing, or the model cannot be converted.
    """
    require_litert()
    with converting("LiteRT"):
        (images,) = example(Ports.of(metadata), target)["args"]
        write_litert_file(model, images, metadata, path)


class FormatFunctions(NamedTuple):
    """How a format is written, and what it can do.

    Attributes:
        ending: of its files; a timm folder has none.
        write: write a model.
        read: open what was written as a module.
        require: import its packages.
        precisions: those it is written in.
        of_onnx: whether it is made of an ONNX file, which has an opset.
        batch: how many images at once where nothing is asked; None for any number.
    """

    ending: str
    write: Callable[[nn.Module, Metadata, Path, Target], None]
    read: Callable[[Path], nn.Module]
    require: Callable[[], object] = lambda: None
    precisions: tuple[ExportPrecision, ...] = ("fp32", "fp16")
    of_onnx: bool = False
    batch: int | None = None


FORMATS: dict[Format, FormatFunctions] = {
    "onnx": FormatFunctions(".onnx", write_onnx, read_onnx, require_onnx, _ALL, of_onnx=True),
    "openvino": FormatFunctions(".xml", write_openvino, read_openvino, require_openvino, _ALL, of_onnx=True),
    "pt2": FormatFunctions(".pt2", write_pt2, read_pt2),
    "aoti": FormatFunctions(".aoti.pt2", write_aoti, read_aoti),
    "executorch": FormatFunctions(".pte", write_executorch, read_executorch, require_executorch, batch=1),
    "litert": FormatFunctions(".tflite", write_litert, read_litert, require_litert, ("fp32",), batch=1),
    "timm": FormatFunctions("", write_timm, read_timm, precisions=("fp32",)),
}


def format_of(path: Path) -> Format | None:
    """The format that the ending of a file's name says."""
    fitting = [kind for kind, its in FORMATS.items() if its.ending and path.name.endswith(its.ending)]
    return max(fitting, key=lambda kind: len(FORMATS[kind].ending), default=None)
