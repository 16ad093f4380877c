"""A program that vitprune exported, opened: a module like any other, for evaluation and timing."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.checkpoint.metadata import METADATA_KEY, Metadata
from vitprune.checkpoint.sparse_file import rebuild
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError, ExportError, UsageError, VitpruneError
from vitprune.model import TokenFeatures

_PACKAGES: dict[str, tuple[str, tuple[str, ...], str]] = {
    # Of onnxscript torch's exporter makes use.
    "onnx": ("ONNX", ("onnx", "onnxruntime", "onnxscript"), "onnx onnxscript onnxruntime"),
    "openvino": ("OpenVINO", ("openvino",), "openvino"),
    "executorch": ("ExecuTorch", ("executorch.runtime",), "executorch"),
    "litert": ("LiteRT", ("ai_edge_litert.interpreter",), "litert-torch"),
    "coreml": ("Core ML", ("coremltools",), "coremltools"),
}
"""Of a format and the extra that is called as it: the engine, what runs its files, and what to install."""


def require(extra: str, *more: str) -> list[ModuleType]:
    """The modules of a format that others run, and `more` of what its extra installs; none of PyTorch's own formats.

    Raises:
        ExportError: one cannot be imported; names it and the extra.
    """
    engine, modules, install = _PACKAGES.get(extra, ("", (), ""))
    try:
        with quiet():
            return [importlib.import_module(module) for module in (*modules, *more)]
    except ImportError as error:
        missing = f"the package '{(error.name or modules[0]).partition('.')[0]}' (extra '{extra}')"
        raise ExportError(
            f"{engine} files need {missing}, which cannot be imported here: {error}", f"pip install {install}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what engines and converters warn, log and print, which their users cannot change."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said := io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(said):
                yield
    finally:
        logging.disable(before)


@contextmanager
def opening(engine: str, path: Path) -> Iterator[None]:
    """Say which file an engine cannot open.

    Raises:
        CheckpointError: it stops.
    """
    try:
        yield
    except VitpruneError:
        raise
    except Exception as error:  # engines' errors have no common class
        raise CheckpointError(f"{engine} cannot open '{path}': {first_line(error)}", "copy it again") from error


def foreign(path: Path, kind: str) -> CheckpointError:
    """Of a file that an engine opens, and that says nothing of itself."""
    return CheckpointError(
        f"'{path}' was not written by vitprune: it has no '{METADATA_KEY}' entry",
        f"vitprune export MODEL --format {kind} writes a file that has one",
    )


class FixedBatch(nn.Module):
    """Images (B, C, H, W) to what a program that takes `size` of them at once says of each; it runs on full batches.

    Args:
        program: images (size, C, H, W) to outputs (size, ...).
        size: at least 1.
    """

    def __init__(self, program: Callable[[Tensor], Tensor], size: int) -> None:
        super().__init__()
        self.program, self.size = program, size

    def forward(self, images: Tensor) -> Tensor:
        """As the program, for any number of images: the last batch is filled up with its last image."""
        outputs = []
        for batch in torch.split(images, self.size):
            missing = self.size - len(batch)
            filled = torch.cat((batch, batch[-1:].expand(missing, -1, -1, -1))) if missing else batch
            outputs.append(self.program(filled)[: len(batch)])
        return torch.cat(outputs)


class Program(nn.Module):
    """An exported file as a module: images (B, C, H, W) to logits or an embedding (B, num_classes), or to the features
    of all patches (B, P + N, channels), all fp32.

    It runs on the CPU, in the precision it was exported in ("fp32", "fp16" or "int8"): moving and casting it does
    nothing, and a copy is itself. The preprocessing is its `pretrained_cfg`, where timm's data helpers look for it.
    A file for batches of one size, `batch_size`, takes others too, in full batches.

    Args:
        engine: runs it: images (B, C, H, W) to what it puts out, both fp32 on the CPU.
        takes: shape of its input; a size that is open is no number.
        gives: shape of its output.
        metadata: what it says of itself.
        precision: of its weights.
        path: where it is.

    Raises:
        CheckpointError: the shapes do not fit the metadata.
    """

    def __init__(
        self,
        engine: Callable[[Tensor], Tensor],
        takes: Sequence[Any],
        gives: Sequence[Any],
        metadata: Metadata,
        precision: str,
        path: Path,
    ) -> None:
        super().__init__()
        of_image = _of_image(takes, gives, metadata, path)
        self.engine, self.metadata, self.precision, self.path = engine, metadata, precision, path
        self.batch_size: int | None = takes[0] if isinstance(takes[0], int) else None
        self.num_classes = 0 if len(of_image) > 1 else of_image[0]
        self.num_features = of_image[-1]
        self.num_prefix_tokens = of_image[0] - metadata.num_patches if len(of_image) > 1 else 0
        self.pretrained_cfg = metadata.preprocessing.model_dump()
        self._run = self._once if self.batch_size is None else FixedBatch(self._once, self.batch_size)

    def forward(self, images: Tensor) -> Tensor:
        """What the file puts out, on the device of the images.

        Raises:
            UsageError: the images are not of the size that the file takes.
            VitpruneError: the runtime stopped, as a rule because memory ran out.
        """
        expected = self.metadata.preprocessing.input_size
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise UsageError(f"'{self.path}' takes images of (batch, {_text(expected)}), got {tuple(images.shape)}")
        return self._run(images.to("cpu", torch.float32)).to(images.device)

    def _once(self, images: Tensor) -> Tensor:
        try:
            return self.engine(images)
        except Exception as error:  # engines' errors have no common class
            raise VitpruneError(
                f"'{self.path}' stopped at a batch of {len(images)}: {first_line(error)}", "try a lower --batch-size"
            ) from error

    def forward_features(self, images: Tensor) -> Tensor:
        """Of a file that puts out the features of all patches: those, (B, P + N, channels)."""
        return self(images)  # type: ignore[no-any-return]

    def structure(self) -> nn.Module:
        """A model that computes what the file does, without its weights: what it costs on paper."""
        sparse = rebuild(self.metadata, "meta")
        return TokenFeatures(sparse) if self.metadata.task == "dense" else sparse

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self


def _of_image(takes: Sequence[Any], gives: Sequence[Any], metadata: Metadata, path: Path) -> list[int]:
    """What a program gives of an image, (num_classes) or (tokens, channels), once it fits what its metadata says.

    Raises:
        CheckpointError: it does not fit.
    """
    expected, of_image = metadata.preprocessing.input_size, list(gives[1:])
    dense = metadata.task == "dense"
    fits = len(of_image) == (2 if dense else 1) and all(isinstance(size, int) for size in of_image)
    fits = fits and (not dense or of_image[0] >= metadata.num_patches)
    if len(takes) != 4 or tuple(takes[1:]) != expected or not fits:
        form = "tokens, channels" if dense else "classes" if metadata.task == "classification" else "outputs"
        raise CheckpointError(
            f"'{path}' does not fit its own metadata: it turns ({_text(takes)}) into ({_text(gives)}), "
            f"expected (batch, {_text(expected)}) and (batch, {form})",
            "export the model again",
        )
    if not dense and metadata.class_names is not None and len(metadata.class_names) != of_image[0]:
        raise CheckpointError(f"'{path}' has {gives[1]} classes and its metadata names {len(metadata.class_names)}")
    return of_image


def _text(shape: Any) -> str:
    return ", ".join(map(str, shape))
