"""ONNX files that vitprune exported, run by onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitprune.checkpoint.metadata import METADATA_KEY, Metadata, parse_metadata
from vitprune.checkpoint.program import Program, foreign, opening, require
from vitprune.checkpoint.weight_file import check_exists
from vitprune.common.formatting import first_line
from vitprune.common.run_folder import ADAPTIVE
from vitprune.errors import CheckpointError, UsageError


class OnnxGraph(NamedTuple):
    """An ONNX file of ours, checked and ready to run.

    Attributes:
        run: what it takes to all that it puts out, fp32 on the CPU.
        takes: shape of its input; a size that is open is no number.
        gives: shapes of its outputs.
        metadata: what it says of itself.
        precision: of its weights.
    """

    run: Callable[[Tensor], Any]  # a tuple of as many tensors as it has outputs
    takes: list[Any]
    gives: list[list[Any]]
    metadata: Metadata
    precision: str


def read_onnx(path: Path) -> Program:
    """Open an ONNX file of ours, as `open_onnx` does, that turns images into one output.

    Raises:
        UsageError: it is a part of an adaptive model.
        ExportError: a package is missing.
        CheckpointError: as of `open_onnx`, or it does not fit its own metadata.
    """
    if _is_part(path):
        raise UsageError(f"'{path}' is a part of an adaptive model", f"name its folder: {path.parent}")
    graph = open_onnx(path)
    if len(graph.gives) != 1:
        raise CheckpointError(f"'{path}' does not turn one fp32 tensor into another", "vitprune did not write it")
    return Program(
        lambda images: graph.run(images)[0], graph.takes, graph.gives[0], graph.metadata, graph.precision, path
    )


def open_onnx(path: Path) -> OnnxGraph:
    """Open an ONNX file of ours, also a quantised one, to run on as many threads as torch does.

    The file may come from anywhere: its metadata is checked as that of model.safetensors, and tensors that are kept in
    other files are refused.

    Raises:
        ExportError: a package is missing.
        CheckpointError: the file is missing, damaged, or not ours.
    """
    onnx, runtime, _ = require("onnx")
    check_exists(path)
    content = path.read_bytes()
    try:
        graph = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own class, which depends on how it is built
        raise CheckpointError(f"'{path}' is damaged or no ONNX file: {first_line(error)}", "copy it again") from error
    metadata = _metadata(graph, path)
    kind, kinds = onnx.TensorProto, {tensor.data_type for tensor in _tensors(graph, path)}
    precision = "int8" if kinds & {kind.INT8, kind.UINT8} else "fp16" if kind.FLOAT16 in kinds else "fp32"
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; its warnings are about the optimiser
    with opening("onnxruntime", path):  # from memory: what runs is what was checked
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (takes, *more), gives = session.get_inputs(), session.get_outputs()
    if more or {port.type for port in (takes, *gives)} != {"tensor(float)"}:
        raise CheckpointError(f"'{path}' does not turn one fp32 tensor into others", "vitprune did not write it")

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in session.run(None, {takes.name: batch.numpy()}))

    return OnnxGraph(run, takes.shape, [port.shape for port in gives], metadata, precision)


def _is_part(path: Path) -> bool:
    about = path.parent / ADAPTIVE
    return about.is_file() and json.dumps(path.name) in about.read_text(encoding="utf-8", errors="replace")


def _metadata(graph: Any, path: Path) -> Metadata:
    texts = [entry.value for entry in graph.metadata_props if entry.key == METADATA_KEY]
    if len(texts) != 1:
        raise foreign(path, "onnx")
    return parse_metadata(texts[0], path)


def _tensors(message: Any, path: Path) -> Iterator[Any]:
    """All tensors of a graph, wherever in it.

    Raises:
        CheckpointError: one is kept in another file, which could be any file of this machine.
    """
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if field.message_type.name != "TensorProto":
                yield from _tensors(part, path)
                continue
            if part.external_data or part.data_location == 1:
                where = next((entry.value for entry in part.external_data if entry.key == "location"), "another file")
                raise CheckpointError(
                    f"'{path}' keeps the tensor '{part.name}' in '{where}': only whole files are opened",
                    "vitprune export writes one file",
                )
            yield part
