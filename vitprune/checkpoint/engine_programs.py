"""Files of OpenVINO (IR), ExecuTorch (.pte) and LiteRT (.tflite) that vitprune exported."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitprune.checkpoint.metadata import MAX_METADATA_BYTES, METADATA_KEY, PRECISION_KEY, parse_metadata
from vitprune.checkpoint.program import Program, foreign, opening, require
from vitprune.checkpoint.weight_file import check_exists

LITERT_ENTRY = f"{METADATA_KEY}.json"
"""In the zip archive at the end of the file, where LiteRT's own tools keep what belongs to a model."""
_KEYS = (METADATA_KEY, PRECISION_KEY)


def read_openvino(path: Path) -> Program:
    """Open an OpenVINO file of ours, an .xml with the graph, and a .bin of its name with the weights.

    It runs on as many threads as torch does, fp32 in fp32 also where bf16 is faster.

    Raises:
        ExportError: the package is missing.
        CheckpointError: a file is missing, damaged, not ours, or does not fit its own metadata.
    """
    (openvino,) = require("openvino")
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        check_exists(file)
    core = openvino.Core()
    with opening("OpenVINO", path):
        model = core.read_model(path, weights)
        if not all(model.has_rt_info(key) for key in _KEYS):
            raise foreign(path, "openvino")
        text, precision = (str(model.get_rt_info(key).astype(str)) for key in _KEYS)
        hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(model, "CPU", hints)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0])

    def shape(port: Any) -> list[Any]:
        return [size.get_length() if size.is_static else "batch" for size in port.partial_shape]

    metadata = parse_metadata(text, path)
    return Program(run, shape(compiled.input(0)), shape(compiled.output(0)), metadata, precision, path)


def read_executorch(path: Path) -> Program:
    """Open an ExecuTorch file of ours, run by XNNPACK kernels; what it says of itself are methods that give texts.

    Raises:
        ExportError: the package is missing.
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    (runtime,) = require("executorch")
    check_exists(path)
    with opening("ExecuTorch", path):
        program = runtime.Runtime.get().load_program(path.read_bytes())
        if not program.method_names.issuperset(_KEYS):
            raise foreign(path, "executorch")
        text, precision = (program.load_method(key).execute([])[0] for key in _KEYS)
        about = program.load_method("forward").metadata

    def run(images: Tensor) -> Tensor:
        # By the program, which keeps its methods and which they need: a method outlives it and then crashes.
        (output,) = program.load_method("forward").execute([images.contiguous()])
        return output  # type: ignore[no-any-return]

    takes, gives = about.input_tensor_meta(0).sizes(), about.output_tensor_meta(0).sizes()
    return Program(run, takes, gives, parse_metadata(text, path), precision, path)


def read_litert(path: Path) -> Program:
    """Open a LiteRT file of ours, to run on as many threads as torch does.

    Raises:
        ExportError: the package is missing.
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    (runtime,) = require("litert")
    check_exists(path)
    content = path.read_bytes()
    metadata = parse_metadata(_about(content, path), path)
    with opening("LiteRT", path):
        interpreter = runtime.Interpreter(model_content=content, num_threads=torch.get_num_threads())
        interpreter.allocate_tensors()
        (takes,), (gives,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: Tensor) -> Tensor:
        interpreter.set_tensor(takes["index"], images.numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(gives["index"]))

    in_shape, out_shape = ([int(size) for size in port["shape"]] for port in (takes, gives))
    return Program(run, in_shape, out_shape, metadata, "fp32", path)


def _about(content: bytes, path: Path) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.getinfo(LITERT_ENTRY).file_size <= MAX_METADATA_BYTES:
                return archive.read(LITERT_ENTRY).decode()
    except (zipfile.BadZipFile, KeyError, ValueError):
        pass
    raise foreign(path, "litert")
