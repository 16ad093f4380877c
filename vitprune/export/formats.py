"""The formats: how each is written from a model, and how it is opened again to be compared with it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from vitprune.checkpoint.metadata import METADATA_KEY, Metadata
from vitprune.checkpoint.onnx_program import read_onnx, require_onnx
from vitprune.checkpoint.openvino_program import read_openvino, require_openvino, write_openvino_file
from vitprune.common.formatting import first_line
from vitprune.common.run_folder import CONFIG, WEIGHTS
from vitprune.errors import ExportError
from vitprune.export.int8 import Quantisation, quantise
from vitprune.tasks import task_named

Format = Literal["onnx", "openvino", "pt2", "timm"]

ENDINGS: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
"""Of a program's file; a timm folder has none."""

TIMM_FILES = (WEIGHTS, CONFIG)
TRACED_BATCH_SIZE = 3
"""Where any is to do. Not one: a batch of one would be taken for a constant."""
_ANY_BATCH_SIZE = ({0: torch.export.Dim("batch")},)

_OUTPUT = "vitprune_output"
OPSETS = range(18, 25)
"""What onnxruntime runs of what torch writes."""
OPSET = 20
"""The first that knows GELU, and old enough for runtimes of the last years."""
_MAX_ONNX_BYTES = 2**31 - 2**20
"""Protobuf's limit of a file, less room for the graph."""
_NOISY = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")
_OF_THE_WEIGHTS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""What timm's configuration says of weights. One rebuilt from a file has that of its architecture's default ones."""


class Target(NamedTuple):
    """What a program is written for.

    Attributes:
        batch: how many images at once, always; None for any number.
        opset: of ONNX, in `OPSETS`.
        quantisation: of ONNX and OpenVINO; None for weights as they are.
    """

    batch: int | None = None
    opset: int = OPSET
    quantisation: Quantisation | None = None


ANY = Target()


class Ports(NamedTuple):
    """What a program takes and gives.

    Attributes:
        takes: name of its input.
        shape: of one of these, without the batch.
        gives: names of its outputs.
    """

    takes: str
    shape: tuple[int, ...]
    gives: tuple[str, ...]

    @classmethod
    def of(cls, metadata: Metadata) -> Ports:
        """Images to what the task puts out."""
        return cls("images", metadata.preprocessing.input_size, (task_named(metadata.task).output,))


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
    onnx, _ = require_onnx()
    ports = ports or Ports.of(metadata)
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if num_bytes > _MAX_ONNX_BYTES:
        raise ExportError(
            f"the model has {num_bytes / 2**30:.2f} GiB of weights, and one ONNX file holds 2",
            "try --precision fp16, or --format pt2",
        )
    try:
        with _quiet(), _plain_attention(model), torch.no_grad():
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
        quantise(path, target.quantisation.images, target.batch)


def write_openvino(model: nn.Module, metadata: Metadata, path: Path, target: Target = ANY) -> None:
    """Write what `write_onnx` does as OpenVINO's `path`, an .xml, and a .bin beside it.

    Raises:
        ExportError: see `write_onnx`.
    """
    require_openvino()
    between = path.with_suffix(".onnx")
    write_onnx(model, metadata, between, target)
    precision = read_onnx(between).precision
    write_openvino_file(between, metadata, precision, path)
    between.unlink()


def write_pt2(model: nn.Module, metadata: Metadata, path: Path, target: Target = ANY) -> None:
    """Write a model as torch.export's program, for Python, AOTInductor and ExecuTorch.

    The model is in eval mode, on the CPU. The program's output is called as in ONNX; the metadata goes beside it as the
    extra file vitprune.json.

    Raises:
        ExportError: torch cannot export the model.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(model, **_example(Ports.of(metadata), target))
    except Exception as error:  # whatever torch stumbles over
        raise ExportError(f"torch.export cannot export the model: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    _name_output(program, task_named(metadata.task).output)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"vitprune.json": metadata.model_dump_json()})


def write_timm(model: nn.Module, metadata: Metadata, folder: Path, target: Target = ANY) -> None:
    """Write `config.json` and `model.safetensors` for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The metadata, of the sparse model whose backbone it is, gives class names, preprocessing, licence and origin, and
    what its outputs are if these are no classes: as transformers' `problem_type`.

    Raises:
        ExportError: the model's arguments cannot be stored.
    """
    config: dict[str, Any] = {"label_names": metadata.class_names} if metadata.class_names else {}
    if metadata.task != "classification" and (problem := task_named(metadata.task).problem_type):
        config["problem_type"] = problem
    if metadata.origin:  # else what timm says of the architecture's default weights stays
        known = {key: metadata.origin[key] for key in ("license", "origin_url") if metadata.origin.get(key)}
        config["pretrained_cfg"] = dict.fromkeys(_OF_THE_WEIGHTS) | known
    preprocessing = metadata.preprocessing.model_dump(exclude={"exif"})
    before = model.pretrained_cfg
    try:
        # timm knows no entry of that name, and refuses a folder that has it.
        model.pretrained_cfg = {key: value for key, value in before.items() if key != "exif"}  # type: ignore[union-attr,operator,assignment]
        save_for_hf(model, str(folder), model_config=config, data_config=preprocessing, safe_serialization=True)
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"timm cannot save the model: {first_line(error)}") from error
    finally:
        model.pretrained_cfg = before


def _read_pt2(path: Path) -> nn.Module:
    """Only of a file just written: to torch.export.load a file is a program, which may do anything."""
    with path.open("rb") as file, _quiet():
        return torch.export.load(file).module()


def _read_timm(folder: Path) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


class FormatFunctions(NamedTuple):
    """How a format is written, and how what was written is opened as a module."""

    write: Callable[[nn.Module, Metadata, Path, Target], None]
    read: Callable[[Path], nn.Module]


FORMATS: dict[Format, FormatFunctions] = {
    "onnx": FormatFunctions(write_onnx, read_onnx),
    "openvino": FormatFunctions(write_openvino, read_openvino),
    "pt2": FormatFunctions(write_pt2, _read_pt2),
    "timm": FormatFunctions(write_timm, _read_timm),
}


def _example(ports: Ports, target: Target) -> dict[str, Any]:
    """What to trace with, and which of its sizes stay open."""
    batch = torch.zeros(target.batch or TRACED_BATCH_SIZE, *ports.shape)
    return {"args": (batch,), "dynamic_shapes": None if target.batch else _ANY_BATCH_SIZE}


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
        **_example(ports, target),
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


def _name_output(program: torch.export.ExportedProgram, wanted: str) -> None:
    """Call the output of a program by another name, which an operator inside may have."""
    (output,) = program.graph.output_node().args[0]
    for node in program.graph.nodes:
        if node.name == wanted:
            node._rename(f"{wanted}_inside")
    output.name = program.graph_signature.output_specs[0].arg.name = wanted


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch's exporters warn and log, which their users cannot change."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
