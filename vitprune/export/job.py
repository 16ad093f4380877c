"""The whole of an export: write beside the place, open again, compare with the model, then put in place."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.program import FixedBatch, require
from vitprune.checkpoint.sparse_file import written_by_vitprune
from vitprune.common.files import check_writable, replacing, write_error
from vitprune.common.formatting import first_line
from vitprune.common.progress import SILENT, Listener
from vitprune.common.run_folder import RunFolder
from vitprune.errors import ExportError, OutputError, UsageError
from vitprune.export.agreement import Agreement, batch_sizes, compare, in_batches, random_images
from vitprune.export.formats import FORMATS, Format, format_of
from vitprune.export.target import ANY, OPSET, OPSETS, ExportPrecision, Target
from vitprune.model import SparseViT, TokenFeatures
from vitprune.model.blend import with_child
from vitprune.tasks import TaskName, task_named


@dataclass(frozen=True)
class Exported:
    """The file or folder that was written, and how it agrees with the model on the same images.

    Attributes:
        format: "onnx", "openvino", "pt2", "aoti", "executorch", "litert", "coreml" or "timm".
        task: what is put out is for; of a timm folder what the backbone is for.
        precision: "fp32", "fp16" or "int8".
        output: where it is.
        size_mib: its size.
        batch: how many images it takes at once; None for any number.
        opset: of an ONNX file; else None.
        agreement: what was compared; None of a format that this machine cannot run.
    """

    format: Format
    task: TaskName
    precision: ExportPrecision
    output: Path
    size_mib: float
    batch: int | None
    opset: int | None
    agreement: Agreement | None

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


def known_target(
    kind: Format, precision: ExportPrecision | None, batch: int | None, opset: int | None, *, with_images: bool
) -> Target:
    """What a file of this format is written for; None for the usual precision, batch size (any if it can be) and opset.

    `with_images` says whether there are images to compare on and to calibrate by.

    Raises:
        UsageError: out of range, or nothing that this format knows.
        ExportError: a package of the format is missing.
    """
    its = FORMATS[kind]
    precision = precision or its.precisions[0]
    if precision not in its.precisions:
        raise _not_written(kind, precision)
    if precision == "int8" and not with_images:
        raise UsageError("--precision int8 is calibrated on images, and there is no --data", "add --data DATA")
    if batch is not None and kind == "timm":
        raise UsageError("a timm folder takes any batch size", "leave out --batch")
    if batch is not None and batch < 1:
        raise UsageError(f"--batch must be at least 1, got {batch}", "leave it out for batches of any size")
    if opset is not None and not its.of_onnx:
        raise UsageError(f"--opset is of ONNX files, and this is --format {kind}", "leave it out")
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", f"choose from {OPSETS[0]} to {OPSETS[-1]}")
    if with_images and not its.runs_here():
        raise UsageError(f"--data is for comparing, and --format {kind} runs on macOS only", "leave it out")
    require(kind)
    return Target(precision, batch or its.batch, opset or OPSET)


def _not_written(kind: Format, precision: ExportPrecision) -> UsageError:
    """A precision that a format is not written in."""
    able = [name for name, its in FORMATS.items() if precision in its.precisions]
    hint = "timm.create_model(...).half() casts it" if kind == "timm" else "leave out --format or --precision"
    written = f"a timm folder is written in fp32, not in {precision}" if kind == "timm" else None
    return UsageError(written or f"--precision {precision} goes with --format {' or '.join(able)}, not {kind}", hint)


def check_output(output: Path, kind: Format, *, overwrite: bool) -> None:
    """Make sure, before the work, that `output` may be written.

    Raises:
        OutputError: it has the wrong suffix, its folder is missing, or it exists and may not be overwritten.
    """
    ending = FORMATS[kind].ending
    if ending and (other := format_of(output)) != kind:
        meant = f"--format {other} writes it" if other else f"-o model{ending}"
        raise OutputError(f"the output '{output}' is not the name of a {ending} file", meant, exit_code=2)
    if kind == "timm" and written_by_vitprune(RunFolder(output).weights):
        raise OutputError(
            f"the output '{output}' holds a model that vitprune wrote, which the backbone would replace",
            f"-o {output / 'timm'}",
            exit_code=2,
        )
    if FORMATS[kind].folder:
        check_folder(output, overwrite=overwrite)
        return
    if output.is_dir():
        raise OutputError(f"the output '{output}' is a folder", f"-o {output / 'model'}{ending}", exit_code=2)
    taken = output.exists() or (kind == "openvino" and output.with_suffix(".bin").exists())
    _check_free(output, taken, overwrite)


def check_folder(output: Path, *, overwrite: bool) -> None:
    """Make sure that a folder `output` may be written.

    Raises:
        OutputError: it is a file or named like one, holds something and may not be overwritten, or the folder that it
            is in is missing.
    """
    named = format_of(output)
    if not output.is_dir() and (output.exists() or (named and not FORMATS[named].folder)):
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
    its, task = FORMATS[kind], task_named(metadata.task)
    sparse = with_child(sparse, "blend", None)  # a program is of one keep ratio
    model: nn.Module = sparse.model if kind == "timm" else TokenFeatures(sparse) if task.filled else sparse
    if kind == "timm" and task.filled:
        task = task_named("classification" if sparse.num_classes else "embedding")
    cast = target.precision == "fp16" and not its.halves
    deployed = _Cast(copy.deepcopy(model), torch.float16).eval() if cast else model
    sizes = batch_sizes(target.batch)
    num_random = 0 if target.quantisation else sum(sizes)
    noise = random_images(metadata.preprocessing.input_size, num_random)
    listener.begin(f"exporting {metadata.model}", None)
    with placed(output, folder=its.folder) as temporary:
        its.write(deployed, metadata, temporary, target)
        size, agreement = size_mib(temporary.parent), None
        if its.runs_here():
            program = _opened_again(its.read, temporary, target.batch)
            listener.begin("comparing with PyTorch", None if num_images is None else num_random + num_images)
            batches = in_batches(chain(noise, images), sizes)
            least = target.quantisation.min_agreement if target.quantisation else None
            agreement = compare(model, program, batches, target.precision, task, listener, least)
    opset = target.opset if its.of_onnx else None
    return Exported(kind, task.name, target.precision, output, size, target.batch, opset, agreement)


def _opened_again(read: Callable[[Path], nn.Module], path: Path, batch: int | None) -> nn.Module:
    try:
        program = read(path)
    except Exception as error:  # engines' errors have no common class
        raise ExportError(f"what was written cannot be opened again: {first_line(error)}") from error
    return FixedBatch(program, batch) if batch else program


class _Cast(nn.Module):
    """A model in another precision, for images and outputs in fp32: whoever feeds the file need not care."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)  # predictors stay in fp32 by themselves
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.model(images.to(self.dtype))
        return output.float()


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size_mib(folder: Path) -> float:
    """Of all files in it together."""
    return sum(file.stat().st_size for file in _files_in(folder)) / 2**20


@contextmanager
def placed(output: Path, *, folder: bool) -> Iterator[Path]:
    """Where to write `output`, a `folder` or a file with others beside it; put in place when the block ends well.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent) as place:
            temporary = Path(place) / output.name
            if folder:
                temporary.mkdir()
            yield temporary
            inside, outside = (temporary, output) if temporary.is_dir() else (temporary.parent, output.parent)
            for file in _files_in(inside):  # one by one: whatever else is in a folder that is written over stays
                target = outside / file.relative_to(inside)
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as free:
                    shutil.move(file, free)
    except OSError as error:
        raise write_error(output, error) from error
