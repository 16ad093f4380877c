"""Image classifiers that timm makes of the vision encoders of language models: Qwen3, DeepSeek and Gemma 4.

The timm model holds the blocks in `encoder`; classification averages patch tokens. Where the encoder ends in the
language model's projector or pooler, which join neighbouring tokens, all of them are needed: such models are refused.
"""

from __future__ import annotations

from typing import Any

from timm.models.deepseek_vit import DeepseekVitBlock
from torch import Tensor

from vitprune.backbones.pooling import weighted_pool
from vitprune.backbones.rotary import RotaryBackbone


class EncoderBackbone(RotaryBackbone):
    """An encoder with rotary positions, then mean, norm and classifier."""

    def norm(self, x: Tensor) -> Tensor:
        """The encoder's norm, in those that have one."""
        norm = getattr(self.encoder, "norm", None)
        return x if norm is None else norm(x)

    def token_features(self, x: Tensor) -> Tensor:
        """Patch tokens through the classifier's norm, so that their scale is bounded."""
        return self.model.norm(x)

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Mean, norm and classifier."""
        return self.model.head(self.pool(x, kept, sizes))

    def pool(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Mean and norm."""
        uneven = kept is not None or sizes is not None
        pooled = weighted_pool(self.model, x, 0, kept, sizes, include_prefix=False) if uneven else x.mean(dim=1)
        return self.model.head_drop(self.model.norm(pooled))


class AxialBackbone(EncoderBackbone):
    """timm.models.qwen3_vit.Qwen3VitClassifier and timm.models.deepseek_vit.DeepseekVitClassifier."""

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding and, in Qwen3, the absolute position embedding."""
        self._check_size(images)
        return self.encoder._pos_embed(self.encoder.patch_embed(images))[0]

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Timm's own block; DeepSeek's takes no mask, so with one its parts are run from here."""
        block = self.blocks[index]
        if attn_mask is None or not isinstance(block, DeepseekVitBlock):
            return super().block(index, x, attn_mask, positions)
        table = self.positions_of() if positions is None else positions
        return self._run(_masked_deepseek_block, x, attn_mask, block=block, rope=table)


def _masked_deepseek_block(x: Tensor, block: Any, rope: Tensor, attn_mask: Tensor) -> Tensor:
    x = x + block.drop_path1(block.attn(block.norm1(x), rope=rope, attn_mask=attn_mask))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


class GemmaBackbone(EncoderBackbone):
    """timm.models.gemma4_vit.Gemma4VitClassifier on ordinary batches of images of one size."""

    floors = False

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.encoder.patch_size
        return height // rows, width // columns

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding and absolute position embedding."""
        self._check_size(images)
        return self.encoder.patch_embed(images)[0]

    def positions_of(self, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (1, N, D) each; of given tokens (B, K, D)."""
        weight = self.encoder.patch_embed.input_proj.weight
        coordinates, _ = self.encoder.patch_embed._default_patch_coord(1, *self.grid_size, weight.device)
        positions = coordinates.flip(-1)
        if present is not None:
            positions = positions.expand(present.shape[0], -1, -1)
            positions = positions.gather(1, present.unsqueeze(-1).expand(-1, -1, 2))
        return self.encoder.rotary_emb(weight, positions)

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Run timm's own block."""
        cosines, sines = self.positions_of() if positions is None else positions
        rope = {"rope_cos": cosines.to(x.dtype), "rope_sin": sines.to(x.dtype)}
        return self._run(self.blocks[index], x, attn_mask, **rope)
