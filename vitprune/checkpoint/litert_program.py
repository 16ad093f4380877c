"""LiteRT's files (.tflite) that vitprune exported."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from vitprune.checkpoint.metadata import MAX_METADATA_BYTES, METADATA_KEY, Metadata, parse_metadata
from vitprune.checkpoint.program import Program, require
from vitprune.checkpoint.weight_file import check_exists
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError

_ABOUT = f"{METADATA_KEY}.json"
"""In the zip archive at the end of the file, where LiteRT's own tools keep what belongs to a model."""


def require_litert() -> ModuleType:
    """The package that runs LiteRT's files, ai_edge_litert.

    Raises:
        ExportError: it is not installed.
    """
    (runtime,) = require("LiteRT", "litert", "ai_edge_litert.interpreter", install="litert-torch")
    return runtime


def write_litert_file(model: nn.Module, images: Tensor, metadata: Metadata, path: Path) -> None:
    """Convert a model for so many images at once."""
    import litert_torch

    litert_torch.convert(model, (images,)).export(str(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(_ABOUT, metadata.model_dump_json())


def read_litert(path: Path) -> Program:
    """Open a LiteRT file of ours, to run on as many threads as torch does.

    Raises:
        ExportError: the package is missing.
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    runtime = require_litert()
    check_exists(path)
    content = path.read_bytes()
    metadata = parse_metadata(_about(content, path), path)
    try:
        interpreter = runtime.Interpreter(model_content=content, num_threads=torch.get_num_threads())
        interpreter.allocate_tensors()
        (takes,), (gives,) = interpreter.get_input_details(), interpreter.get_output_details()
    except Exception as error:  # its errors have no common class
        raise CheckpointError(f"LiteRT cannot open '{path}': {first_line(error)}", "copy it again") from error

    def run(images: Tensor) -> Tensor:
        interpreter.set_tensor(takes["index"], images.numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(gives["index"]))

    in_shape, out_shape = ([int(size) for size in port["shape"]] for port in (takes, gives))
    return Program(run, in_shape, out_shape, metadata, "fp32", path)


def _about(content: bytes, path: Path) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.getinfo(_ABOUT).file_size <= MAX_METADATA_BYTES:
                return archive.read(_ABOUT).decode()
    except (zipfile.BadZipFile, KeyError, ValueError):
        pass
    raise CheckpointError(
        f"'{path}' was not written by vitprune: it has no entry '{_ABOUT}'",
        "vitprune export MODEL --format litert writes a file that has one",
    )
