"""INT8 by onnxruntime's static quantisation, for onnxruntime and TensorRT."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitprune.errors import ExportError

_BATCH = 16
NUM_CALIBRATED = 128
"""Images that 8 bits are fitted to by default."""
MIN_AGREEMENT_PCT = 90.0
"""Decisions that must stay the same by default."""


@dataclass(frozen=True)
class Quantisation:
    """What 8 bits are fitted to, and what they must keep.

    Attributes:
        images: to calibrate by, (C, H, W) each, as the model takes them; others than it is compared on.
        min_agreement: share of decisions that must stay the same, in percent.
    """

    images: Iterable[Tensor]
    min_agreement: float = MIN_AGREEMENT_PCT


def quantise(path: Path, images: Iterable[Tensor], batch: int | None) -> None:
    """Make INT8 of an fp32 ONNX file, in place; its metadata stays.

    The backbone's linear layers are computed in 8 bits, weights with a scale per channel. The token predictors stay in
    fp32: they are three percent of the work and say which tokens the rest sees. So do the products of attention and of
    similarity and the patch embedding, which gain no time, and what multiplies no matrices (norms, softmax, GELU).

    Args:
        path: the file.
        images: to calibrate by, (C, H, W) each.
        batch: how many the file takes at once; None for any number.

    Raises:
        ExportError: there are too few images.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    size, model = batch or _BATCH, onnx.load(path)
    dealt = _batches(images, size, whole=batch is not None)
    first = next(dealt, None)
    if first is None:
        raise ExportError(f"there are no {size} images to calibrate 8 bits by", "give more images, or a lower --batch")

    class Calibration(CalibrationDataReader):  # type: ignore[misc]
        """Batches under the name of the file's input."""

        def __init__(self) -> None:
            self.next: Tensor | None = first

        def get_next(self) -> dict[str, Any] | None:
            now, self.next = self.next, next(dealt, None)
            return None if now is None else {"images": now.numpy()}

    with warnings.catch_warnings(), _silent():
        warnings.simplefilter("ignore")
        quantize_static(
            model,
            path,
            Calibration(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=list(_linear_layers(model.graph)),
            # An average of the batches' ranges: one image with an outlier must not make all steps coarse.
            extra_options={"CalibMovingAverage": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Hide advice that onnxruntime logs on the root logger: there is nothing to pre-process in this graph."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _linear_layers(graph: Any) -> Iterator[str]:
    """Names of the nodes that are linear layers of the backbone."""
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and "predictors." not in node.name:
            yield node.name


def _batches(images: Iterable[Tensor], size: int, *, whole: bool) -> Iterator[Tensor]:
    """Images dealt out; of `whole` batches a last one that is short is left out."""
    remaining = iter(images)
    while batch := list(islice(remaining, size)):
        if len(batch) == size or not whole:
            yield torch.stack(batch)
