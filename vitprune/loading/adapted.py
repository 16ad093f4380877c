"""What timm adapts while it loads weights into a model of other sizes: it logs that, and nobody listens."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vitprune.backbones import input_size
from vitprune.errors import CheckpointError

_SIZE = r"\D*(\d+), (\d+)\D*"
_SAID = (
    (
        rf"Resized position embedding: {_SIZE}to {_SIZE}",
        "position embeddings are resampled from {0}x{1} to {2}x{3} patches",
    ),
    (
        rf"Resize patch embedding .*?\[\d+, \d+, (\d+), (\d+)\]\) to {_SIZE}",
        "the patch embedding is resampled from {0}x{1} to {2}x{3} pixels",
    ),
    (
        r"Converted input conv .* from (\d+) to (\d+) channel",
        "the patch embedding is converted from {0} to {1} channels",
    ),
)
_RANDOM = (
    (r"Missing keys \((.*?)\) discovered", "they lack {0}"),
    (r"(Unable to convert pretrained .*? weights)", "{0}"),
    (r"(Position embedding size mismatch: .*?)\. Using default", "{0}"),
)
"""Where timm would go on with fresh weights."""
_HARMLESS = "weights already match the model"
"""Of a file whose channels we have read from it."""


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.getMessage()))


@contextmanager
def adaptations(what: str) -> Iterator[list[str]]:
    """A list that has, at the end of the block, a line for each thing that timm adapted in it.

    Args:
        what: to call the weights.

    Raises:
        CheckpointError: timm left a part of the model without weights.
    """
    logger, collector = logging.getLogger("timm"), _Collector()
    before, propagates = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    said: list[str] = []
    try:
        yield said
    finally:
        logger.removeHandler(collector)
        logger.setLevel(before)
        logger.propagate = propagates
    for level, message in collector.records:
        for pattern, sentence in _RANDOM:
            if found := re.search(pattern, message):
                raise CheckpointError(f"{what} do not fit the model: {sentence.format(*found.groups())}")
        lines = [
            sentence.format(*found.groups()) for pattern, sentence in _SAID if (found := re.search(pattern, message))
        ]
        if not lines and level >= logging.WARNING and _HARMLESS not in message:
            lines = [f"timm says: {message}"]
        said += [line for line in lines if line not in said]


def resampled(model: Any, state: Mapping[str, Tensor] | None = None) -> list[str]:
    """A line of position biases, which timm resamples without a word.

    Args:
        model: with its weights.
        state: the tensors of the file they come from; None of timm's own weights.
    """
    for name, tensor in model.state_dict().items():
        if not name.endswith("relative_position_bias_table"):
            continue
        before, after = (
            "x".join(map(str, size[1:])) for size in (model.pretrained_cfg["input_size"], input_size(model))
        )
        if state is None and before != after:
            return [f"relative position biases are resampled for images of {after} instead of {before}"]
        if state is not None and name in state and state[name].shape != tensor.shape:
            return [f"relative position biases are resampled from {len(state[name])} to {len(tensor)} distances"]
    return []
