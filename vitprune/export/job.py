"""The whole of an export: write beside the place, open again, compare with the model, then put in place."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitprune.checkpoint.fixed_batch import FixedBatch
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import written_by_vitprune
from vitprune.common.files import check_writable, replacing, write_error
from vitprune.common.formatting import first_line
from vitprune.common.progress import SILENT, Listener
from vitprune.common.run_folder import RunFolder
from vitprune.errors import ExportError, OutputError, UsageError
from vitprune.export.agreement import Agreement, batch_sizes, compare, in_batches, random_images
from vitprune.export.formats import ANY, ENDINGS, FORMATS, OPSET, OPSETS, TIMM_FILES, Format, Target
from vitprune.model import SparseViT, TokenFeatures
from vitprune.model.blend import with_child
from vitprune.tasks import TaskName, task_named

_OF_ONNX: tuple[Format, ...] = ("onnx", "openvino")
ExportPrecision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Exported:
    """The file or folder that was written, and how it agrees with the model on the same images.

    Attributes:
        format: "onnx", "openvino", "pt2" or "timm".
        task: what is put out is for; of a timm folder what the backbone is for.
        precision: "fp32", "fp16" or "int8".
        output: where it is.
        size_mib: its size.
        batch: how many images it takes at once; None for any number.
        opset: of an ONNX file; else None.
        agreement: what was compared.
    """

    format: Format
    task: TaskName
    precision: ExportPrecision
    output: Path
    size_mib: float
    batch: int | None
    opset: int | None
    agreement: Agreement

    def summary(self) -> dict[str, Any]:
        """Figures for JSON."""
        return asdict(self) | {"output": str(self.output)}


def with_features(metadata: Metadata, kind: Format) -> Metadata:
    """What a file says that puts out the features of all patches: its task is "dense".

    Raises:
        UsageError: of a timm folder.
    """
    if kind == "timm":
        raise UsageError("a timm folder holds weights, not what is put out of them", "leave out --features")
    return metadata.model_copy(update={"task": "dense", "class_names": None, "accuracy": None})


def known_target(kind: Format, batch: int | None, opset: int | None) -> Target:
    """What a program of this format is written for; None for any batch size and the usual opset.

    Raises:
        UsageError: out of range, or nothing that this format knows.
    """
    if batch is not None and kind == "timm":
        raise UsageError("a timm folder takes any batch size", "leave out --batch")
    if batch is not None and batch < 1:
        raise UsageError(f"--batch must be at least 1, got {batch}", "leave it out for batches of any size")
    if opset is not None and kind not in _OF_ONNX:
        raise UsageError(f"--opset is of ONNX files, and this is --format {kind}", "leave it out")
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", f"choose from {OPSETS[0]} to {OPSETS[-1]}")
    return Target(batch, opset or OPSET)


def check_output(output: Path, kind: Format, precision: ExportPrecision, *, calibrated: bool, overwrite: bool) -> None:
    """Make sure, before the work, that `output` may be written; `calibrated` says whether there are images for INT8.

    Raises:
        UsageError: a timm folder in less than fp32, or INT8 without images or as torch.export's program.
        OutputError: it has the wrong suffix, its folder is missing, or it exists and may not be overwritten.
    """
    if kind == "pt2" and precision == "int8":
        raise UsageError("--precision int8 goes with --format onnx, not pt2", "leave out --format")
    if precision == "int8" and not calibrated:
        raise UsageError("--precision int8 is calibrated on images, and there is no --data", "add --data DATA")
    if kind == "timm" and precision != "fp32":
        raise UsageError(
            f"a timm folder is written in fp32, not in {precision}",
            "timm.create_model(...).half() casts it; --precision goes with onnx and pt2",
        )
    ending = ENDINGS.get(kind)
    if ending is not None and output.suffix != ending:
        other = next((name for name, its in ENDINGS.items() if its == output.suffix), None)
        meant = f"--format {other} writes it" if other else f"-o model{ending}"
        raise OutputError(f"the output '{output}' is not the name of a {ending} file", meant, exit_code=2)
    if kind == "timm":
        if written_by_vitprune(RunFolder(output).weights):
            raise OutputError(
                f"the output '{output}' holds a model that vitprune wrote, which the backbone would replace",
                f"-o {output / 'timm'}",
                exit_code=2,
            )
        check_folder(output, overwrite=overwrite)
        return
    if output.is_dir():
        raise OutputError(f"the output '{output}' is a folder", f"-o {output / 'model'}{ending}", exit_code=2)
    _check_free(output, any(file.exists() for file in _files(output, kind)), overwrite)


def check_folder(output: Path, *, overwrite: bool) -> None:
    """Make sure that a folder `output` may be written.

    Raises:
        OutputError: it is a file, holds something and may not be overwritten, or the folder that it is in is missing.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"the output '{output}' is a file, not a folder", "choose another --output", exit_code=2)
    _check_free(output, output.is_dir() and any(output.iterdir()), overwrite)


