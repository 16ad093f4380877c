"""torch.compile in training: block by block, which takes seconds to compile where the whole pass takes minutes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vitprune.common.formatting import first_line
from vitprune.errors import TrainingError
from vitprune.model import SparseViT

_VERSIONS = 64
"""Of a block's code: with and without mask, gradient and stochastic depth, for each number of tokens."""


@contextmanager
def compiled_blocks(*models: SparseViT) -> Iterator[None]:
    """In the block, the transformer blocks of the models run compiled, in eager's numbers but for rounding.

    All blocks of a kind share their compiled code. What vitprune computes between them (predictors, selection, losses)
    is not compiled, nor are blocks that an adapter takes apart.

    Args:
        *models: changed in place while the block lasts.

    Raises:
        TrainingError: this machine cannot compile.
    """
    blocks: list[Any] = [block for model in models for block in getattr(model.backbone, "blocks", ())]
    device = next(models[0].parameters()).device
    _check(device)
    for block in blocks:
        block.compile()
    limits = {"recompile_limit": _VERSIONS, "accumulated_recompile_limit": _VERSIONS}
    try:
        with torch._dynamo.config.patch(limits), warnings.catch_warnings():
            # dynamo asks every tensor for its gradient, and torch warns of those that keep none
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # back to eager: nn.Module.compile has no opposite
        torch.compiler.reset()


def _check(device: torch.device) -> None:
    """Compile next to nothing, so that a missing compiler is reported at once and by name."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of the C++ or Triton compiler, each with classes of its own
        raise TrainingError(
            f"--compile does not work on {device}: {first_line(error)}",
            "it needs a C++ compiler (and Triton on a GPU); leave it out",
        ) from error
