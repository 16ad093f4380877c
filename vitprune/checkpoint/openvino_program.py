"""OpenVINO's files (IR) that vitprune exported: an .xml with the graph, a .bin of its name with the weights."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitprune.checkpoint.metadata import METADATA_KEY, PRECISION_KEY, Metadata, parse_metadata
from vitprune.checkpoint.program import Program, require
from vitprune.checkpoint.weight_file import check_exists
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError


def require_openvino() -> ModuleType:
    """The package openvino.

    Raises:
        ExportError: it is not installed.
    """
    (openvino,) = require("OpenVINO", "openvino", "openvino")
    return openvino


def write_openvino_file(onnx_file: Path, metadata: Metadata, precision: str, path: Path) -> None:
    """Convert an ONNX file of ours; its weights go beside `path`, which ends in .xml."""
    openvino = require_openvino()
    model = openvino.convert_model(onnx_file)
    model.set_rt_info(metadata.model_dump_json(), METADATA_KEY)
    model.set_rt_info(precision, PRECISION_KEY)
    openvino.save_model(model, path, compress_to_fp16=False)  # what was asked for is in the graph already


def read_openvino(path: Path) -> Program:
    """Open an OpenVINO file of ours, to run on as many threads as torch does, fp32 in fp32 also where bf16 is faster.

    Raises:
        ExportError: the package is missing.
        CheckpointError: a file is missing, damaged, not ours, or does not fit its own metadata.
    """
    openvino = require_openvino()
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        check_exists(file)
    core = openvino.Core()
    try:
        model = core.read_model(path, weights)
        known = model.has_rt_info(METADATA_KEY) and model.has_rt_info(PRECISION_KEY)
        text, precision = (
            (str(model.get_rt_info(key).astype(str)) for key in (METADATA_KEY, PRECISION_KEY)) if known else ("", "")
        )
        hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(model, "CPU", hints) if known else None
    except Exception as error:  # its errors have no common class
        raise CheckpointError(f"OpenVINO cannot open '{path}': {first_line(error)}", "copy both files again") from error
    if compiled is None:
        raise CheckpointError(
            f"'{path}' was not written by vitprune: it has no '{METADATA_KEY}' entry",
            "vitprune export MODEL --format openvino writes a file that has one",
        )

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0])

    def shape(port: Any) -> list[Any]:
        return [size.get_length() if size.is_static else "batch" for size in port.partial_shape]

    metadata = parse_metadata(text, path)
    return Program(run, shape(compiled.input(0)), shape(compiled.output(0)), metadata, precision, path)
