"""Image classifiers that timm makes of the vision encoders of language models: Qwen3, DeepSeek and Gemma 4.

The timm model holds the blocks in `encoder`; classification averages patch tokens. Where the encoder ends in the
language model's projector or pooler, which join neighbouring tokens, all of them are needed: such models are refused.
"""

from __future__ import annotations

from typing import Any, Literal

from timm.layers import apply_keep_indices_nlc
from timm.models.deepseek_vit import DeepseekVitBlock
from torch import Tensor, nn

from vitprune.backbones.base import Backbone, in_dtype_of, input_size
from vitprune.backbones.pooling import weighted_pool


class EncoderBackbone(Backbone):
    """An encoder with rotary positions, then mean, norm and classifier."""

    @property
    def encoder(self) -> Any:
        """The part that holds the blocks."""
        return self.model.encoder

    @property
    def blocks(self) -> Any:
        """The encoder's blocks."""
        return self.encoder.blocks

    @property
    def pooling(self) -> Literal["class token", "patches", "attention pool"]:
        """The classifier averages patches."""
        return "patches"

    def _grid(self) -> tuple[int, int]:
        _, height, width = input_size(self.model)
        return self._grid_of(height, width)

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        return self.encoder.patch_embed.dynamic_feat_size((height, width))

    def norm(self, x: Tensor) -> Tensor:
        """The encoder's norm, in those that have one."""
        norm = getattr(self.encoder, "norm", None)
        return x if norm is None else norm(x)

    def token_features(self, x: Tensor) -> Tensor:
        """Patch tokens through the classifier's norm, so that their scale is bounded."""
        return self.model.norm(x)

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Mean, norm and classifier."""
        uneven = kept is not None or sizes is not None
        pooled = weighted_pool(self.model, x, 0, kept, sizes, include_prefix=False) if uneven else x.mean(dim=1)
        return self.model.head(self.model.head_drop(self.model.norm(pooled)))

    def tail(self, first_block: int) -> list[nn.Module]:
        """Blocks, norms and classifier."""
        norm = getattr(self.encoder, "norm", None)
        return [*self.blocks[first_block:], *([] if norm is None else [norm]), self.model.norm, self.model.head]


class AxialBackbone(EncoderBackbone):
    """timm.models.qwen3_vit.Qwen3VitClassifier and timm.models.deepseek_vit.DeepseekVitClassifier."""

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding and, in Qwen3, the absolute position embedding."""
        self._check_grid(self._grid_of(images.shape[-2], images.shape[-1]))
        return self.encoder._pos_embed(self.encoder.patch_embed(images))[0]

    def positions_of(self, present: Tensor | None = None) -> Tensor:
        """Sines and cosines, (N, D); of given tokens (B, 1, K, D)."""
        table: Tensor = self.encoder.rope.get_embed(shape=list(self.grid_size))
        return table if present is None else apply_keep_indices_nlc(present, table, present).unsqueeze(1)

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Timm's own block; DeepSeek's takes no mask, so with one its parts are run from here."""
        block, table = self.blocks[index], self.positions_of() if positions is None else positions
        if attn_mask is None:
            return self._run(block, x, rope=table)
        mask = attn_mask.to(x.dtype)
        if isinstance(block, DeepseekVitBlock):
            return self._run(_masked_deepseek_block, x, block=block, rope=table, mask=mask)
        return self._run(block, x, rope=table, attn_mask=mask)


def _masked_deepseek_block(x: Tensor, block: Any, rope: Tensor, mask: Tensor) -> Tensor:
    x = x + block.drop_path1(block.attn(block.norm1(x), rope=rope, attn_mask=mask))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


class GemmaBackbone(EncoderBackbone):
    """timm.models.gemma4_vit.Gemma4VitClassifier on ordinary batches of images of one size."""

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.encoder.patch_size
        return height // rows, width // columns

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding and absolute position embedding."""
        self._check_grid(self._grid_of(images.shape[-2], images.shape[-1]))
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
        mask = in_dtype_of(x, attn_mask)
        return self._run(
            self.blocks[index], x, rope_cos=cosines.to(x.dtype), rope_sin=sines.to(x.dtype), attn_mask=mask
        )
