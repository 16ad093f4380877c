"""What timm adapts while it loads weights into a model of other sizes: it logs that, and nobody listens."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from vitprune.errors import CheckpointError

_SIZE = r"\D*(\d+), (\d+)\D*"
_SAID = (
    (
        rf"Resized position embedding: {_SIZE}to {_SIZE}",
        "position embeddings are resampled from {0}x{1} to {2}x{3} patches",
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

    Raises:
        CheckpointError: timm left a part of the model without weights, which are called `what`.
    """
    logger, collector = logging.getLogger("timm"), _Collector()
    before, propagates = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    said: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of how timm resamples
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


def resampled(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """A line for each of what timm resamples without a word: the patch embedding, and biases of relative positions.

    The model's weights come from `state`, or from other tensors of these shapes.
    """
    for name, tensor in model.state_dict().items():
        before, after = (tuple(each.shape) for each in (state.get(name, tensor), tensor))
        if len(before) == len(after) == 4 and before[2:] != after[2:]:
            pixels = (f"{height}x{width}" for height, width in (before[2:], after[2:]))
            return ["the patch embedding is resampled from {} to {} pixels".format(*pixels)]
        if name.endswith("relative_position_bias_table") and before != after:
            return [f"relative position biases are resampled from {before[0]} to {after[0]} distances"]
    return []
