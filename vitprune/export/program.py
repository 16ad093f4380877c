"""An exported file, opened: a module like any other, so that evaluation and timing need not care."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import rebuild
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError, UsageError, VitpruneError

SUFFIXES = (".onnx", ".pt2")
"""What files of programs are called."""

_NOISY = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


class Program(nn.Module):
    """An exported file as a module: images (B, C, H, W) to logits (B, num_classes), both fp32.

    It runs on the CPU, in the precision it was exported in: moving and casting it does nothing, and a copy is itself.

    Args:
        run: computes logits of fp32 images on the CPU.
        metadata: what the file says of itself.
        num_classes: width of the classifier.
        precision: "fp32", "fp16" or "int8".
        path: the file, for errors.

    Attributes:
        pretrained_cfg: the preprocessing, under the name by which timm's data helpers ask for it.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], metadata: Metadata, num_classes: int, precision: str, path: Path
    ) -> None:
        super().__init__()
        self.run = (run,)  # in a tuple, or a module of torch.export would be registered, which knows no eval()
        self.metadata = metadata
        self.num_classes = num_classes
        self.precision = precision
        self.path = path
        self.pretrained_cfg = metadata.preprocessing.model_dump()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, on the device of the images.

        Raises:
            UsageError: the images are not of the size that the file takes.
            VitpruneError: the runtime stopped, for want of memory as a rule.
        """
        expected = self.metadata.preprocessing.input_size
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise UsageError(f"'{self.path}' takes images of (batch, {_text(expected)}), got {tuple(images.shape)}")
        try:
            logits = self.run[0](images.to("cpu", torch.float32))
        except Exception as error:  # onnxruntime's errors have no common class
            raise VitpruneError(
                f"'{self.path}' stopped at a batch of {len(images)}: {first_line(error)}", "try a lower --batch-size"
            ) from error
        return logits.to(images.device)

    def structure(self) -> nn.Module:
        """The model that the file was made from, without its weights: what it costs on paper."""
        return rebuild(self.metadata, "meta")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self


def check_shapes(path: Path, metadata: Metadata, takes: list[Any], gives: list[Any]) -> int:
    """The number of classes, once what a program computes fits what its metadata says.

    Args:
        path: the file, for the error.
        metadata: what it says.
        takes: shape of the images; what is no whole number is dynamic.
        gives: shape of the logits, likewise.

    Raises:
        CheckpointError: it does not fit, or the batch size is fixed.
    """
    expected = metadata.preprocessing.input_size
    if len(takes) != 4 or tuple(takes[1:]) != expected or len(gives) != 2 or not isinstance(gives[1], int):
        raise CheckpointError(
            f"'{path}' does not fit its own metadata: it turns ({_text(takes)}) into ({_text(gives)}), "
            f"expected (batch, {_text(expected)}) and (batch, classes)",
            "export the model again",
        )
    if isinstance(takes[0], int):
        raise CheckpointError(
            f"'{path}' takes batches of {takes[0]} images only", "export it with a dynamic batch size"
        )
    names = metadata.class_names
    if names is not None and len(names) != gives[1]:
        raise CheckpointError(f"'{path}' has {gives[1]} classes and its metadata names {len(names)}")
    return gives[1]


def runs_on(spec: str, device: str, precision: str) -> str:
    """The device that MODEL runs on: the one asked for, or the CPU for an exported file.

    Raises:
        UsageError: an exported file is asked to run elsewhere, or in another precision than it has.
    """
    if not is_program(spec):
        return device
    for option, value, allowed in (("--device", device, ("auto", "cpu")), ("--precision", precision, ("auto",))):
        if value not in allowed:
            raise UsageError(
                f"{option} {value} does not go with '{spec}': exported files run on the CPU, in their own precision",
                f"leave out {option}, or name the model.safetensors that it was made from",
            )
    return "cpu"


def is_program(spec: str) -> bool:
    """Whether MODEL names an exported file."""
    return spec.endswith(SUFFIXES) and not Path(spec).is_dir()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what torch's exporters warn and log, which their users cannot change."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _text(shape: Any) -> str:
    return ", ".join(map(str, shape))
