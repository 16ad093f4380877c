"""LV-ViT, whose patch tokens answer beside the class token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitprune.backbones.base import Backbone, in_dtype_of
from vitprune.backbones.lvvit_model import AUX_WEIGHT


class LvVitBackbone(Backbone):
    """LvVit: with `kept`, the best answer of a patch token is looked for among kept tokens only."""

    def embed(self, images: Tensor) -> Tensor:
        """Stem, class token, position embedding."""
        return self.model.forward_embed(images)

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Run the model's own block; honours `model.set_grad_checkpointing()`."""
        return self._run(self.blocks[index], x, attn_mask=in_dtype_of(x, attn_mask))

    def check_halves(self) -> None:
        """Every block is attention and then MLP."""

    def attention_half(self, index: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The block's own first half."""
        return self.blocks[index].attention_half(x, in_dtype_of(x, attn_mask))

    def mlp_half(self, index: int, x: Tensor) -> Tensor:
        """The block's own second half."""
        return self.blocks[index].mlp_half(x)

    def token_logits(self, features: Tensor) -> Tensor | None:
        """What the auxiliary head says of each patch token."""
        return self.model.aux_head(features) if self.num_classes else None

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """The model's own head, or with `kept` the same one over kept tokens; a maximum does not heed `sizes`."""
        answers = None if kept is None else self.token_logits(self.token_features(x))  # (B, N, num_classes)
        if kept is None or answers is None:
            return self.model.forward_head(x)
        gone = (kept < 0.5).unsqueeze(-1)
        best = answers.masked_fill(gone, torch.finfo(answers.dtype).min).amax(dim=1)
        # Of an image without a kept token the class token alone answers.
        return self.model.head(x[:, 0]) + AUX_WEIGHT * best.masked_fill(gone.all(dim=1), 0.0)

    def tail(self, first_block: int) -> list[nn.Module]:
        """Blocks, norm and both heads."""
        return [*super().tail(first_block), self.model.aux_head]
