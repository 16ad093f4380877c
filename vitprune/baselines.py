"""Rankings of tokens that need no training, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RandomPredictor(nn.Module):
    """Keeps tokens at random, with a random stream of its own; stands in for a TokenPredictor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        # On the CPU, so that the same tokens go whatever device the model is on.
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """log_pi (B, N, 2) of a keep probability uniform in (0, 1)."""
        del kept
        keep = torch.rand(x.shape[:2], generator=self.generator).clamp(1e-6, 1 - 1e-6)
        return torch.stack((1 - keep, keep), dim=-1).log().to(x.device)
