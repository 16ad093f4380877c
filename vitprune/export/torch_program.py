"""PyTorch's own programs: torch.export's, and machine code that AOTInductor makes of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vitprune.checkpoint.metadata import METADATA_KEY, Metadata
from vitprune.checkpoint.program import quiet
from vitprune.common.formatting import first_line
from vitprune.errors import ExportError
from vitprune.export.target import ANY, Ports, Target, converting, example
from vitprune.tasks import task_named


def exported_program(model: nn.Module, metadata: Metadata, target: Target) -> torch.export.ExportedProgram:
    """A model as torch.export's program, its output called as in ONNX.

    The model is in eval mode, on the CPU.

    Raises:
        ExportError: torch cannot export the model.
    """
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, **example(Ports.of(metadata), target))
    except Exception as error:  # whatever torch stumbles over
        raise ExportError(f"torch.export cannot export the model: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    _name_output(program, task_named(metadata.task).output)
    return program


def write_pt2(model: nn.Module, metadata: Metadata, path: Path, target: Target = ANY) -> None:
    """Write a model as torch.export's program, for Python; the metadata is its extra file vitprune.json.

    Raises:
        ExportError: see `exported_program`.
    """
    program = exported_program(model, metadata, target)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"vitprune.json": metadata.model_dump_json()})


def read_pt2(path: Path) -> nn.Module:
    """Only of a file just written: to torch.export.load a file is a program, which may do anything."""
    with path.open("rb") as file, quiet():
        module = torch.export.load(file).module()
    return Function(lambda images: module(images))


def write_aoti(model: nn.Module, metadata: Metadata, path: Path, target: Target = ANY) -> None:
    """Write a model as AOTInductor's package: machine code for processors like this one, for Python and C++.

    The metadata is its entry `vitprune`, in `get_metadata()` of what is loaded.

    Raises:
        ExportError: see `exported_program`, or there is no C++ compiler.
    """
    from torch._inductor.exc import InvalidCxxCompiler

    program = exported_program(model, metadata, target)
    configs = {"aot_inductor.metadata": {METADATA_KEY: metadata.model_dump_json()}}
    try:
        with converting("AOTInductor"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    except ExportError as error:
        if isinstance(error.__cause__, InvalidCxxCompiler):
            error.hint = "install a C++ compiler: g++ or clang++"
        raise


class Function(nn.Module):
    """A function as a module, which may be put in eval mode; an exported one may not."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


def read_aoti(path: Path) -> nn.Module:
    """Only of a file just written: it is machine code."""
    return Function(torch._inductor.aoti_load_package(str(path)))


def _name_output(program: torch.export.ExportedProgram, wanted: str) -> None:
    """Call the output of a program by another name, which an operator inside may have."""
    (output,) = program.graph.output_node().args[0]
    for node in program.graph.nodes:
        if node.name == wanted:
            node._rename(f"{wanted}_inside")
    output.name = program.graph_signature.output_specs[0].arg.name = wanted
