"""ONNX files, and OpenVINO's, which are made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.checkpoint.metadata import METADATA_KEY, PRECISION_KEY, Metadata
from vitprune.checkpoint.program import quiet, require
from vitprune.common.formatting import first_line
from vitprune.errors import ExportError
from vitprune.export.int8 import quantise_onnx
from vitprune.export.target import ANY, Ports, Target, converting, example

_OUTPUT = "vitprune_output"
_MAX_ONNX_BYTES = 2**31 - 2**20
"""Protobuf's limit of a file, less room for the graph."""


def write_onnx(
    model: nn.Module, metadata: Metadata, path: Path, target: Target = ANY, ports: Ports | None = None
) -> None:
    """Write a model as one ONNX file: `images` (batch, C, H, W) to what its task puts out: `logits`, `values`,
    `embedding` (batch, ...) or `features` (batch, tokens, channels). A part of a model has other `ports`.

    The model is in eval mode, on the CPU. The metadata goes into the file's metadata_props, as the JSON that
    model.safetensors carries.

    Raises:
        ExportError: a package is missing, torch cannot export the model, or it is larger than an ONNX file may be.
    """
    onnx, *_ = require("onnx")
    ports = ports or Ports.of(metadata)
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if num_bytes > _MAX_ONNX_BYTES:
        raise ExportError(
            f"the model has {num_bytes / 2**30:.2f} GiB of weights, and one ONNX file holds 2",
            "try --precision fp16, or --format pt2",
        )
    try:
        with quiet(), _plain_attention(model), torch.no_grad():
            try:
                graph = _graph(model, ports, target, optimize=True)
                onnx.checker.check_model(graph)
            except onnx.checker.ValidationError:
                # Where a tensor is clamped several times (Gemma), onnxscript's optimiser loses the bounds.
                graph = _graph(model, ports, target, optimize=False)
                onnx.checker.check_model(graph)
    except Exception as error:  # whatever torch stumbles over
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps what went wrong in pages of advice
            cause = cause.__cause__
        raise ExportError(f"torch cannot export the model to ONNX: {first_line(cause)}") from error
    _name_nodes(graph)
    _forget_sources(graph)
    graph.metadata_props.add(key=METADATA_KEY, value=metadata.model_dump_json())
    path.write_bytes(graph.SerializeToString())
    if target.quantisation is not None:
        batches = target.quantisation.batches(target.batch)
        with converting("onnxruntime"):
            quantise_onnx(path, batches)


def write_openvino(model: nn.Module, metadata: Metadata, path: Path, target: Target = ANY) -> None:
    """Write what `write_onnx` does as OpenVINO's `path`, an .xml, and a .bin beside it.

    Raises:
        ExportError: see `write_onnx`.
    """
    (openvino,) = require("openvino")
    between = path.with_suffix(".onnx")
    write_onnx(model, metadata, between, target)
    with converting("OpenVINO"):
        graph = openvino.convert_model(between)
        for key, text in ((METADATA_KEY, metadata.model_dump_json()), (PRECISION_KEY, target.precision)):
            graph.set_rt_info(text, key)
        openvino.save_model(graph, path, compress_to_fp16=False)  # what was asked for is in the graph already
    between.unlink()


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Timm's own products instead of one fused operator, which ONNX takes apart with the sizes computed at run time."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def _graph(model: nn.Module, ports: Ports, target: Target, *, optimize: bool) -> Any:
    outputs = {f"{_OUTPUT}_{name}": name for name in ports.gives}
    program: Any = torch.onnx.export(
        model,
        **example(ports, target),
        dynamo=True,
        input_names=[ports.takes],
        output_names=list(outputs),
        opset_version=target.opset,
        external_data=False,
        optimize=optimize,
        verbose=False,
    )
    proto = program.model_proto
    _rename(proto.graph, {name: f"{name}_inside" for name in ports.gives} | outputs)
    return proto


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Give values other names: what torch calls one inside the graph may be what the output is to be called."""
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for value in (*graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)


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
