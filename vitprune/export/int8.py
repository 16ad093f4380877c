"""INT8 by onnxruntime's static quantisation, for onnxruntime, TensorRT and OpenVINO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

    The backbone's linear layers are computed in 8 bits, weights with a scale per channel. The token predictors stay in
    fp32: they are three percent of the work and say which tokens the rest sees. So do the products of attention and of
    similarity and the patch embedding, which gain no time, and what multiplies no matrices (norms, softmax, GELU).

    Attributes:
        images: to calibrate by, (C, H, W) each, as the model takes them; others than it is compared on.
        min_agreement: share of decisions that must stay the same, in percent.
    """

    images: Iterable[Tensor]
    min_agreement: float = MIN_AGREEMENT_PCT

    def batches(self, size: int | None) -> list[dict[str, Any]]:
        """Its images in batches, under the name of a program's input.

        Of a program for `size` images at once a last batch that is short is left out.

        Raises:
            ExportError: there are too few images.
        """
        count, remaining, dealt = size or _BATCH, iter(self.images), list[dict[str, Any]]()
        while batch := list(islice(remaining, count)):
            if size is None or len(batch) == size:
                dealt.append({"images": torch.stack(batch).numpy()})
        if not dealt:
            hint = "give more images, or a lower --batch"
            raise ExportError(f"there are no {count} images to calibrate 8 bits by", hint)
        return dealt


def quantise_onnx(path: Path, batches: list[dict[str, Any]]) -> None:
    """Make INT8 of an fp32 ONNX file, in place; its metadata stays."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Calibration(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.remaining = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.remaining, None)

    model = onnx.load(path)
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


def _linear_layers(graph: Any) -> Iterator[str]:
    """Names of the nodes that are linear layers of the backbone."""
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and "predictors." not in node.name:
            yield node.name
