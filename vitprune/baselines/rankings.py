"""Rankings of tokens that need no training, in the place of a TokenPredictor's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitprune.backbones import AttentionRecorder, wrap
from vitprune.model import SparseViT, Tokens
from vitprune.schedule import Pruned, Schedule


class RandomPredictor(nn.Module):
    """Keeps tokens at random, with a random stream of its own; stands in for a TokenPredictor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        # On the CPU, so that the same tokens are pruned on every device.
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """log_pi (B, N, 2) of a keep probability uniform in (0, 1)."""
        del kept
        keep = torch.rand(x.shape[:2], generator=self.generator).clamp(1e-6, 1 - 1e-6)
        return torch.stack((1 - keep, keep), dim=-1).log().to(x.device)


class NormPredictor(nn.Module):
    """Keeps the tokens with the largest L2 norm."""

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """log_pi (B, N, 2), rising with the norm."""
        del kept
        return _as_log_pi(x.float().norm(dim=-1))


class _AttentionScores(nn.Module):
    """Ranks tokens by the last attention that was recorded."""

    def __init__(self, recorder: AttentionRecorder, rows: slice) -> None:
        super().__init__()
        self.recorder, self.rows = recorder, rows

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """log_pi (B, N, 2), rising with the attention that the queries `rows` pay to a token."""
        del kept
        self.recorder.forget(but_last=1)
        return _as_log_pi(self.recorder.attention(self.rows)[:, -x.shape[1] :])


class AttentionViT(SparseViT):
    """Keeps the tokens that the class token attends to most in the block before the stage, mean over heads.

    The ranking of EViT (https://arxiv.org/abs/2202.07800), without its training. Where there is no class token, what
    all tokens together attend to.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, pruned: Pruned = "drop") -> None:
        self._recorder = AttentionRecorder()
        rows = slice(0, 1) if wrap(model).pooling == "class token" else slice(None)
        super().__init__(model, schedule, [_AttentionScores(self._recorder, rows) for _ in schedule.stages], pruned)

    def run_blocks(self, x: Tensor, first_block: int = 0, end: int | None = None) -> Tokens:
        """As a SparseViT does, with attention recorded."""
        with self._recorder:
            tokens = super().run_blocks(x, first_block, end)
        self._recorder.forget()
        return tokens


def _as_log_pi(scores: Tensor) -> Tensor:
    """Any scores (B, N) as log-probabilities (B, N, 2) in the same order."""
    return torch.stack((torch.zeros_like(scores), scores), dim=-1).log_softmax(dim=-1)
