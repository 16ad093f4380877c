"""LV-ViT, whose patch tokens answer beside the class token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitprune.backbones.lvvit_model import AUX_WEIGHT
from vitprune.backbones.standard import StandardBackbone


class LvVitBackbone(StandardBackbone):
    """LvVit: with `kept`, the best answer of a patch token is looked for among kept tokens only."""

    def embed(self, images: Tensor) -> Tensor:
        """Stem, class token, position embedding."""
        lvvit: Any = self.model
        out: Tensor = lvvit.forward_embed(images)
        return out

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Run the model's own block; honours `model.set_grad_checkpointing()`."""
        return self._run(self.blocks[index], x, attn_mask=_as(attn_mask, x))

    def check_halves(self) -> None:
        """Every block is attention and then MLP."""

    def attention_half(self, index: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The block's own first half."""
        out: Tensor = self.blocks[index].attention_half(x, _as(attn_mask, x))
        return out

    def mlp_half(self, index: int, x: Tensor) -> Tensor:
        """The block's own second half."""
        out: Tensor = self.blocks[index].mlp_half(x)
        return out

    def token_logits(self, features: Tensor) -> Tensor | None:
        """What the auxiliary head says of each patch token."""
        lvvit: Any = self.model
        return lvvit.aux_head(features) if self.num_classes else None

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """The model's own head, or with `kept` the same one over kept tokens; a maximum does not heed `sizes`."""
        lvvit: Any = self.model
        answers = None if kept is None else self.token_logits(self.token_features(x))  # (B, N, num_classes)
        logits: Tensor
        if kept is None or answers is None:
            logits = lvvit.forward_head(x)
            return logits
        gone = (kept < 0.5).unsqueeze(-1)
        best = answers.masked_fill(gone, torch.finfo(answers.dtype).min).amax(dim=1)
        # Of an image without a kept token the class token alone answers.
        logits = lvvit.head(x[:, 0]) + AUX_WEIGHT * best.masked_fill(gone.all(dim=1), 0.0)
        return logits

    def tail(self, first_block: int) -> list[nn.Module]:
        """Blocks, norm and both heads."""
        lvvit: Any = self.model
        return [*super().tail(first_block), lvvit.aux_head]


def _as(attn_mask: Tensor | None, x: Tensor) -> Tensor | None:
    # Fused attention wants the mask in the dtype of the queries.
    return None if attn_mask is None else attn_mask.to(x.dtype)
