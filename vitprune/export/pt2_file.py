""".pt2: torch.export's own format, for Python, AOTInductor and ExecuTorch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.checkpoint.metadata import Metadata, parse_metadata
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError, ExportError
from vitprune.export.program import Program, check_shapes, quiet
from vitprune.export.pt2_contents import METADATA_RECORD, check_contents


def write_pt2(model: nn.Module, example: Tensor, metadata: Metadata, path: Path) -> None:
    """Write a model as an exported program with any batch size: images (batch, C, H, W) to logits (batch, num_classes).

    Args:
        model: in eval mode, on the CPU.
        example: images, at least two: a batch of one would be taken for a constant.
        metadata: goes beside the program as the extra file vitprune.json.
        path: what to write.

    Raises:
        ExportError: torch cannot export the model.
    """
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # whatever torch stumbles over
        raise ExportError(f"torch.export cannot export the model: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA_RECORD: metadata.model_dump_json()})


def read_pt2(path: Path) -> Program:
    """Open a .pt2 file of ours, to run on the CPU.

    Only for files that you trust: see `vitprune.export.pt2_contents` for what is refused beforehand.

    Raises:
        CheckpointError: the file is missing, damaged, not ours, could run code, or does not fit its own metadata.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file '{path}'", "check the path")
    content = path.read_bytes()
    metadata = parse_metadata(check_contents(content, path), path)
    try:
        with quiet():
            program = torch.export.load(io.BytesIO(content))
            module: Any = program.module()
        takes, gives = (_shape(program, names[0]) for names in _ends(program))
    except Exception as error:  # of a file from anywhere
        raise CheckpointError(f"torch cannot open '{path}': {first_line(error)}", "copy it again") from error
    num_classes = check_shapes(path, metadata, takes, gives)
    kinds = {tensor.dtype for tensor in program.state_dict.values()}
    precision = "fp16" if torch.float16 in kinds else "fp32"

    def run(images: Tensor) -> Tensor:
        logits: Tensor = module(images)
        return logits

    return Program(run, metadata, num_classes, precision, path)


def _ends(program: Any) -> tuple[list[str], list[str]]:
    """Names of what goes in and comes out."""
    signature = program.graph_signature
    return list(signature.user_inputs), list(signature.user_outputs)


def _shape(program: Any, name: str) -> list[Any]:
    """Shape of a value of the graph: whole numbers, and symbols where it is dynamic."""
    node = next(node for node in program.graph.nodes if node.name == name)
    return [size if isinstance(size, int) else str(size) for size in node.meta["val"].shape]
