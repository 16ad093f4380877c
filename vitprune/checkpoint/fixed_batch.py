"""A program for batches of one size, given others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


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
