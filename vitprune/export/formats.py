"""The formats: how each is written from a model, and how it is opened again to be compared with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from vitprune.checkpoint.engine_programs import read_executorch, read_litert, read_openvino
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.export.engines import read_coreml, runs_coreml, write_coreml, write_executorch, write_litert
from vitprune.export.onnx_file import write_onnx, write_openvino
from vitprune.export.target import ExportPrecision, Target
from vitprune.export.timm_folder import read_timm, write_timm
from vitprune.export.torch_program import read_aoti, read_pt2, write_aoti, write_pt2

Format = Literal["onnx", "openvino", "pt2", "aoti", "executorch", "litert", "coreml", "timm"]


class FormatFunctions(NamedTuple):
    """How a format is written, and what it can do.

    Attributes:
        ending: of its files; a timm folder has none.
        write: write a model.
        read: open what was written as a module.
        precisions: those it is written in, the usual one first.
        of_onnx: whether it is made of an ONNX file, which has an opset.
        batch: how many images at once where nothing is asked; None for any number.
        halves: whether what writes it takes a model in fp32 for fp16 too.
        folder: whether what is written is one.
        runs_here: whether this machine can run what is written.
    """

    ending: str
    write: Callable[[nn.Module, Metadata, Path, Target], None]
    read: Callable[[Path], nn.Module]
    precisions: tuple[ExportPrecision, ...] = ("fp32", "fp16")
    of_onnx: bool = False
    batch: int | None = None
    halves: bool = False
    folder: bool = False
    runs_here: Callable[[], bool] = lambda: True


_ALL: tuple[ExportPrecision, ...] = ("fp32", "fp16", "int8")
_APPLE: tuple[ExportPrecision, ...] = ("fp16", "fp32")
FORMATS: dict[Format, FormatFunctions] = {
    "onnx": FormatFunctions(".onnx", write_onnx, read_onnx, _ALL, of_onnx=True),
    "openvino": FormatFunctions(".xml", write_openvino, read_openvino, _ALL, of_onnx=True),
    "pt2": FormatFunctions(".pt2", write_pt2, read_pt2),
    "aoti": FormatFunctions(".aoti.pt2", write_aoti, read_aoti),
    "executorch": FormatFunctions(".pte", write_executorch, read_executorch, batch=1),
    "litert": FormatFunctions(".tflite", write_litert, read_litert, ("fp32",), batch=1),
    "coreml": FormatFunctions(
        ".mlpackage", write_coreml, read_coreml, _APPLE, batch=1, halves=True, folder=True, runs_here=runs_coreml
    ),
    "timm": FormatFunctions("", write_timm, read_timm, ("fp32",), folder=True),
}


def format_of(path: Path) -> Format | None:
    """The format that the ending of a file's name says."""
    fitting = [kind for kind, its in FORMATS.items() if its.ending and path.name.endswith(its.ending)]
    return max(fitting, key=lambda kind: len(FORMATS[kind].ending), default=None)
