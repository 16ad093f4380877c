"""Files for engines that are made of PyTorch's program: ExecuTorch's, LiteRT's and Core ML's."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.checkpoint.engine_programs import LITERT_ENTRY
from vitprune.checkpoint.metadata import METADATA_KEY, PRECISION_KEY, Metadata
from vitprune.checkpoint.program import require
from vitprune.export.target import Ports, Target, converting, example
from vitprune.export.torch_program import Function, exported_program
from vitprune.tasks import task_named

_EXACT = "fp32"
"""Marks what Core ML is to compute in fp32 always."""


def write_executorch(model: nn.Module, metadata: Metadata, path: Path, target: Target) -> None:
    """Write a model for ExecuTorch's XNNPACK kernels; what vitprune says of it are methods that return texts.

    Raises:
        ExportError: the package is missing, or the model cannot be exported.
    """
    require("executorch")
    program = exported_program(model, metadata, target)
    about = {METADATA_KEY: metadata.model_dump_json(), PRECISION_KEY: target.precision}
    with converting("ExecuTorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=about)
        path.write_bytes(lowered.to_executorch().buffer)


def write_litert(model: nn.Module, metadata: Metadata, path: Path, target: Target) -> None:
    """Write a model for LiteRT.

    Raises:
        ExportError: a package is missing, or the model cannot be converted.
    """
    _, litert = require("litert", "litert_torch")
    (images,) = example(Ports.of(metadata), target)["args"]
    with converting("LiteRT"):
        litert.convert(model, (images,)).export(str(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(LITERT_ENTRY, metadata.model_dump_json())


def write_coreml(model: nn.Module, metadata: Metadata, path: Path, target: Target) -> None:
    """Write a model as Core ML's package, a folder, for iOS 16 and macOS 13 on.

    The metadata is among the user-defined, which Xcode shows. Timm's modules are in fp16; predictors and what chooses
    and merges tokens stay in fp32.

    Raises:
        ExportError: the package is missing, or the model cannot be converted.
    """
    (coreml,) = require("coreml")
    program = exported_program(model, metadata, target)
    aten = torch.ops.aten
    unknown = torch._decomp.get_decompositions([aten.new_ones, aten.new_zeros, aten.new_full])
    with converting("Core ML"):
        from coremltools.converters.mil.mil.scope import ScopeSource

        program = program.run_decompositions(unknown)
        for node in program.graph.find_nodes(op="call_function", target=aten.alias.default):
            node.replace_all_uses_with(node.args[0])  # of detach; unknown to coremltools too
            program.graph.erase_node(node)
        for node in program.graph.nodes:
            modules = ["", *(path for path, _ in node.meta.get("nn_module_stack", {}).values())]
            node.meta["stack_trace"] = None if "model." in modules[-1] else _EXACT  # what coremltools passes on
        half = coreml.transform.FP16ComputePrecision(
            lambda step: _EXACT not in step.scopes[ScopeSource.EXIR_STACK_TRACE]
        )
        package = coreml.convert(
            program,
            inputs=[coreml.TensorType(name="images", dtype=np.float32)],
            outputs=[coreml.TensorType(name=task_named(metadata.task).output, dtype=np.float32)],
            minimum_deployment_target=coreml.target.iOS16,
            compute_precision=half if target.precision == "fp16" else coreml.precision.FLOAT32,
            skip_model_load=True,
        )
        package.user_defined_metadata[METADATA_KEY] = metadata.model_dump_json()
        package.save(str(path))


def read_coreml(path: Path) -> nn.Module:
    """Only of a package just written, and only where `runs_coreml`."""
    (coreml,) = require("coreml")
    model = coreml.models.MLModel(str(path))

    def run(images: Tensor) -> Tensor:
        (output,) = model.predict({"images": images.numpy()}).values()
        return torch.from_numpy(output)

    return Function(run)


def runs_coreml() -> bool:
    """Whether this machine runs Core ML's packages."""
    return sys.platform == "darwin"
