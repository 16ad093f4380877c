"""The whole of an export: write beside the place, open again, compare with the model, then put in place."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitprune.backbones import input_size
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import describe, is_ours
from vitprune.common.files import replacing, write_error
from vitprune.common.run_folder import RunFolder
from vitprune.errors import CheckpointError, ExportError, OutputError, UsageError
from vitprune.export.agreement import TRACED_BATCH_SIZE, Agreement, compare, random_batches
from vitprune.export.onnx_file import read_onnx, write_onnx
from vitprune.export.pt2_file import read_pt2, write_pt2
from vitprune.export.timm_folder import FILES, read_timm, write_timm
from vitprune.model import SparseViT, attach

Format = Literal["onnx", "pt2", "timm"]
ExportPrecision = Literal["fp32", "fp16"]

FORMATS: tuple[Format, ...] = ("onnx", "pt2", "timm")
PRECISIONS: tuple[ExportPrecision, ...] = ("fp32", "fp16")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        format: "onnx", "pt2" or "timm".
        precision: "fp32" or "fp16"; of the weights.
        output: the file or folder.
        size_mib: how large it is.
        agreement: beside the model, on the same images.
    """

    format: Format
    precision: ExportPrecision
    output: Path
    size_mib: float
    agreement: Agreement

    def summary(self) -> dict[str, Any]:
        """Figures for JSON."""
        return asdict(self) | {"output": str(self.output)}


def export_model(
    model: nn.Module,
    output: str | Path,
    *,
    precision: ExportPrecision = "fp32",
    class_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a sparse or dense model for use without vitprune, and prove that it computes the same.

    Args:
        model: a SparseViT, or a timm model of a supported family; left as it is.
        output: `*.onnx` for ONNX, `*.pt2` for torch.export, any other name for a timm folder of the backbone.
        precision: "fp16" halves the weights; token predictors stay in fp32.
        class_names: in output order, to be stored.
        overwrite: write over an output that exists.

    Raises:
        UsageError: fp16 and a timm folder.
        OutputError: the output exists or cannot be written.
        ExportError: a package of the extra "onnx" is missing, the model cannot be exported, or the result differs.
        CheckpointError: the model was not made by timm.create_model.
    """
    sparse = model if isinstance(model, SparseViT) else attach(model, keep=1.0)
    output = Path(output)
    kind: Format = "onnx" if output.suffix == ".onnx" else "pt2" if output.suffix == ".pt2" else "timm"
    metadata = describe(sparse, class_names=tuple(class_names) if class_names else None)
    check_output(output, kind, precision, overwrite=overwrite)
    return export(copy.deepcopy(sparse).to("cpu", torch.float32).eval(), metadata, output, kind, precision)


def check_output(output: Path, kind: Format, precision: ExportPrecision, *, overwrite: bool) -> None:
    """Make sure, before the work, that `output` may be written.

    Raises:
        UsageError: a timm folder in fp16.
        OutputError: it has the wrong suffix, its folder is not there, or it exists and may not be overwritten.
    """
    if kind == "timm" and precision != "fp32":
        raise UsageError(
            f"a timm folder is written in fp32, not in {precision}",
            "timm.create_model(...).half() casts it; --precision goes with onnx and pt2",
        )
    if kind != "timm" and output.suffix != f".{kind}":
        raise OutputError(f"the output '{output}' is not the name of a .{kind} file", f"-o model.{kind}")
    if not output.parent.is_dir():
        raise OutputError(f"there is no folder '{output.parent}' to write to", "make it first")
    if kind == "timm":
        if output.exists() and not output.is_dir():
            raise OutputError(f"the output '{output}' is a file, not a folder", "choose another --output")
        if is_ours(RunFolder(output).weights):
            raise OutputError(
                f"the output '{output}' holds a model that vitprune wrote, which the backbone would replace",
                f"-o {output / 'timm'}",
            )
        taken = output.is_dir() and any(output.iterdir())
    else:
        if output.is_dir():
            raise OutputError(f"the output '{output}' is a folder", f"-o {output / 'model'}.{kind}")
        taken = output.exists()
    if taken and not overwrite:
        raise OutputError(f"the output '{output}' exists", "choose another --output or add --overwrite")


def export(
    sparse: SparseViT,
    metadata: Metadata,
    output: Path,
    kind: Format,
    precision: ExportPrecision = "fp32",
    *,
    batches: Iterable[Tensor] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Exported:
    """As `export_model`, with everything known and the output checked.

    Args:
        sparse: what to export, in eval mode, on the CPU; without stages it is dense.
        metadata: what the file is to say of it.
        output: the file or folder.
        kind: its format.
        precision: of the weights.
        batches: images (B, C, H, W) to compare on; None for random ones.
        on_batch: called with the number of images of each batch compared.

    Raises:
        ExportError: the model cannot be exported, or the result differs; nothing is left behind.
        OutputError: the output cannot be written.
    """
    size = input_size(sparse.model)
    batches = random_batches(size) if batches is None else batches
    if kind == "timm":
        agreement = _export_folder(sparse.model, metadata, output, batches, on_batch)
        size_mib = sum((output / name).stat().st_size for name in FILES) / 2**20
        return Exported(kind, precision, output, size_mib, agreement)
    write, read = (write_onnx, read_onnx) if kind == "onnx" else (write_pt2, read_pt2)
    with replacing(output) as temporary:
        write(_deployed(sparse, precision), torch.zeros(TRACED_BATCH_SIZE, *size), metadata, temporary)
        try:
            program = read(temporary)
        except CheckpointError as error:
            raise ExportError(f"what was written cannot be opened again: {error.message}", error.hint) from error
        agreement = compare(sparse, program, batches, precision, on_batch)
    return Exported(kind, precision, output, output.stat().st_size / 2**20, agreement)


class _Cast(nn.Module):
    """A model in another precision, for images and logits in fp32: whoever feeds the file need not care."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)  # predictors stay in fp32 by themselves
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


def _deployed(sparse: SparseViT, precision: ExportPrecision) -> nn.Module:
    return sparse if precision == "fp32" else _Cast(copy.deepcopy(sparse), torch.float16).eval()


def _export_folder(
    model: nn.Module,
    metadata: Metadata,
    output: Path,
    batches: Iterable[Tensor],
    on_batch: Callable[[int], None] | None,
) -> Agreement:
    """Write a timm folder beside its place first."""
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    except OSError as error:
        raise write_error(output, error) from error
    try:
        write_timm(model, metadata, temporary)
        agreement = compare(model, read_timm(temporary), batches, "fp32", on_batch)
        output.mkdir(exist_ok=True)
        for name in FILES:  # one by one: what else is in a folder that is written over stays
            with replacing(output / name) as place:
                shutil.copyfile(temporary / name, place)
    except OSError as error:
        raise write_error(output, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return agreement