def _check_free(output: Path, taken: bool, overwrite: bool) -> None:
    if not output.parent.is_dir():
        raise OutputError(f"there is no folder '{output.parent}' to write to", "make it first", exit_code=2)
    if taken and not overwrite:
        raise OutputError(f"the output '{output}' exists", "choose another --output or add --overwrite", exit_code=2)
    check_writable(output)


def export(
    sparse: SparseViT,
    metadata: Metadata,
    output: Path,
    kind: Format,
    precision: ExportPrecision = "fp32",
    target: Target = ANY,
    *,
    images: Iterable[Tensor] = (),
    num_images: int | None = 0,
    listener: Listener = SILENT,
) -> Exported:
    """As `vitprune.export_model`, with everything known and the output checked.

    The model is in eval mode, on the CPU; without stages it is dense. It is compared on random images and on `images`,
    (C, H, W) each; `num_images` is None where it is not known how many these are. In INT8, which
    `target` has the images for, only on these: noise is nothing that 8 bits were fitted to.

    Raises:
        ExportError: the model cannot be exported, or the result differs; nothing is kept.
        OutputError: the output cannot be written.
    """
    task = task_named(metadata.task)
    sparse = with_child(sparse, "blend", None)  # a program is of one keep ratio
    model: nn.Module = sparse.model if kind == "timm" else TokenFeatures(sparse) if task.filled else sparse
    if kind == "timm" and task.filled:
        task = task_named("classification" if sparse.num_classes else "embedding")
    deployed = _Cast(copy.deepcopy(model), torch.float16).eval() if precision == "fp16" else model
    sizes = batch_sizes(target.batch)
    quantisation = target.quantisation
    num_random = 0 if quantisation else sum(sizes)
    noise = random_images(metadata.preprocessing.input_size, num_random)
    listener.begin(f"exporting {metadata.model}", None)
    files = _files(output, kind)
    with placed(output, files) as temporary:
        FORMATS[kind].write(deployed, metadata, temporary, target)
        try:
            program = FORMATS[kind].read(temporary)
        except Exception as error:  # timm's, torch's and onnxruntime's errors have no common class
            raise ExportError(f"what was written cannot be opened again: {first_line(error)}") from error
        listener.begin("comparing with PyTorch", None if num_images is None else num_random + num_images)
        if target.batch and kind == "pt2":
            program = FixedBatch(program, target.batch)
        batches, least = in_batches(chain(noise, images), sizes), quantisation.min_agreement if quantisation else None
        agreement = compare(model, program, batches, precision, task, listener, least)
    opset = target.opset if kind in _OF_ONNX else None
    return Exported(kind, task.name, precision, output, size_mib(files), target.batch, opset, agreement)


class _Cast(nn.Module):
    """A model in another precision, for images and outputs in fp32: whoever feeds the file need not care."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)  # predictors stay in fp32 by themselves
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.model(images.to(self.dtype))
        return output.float()


def _files(output: Path, kind: Format) -> list[Path]:
    """What a format writes, `output` first."""
    if kind == "timm":
        return [output / name for name in TIMM_FILES]
    return [output, output.with_suffix(".bin")] if kind == "openvino" else [output]


def size_mib(files: Iterable[Path]) -> float:
    """Of files together."""
    return sum(file.stat().st_size for file in files) / 2**20


@contextmanager
def placed(output: Path, files: Sequence[Path]) -> Iterator[Path]:
    """Where to write `output`, which is put in place when the block ends well: one file, or one with others beside it,
    or a folder of files.

    Raises:
        OutputError: it cannot be written.
    """
    if len(files) == 1:
        with replacing(output) as temporary:
            yield temporary
        return
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent) as temporary:
            yield Path(temporary) / output.name if output in files else Path(temporary)
            files[0].parent.mkdir(exist_ok=True)
            for file in files:  # one by one: whatever else is in a folder that is written over stays
                with replacing(file) as place:
                    shutil.copyfile(Path(temporary) / file.name, place)
    except OSError as error:
        raise write_error(output, error) from error
