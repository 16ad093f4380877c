"""ONNX: one self-describing file, written by torch's exporter and run by onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.checkpoint.metadata import METADATA_KEY, Metadata, parse_metadata
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError, ExportError
from vitprune.export.program import Program, check_shapes, quiet

OPSET = 20
"""The first that knows GELU, and old enough for runtimes of the last years."""
INPUT, OUTPUT = "images", "logits"

_MAX_BYTES = 2**31 - 2**20
"""Protobuf's limit of a file, less room for the graph."""


def require_onnx() -> tuple[ModuleType, ModuleType]:
    """The packages onnx and onnxruntime.

    Raises:
        ExportError: one of the extra is not installed; names it.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter imports it
    except ImportError as error:
        raise ExportError(
            f"ONNX files need the package '{error.name or 'onnx'}', which cannot be imported here: {error}",
            'pip install "vitprune[onnx]"',
        ) from error
    return onnx, onnxruntime


def write_onnx(model: nn.Module, example: Tensor, metadata: Metadata, path: Path) -> None:
    """Write a model as one ONNX file with any batch size: `images` (batch, C, H, W) to `logits` (batch, num_classes).

    Args:
        model: in eval mode, on the CPU.
        example: images, at least two: a batch of one would be taken for a constant.
        metadata: goes into the file's metadata_props, as the JSON that model.safetensors carries.
        path: what to write.

    Raises:
        ExportError: a package is missing, torch cannot export the model, or it is larger than an ONNX file may be.
    """
    onnx, _ = require_onnx()
    _check_size(model)
    try:
        with quiet(), torch.no_grad():
            try:
                graph = _graph(model, example, optimize=True)
                onnx.checker.check_model(graph)
            except onnx.checker.ValidationError:
                # Where a tensor is clamped several times (Gemma), onnxscript's optimiser loses the bounds.
                graph = _graph(model, example, optimize=False)
                onnx.checker.check_model(graph)
    except Exception as error:  # whatever torch stumbles over
        raise ExportError(f"torch cannot export the model to ONNX: {_cause(error)}") from error
    _name_nodes(graph)
    _forget_sources(graph)
    graph.producer_name = "vitprune"
    graph.metadata_props.add(key=METADATA_KEY, value=metadata.model_dump_json())
    path.write_bytes(graph.SerializeToString())


def _graph(model: nn.Module, example: Tensor, *, optimize: bool) -> Any:
    program: Any = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        external_data=False,
        optimize=optimize,
        verbose=False,
    )
    return program.model_proto


def read_onnx(path: Path) -> Program:
    """Open an ONNX file of ours, also a quantised one, to run on as many threads as torch does.

    The file may come from anywhere: its metadata is checked as that of model.safetensors, and tensors that are kept in
    other files are refused.

    Raises:
        ExportError: a package is missing.
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    onnx, runtime = require_onnx()
    if not path.is_file():
        raise CheckpointError(f"there is no file '{path}'", "check the path")
    content = path.read_bytes()
    try:
        graph = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own class, which depends on how it is built
        raise CheckpointError(f"'{path}' is damaged or no ONNX file: {first_line(error)}", "copy it again") from error
    metadata = _metadata(graph, path)
    kinds = {tensor.data_type for tensor in _tensors(graph, path)}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; its warnings are about the optimiser
    try:
        # From memory: what runs is what was checked.
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise CheckpointError(f"onnxruntime cannot open '{path}': {first_line(error)}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if [each.type for each in (*inputs, *outputs)] != ["tensor(float)"] * 2:
        raise CheckpointError(f"'{path}' does not turn one fp32 tensor into another", "vitprune did not write it")
    num_classes = check_shapes(path, metadata, inputs[0].shape, outputs[0].shape)
    names = [outputs[0].name], inputs[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(names[0], {names[1]: images.numpy()})[0])

    return Program(run, metadata, num_classes, _precision(onnx, kinds), path)


def _metadata(graph: Any, path: Path) -> Metadata:
    texts = [entry.value for entry in graph.metadata_props if entry.key == METADATA_KEY]
    if len(texts) != 1:
        raise CheckpointError(
            f"'{path}' was not written by vitprune: its metadata has no '{METADATA_KEY}' entry",
            "vitprune export MODEL --format onnx writes a file that has one",
        )
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


def _precision(onnx: Any, kinds: set[int]) -> str:
    kind = onnx.TensorProto
    if kinds & {kind.INT8, kind.UINT8}:
        return "int8"
    return "fp16" if kind.FLOAT16 in kinds else "fp32"


def _check_size(model: nn.Module) -> None:
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if num_bytes > _MAX_BYTES:
        raise ExportError(
            f"the model has {num_bytes / 2**30:.2f} GiB of weights, and one ONNX file holds 2",
            "try --precision fp16, or --format pt2",
        )


def _name_nodes(graph: Any) -> None:
    """Put the module's name before a node's, so that whoever quantises or looks can tell which is which."""
    for node in graph.graph.node:
        texts = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        modules = re.findall(r"'([\w.]*)'", texts[0]) if texts else []  # from the outermost in, then the operator
        if len(modules) > 1 and modules[-2]:
            node.name = f"{modules[-2]}/{node.name}"


def _forget_sources(message: Any) -> None:
    """Take away where in which source file a node came from: paths of this machine."""
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.name != "TensorProto":
            for part in [value] if hasattr(value, "ListFields") else value:
                _forget_sources(part)


def _cause(error: BaseException) -> str:
    """The exporter wraps what went wrong in pages of advice; the innermost error says it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
