"""ExecuTorch's files (.pte) that vitprune exported, run by its XNNPACK kernels."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from torch import Tensor
from torch.export import ExportedProgram

from vitprune.checkpoint.metadata import METADATA_KEY, PRECISION_KEY, Metadata, parse_metadata
from vitprune.checkpoint.program import Program, require
from vitprune.checkpoint.weight_file import check_exists
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError


def require_executorch() -> ModuleType:
    """ExecuTorch's runtime.

    Raises:
        ExportError: it is not installed.
    """
    (runtime,) = require("ExecuTorch", "executorch", "executorch.runtime")
    return runtime


def write_executorch_file(program: ExportedProgram, metadata: Metadata, precision: str, path: Path) -> None:
    """Convert torch.export's program; what vitprune says of it are methods that return texts."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    about = {METADATA_KEY: metadata.model_dump_json(), PRECISION_KEY: precision}
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=about)
    path.write_bytes(lowered.to_executorch().buffer)


def read_executorch(path: Path) -> Program:
    """Open an ExecuTorch file of ours.

    Raises:
        ExportError: the package is missing.
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    runtime = require_executorch().Runtime.get()
    check_exists(path)
    try:
        program = runtime.load_program(path.read_bytes())
        known = {METADATA_KEY, PRECISION_KEY} <= program.method_names
        text, precision = (
            (program.load_method(name).execute([])[0] for name in (METADATA_KEY, PRECISION_KEY)) if known else ("", "")
        )
        method = program.load_method("forward") if known else None
    except Exception as error:  # its errors have no common class
        raise CheckpointError(f"ExecuTorch cannot open '{path}': {first_line(error)}", "copy it again") from error
    if method is None:
        raise CheckpointError(
            f"'{path}' was not written by vitprune: it has no '{METADATA_KEY}' entry",
            "vitprune export MODEL --format executorch writes a file that has one",
        )

    def run(images: Tensor) -> Tensor:
        # By the program, which keeps its methods and which they need: a method outlives it and then crashes.
        (output,) = program.load_method("forward").execute([images.contiguous()])
        return output  # type: ignore[no-any-return]

    about = method.metadata
    takes, gives = about.input_tensor_meta(0).sizes(), about.output_tensor_meta(0).sizes()
    return Program(run, takes, gives, parse_metadata(text, path), precision, path)
