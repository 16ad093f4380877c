"""Rankings of tokens that need no training, in the place of a TokenPredictor's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RandomPredictor(nn.Module):
    """Keeps tokens at random, with a random stream of its own; stands in for a TokenPredictor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        # On the CPU, so that the same tokens are pruned on every device.
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Scores (B, N), uniform."""
        del kept
        return torch.rand(x.shape[:2], generator=self.generator).to(x.device)


class EqualPredictor(nn.Module):
    """Finds no token more important than another, so that redundancy alone decides."""

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Zeros (B, N)."""
        del kept
        return torch.zeros(x.shape[:2], device=x.device)
