"""The floor: what taking the tokens away could bring at best."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitprune.model import SparseViT
from vitprune.schedule import Stage


class FloorViT(SparseViT):
    """The backbone with the token counts of a sparse model, its tokens taken for free. To be timed, not to be used.

    At each stage the first K patch tokens are sliced off: no predictor, no ranking, no gather, no fold, no sizes in the
    attention. The answers are worth nothing; the time is what no way of choosing tokens can beat at these counts.
    Positions that do not travel in the tokens are still gathered, as every such method must.

    Args:
        sparse: the model whose counts and backbone to take; not changed, weights are shared.
    """

    def __init__(self, sparse: SparseViT) -> None:
        super().__init__(sparse.model, sparse.schedule, [nn.Identity() for _ in sparse.schedule.stages])

    def _leave(
        self, x: Tensor, sizes: Tensor | None, stage: Stage, predictor: nn.Module
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        first = torch.arange(stage.num_tokens, device=x.device).expand(x.shape[0], -1)
        return x[:, : self.backbone.num_prefix_tokens + stage.num_tokens], None, first, x
