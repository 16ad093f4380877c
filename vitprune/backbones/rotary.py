"""Models whose attention turns queries and keys by their positions: Eva (EVA-02, DINOv3, PE ...) and NaFlexVit."""

from __future__ import annotations

from typing import Any

from timm.layers import apply_keep_indices_nlc
from torch import Tensor

from vitprune.backbones.base import Backbone, input_size


class RotaryBackbone(Backbone):
    """Rotary positions are gathered with their tokens, those of one table per block ("mixed") too.

    They depend on the patch grid, so the images must have the size that the model was built for. timm's random shifts
    and scalings of the coordinates in training are not applied: teacher and student would see different ones.
    """

    def positions_of(self, present: Tensor | None = None) -> Tensor | None:
        """Sines and cosines: (N, D), or per block (depth, heads, N, D).

        Of given tokens (B, 1, K, D), or (depth, B, heads, K, D).
        """
        if self.model.rope is None:
            return None
        table = self._table(self.model.rope)
        if present is None:
            return table
        kept: Tensor = apply_keep_indices_nlc(present, table, present)
        return kept.transpose(0, 1) if table.ndim == 4 else kept.unsqueeze(1)

    def _table(self, rope: Any) -> Tensor:
        training = rope.training
        rope.training = False
        try:
            fixed = getattr(rope, "feat_shape", None) is not None
            table: Tensor = rope.get_embed() if fixed else rope.get_embed(shape=list(self.grid_size))
        finally:
            rope.training = training
        return table

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Run timm's own block."""
        arguments: dict[str, Any] = {}
        table = self.positions_of() if positions is None else positions
        if table is not None:
            arguments["rope"] = table[index] if self._per_block else table
        if attn_mask is not None:
            arguments["attn_mask"] = attn_mask.to(x.dtype)
        return self._run(self.blocks[index], x, **arguments)

    @property
    def _per_block(self) -> bool:
        return bool(getattr(self.model, "rope_mixed", False) or getattr(self.model, "rope_is_mixed", False))

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if self.model.rope is not None:
            super()._check_grid(grid)


class EvaBackbone(RotaryBackbone):
    """timm.models.eva.Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs."""

    pools_prefix = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pools_prefix = model.attn_pool is not None  # its attention pool sees all tokens, its averages patches

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens, absolute position embedding and, in some, the norm before the blocks."""
        height, width = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])
        self._check_grid((height, width))
        dropout, self.model.patch_drop = self.model.patch_drop, None
        try:
            x, _ = self.model._pos_embed(self.model.patch_embed(images))
        finally:
            self.model.patch_drop = dropout
        return self.model.norm_pre(x)


class NaFlexBackbone(RotaryBackbone):
    """timm.models.naflexvit.NaFlexVit on ordinary batches of images of one size."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pools_prefix = model.pool_include_prefix

    def _grid(self) -> tuple[int, int]:
        _, height, width = input_size(self.model)
        return self.model.embeds.dynamic_feat_size((height, width))

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens and absolute position embedding, resampled to the image's grid."""
        self._check_grid(self.model.embeds.dynamic_feat_size(images.shape[-2:]))
        x, _ = self.model.embeds(images)
        return self.model.norm_pre(x)
