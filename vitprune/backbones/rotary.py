"""Models whose attention turns queries and keys by their positions: Eva (EVA-02, DINOv3, PE ...) and NaFlexVit."""

from __future__ import annotations

from typing import Any

from timm.layers import apply_keep_indices_nlc
from torch import Tensor

from vitprune.backbones.standard import StandardBackbone
from vitprune.errors import UsageError


class RotaryBackbone(StandardBackbone):
    """Rotary positions are gathered with their tokens, those of one table per block ("mixed") too.

    They depend on the patch grid, so the images must have the size that the model was built for. timm's random shifts
    and scalings of the coordinates in training are not applied: teacher and student would see different ones.
    """

    def positions_of(self, present: Tensor | None = None) -> Tensor | None:
        """Sines and cosines: (N, D), or per block (depth, heads, N, D).

        Of given tokens (B, 1, K, D), or (depth, B, heads, K, D).
        """
        model: Any = self.model
        if model.rope is None:
            return None
        table = self._table(model.rope)
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
        model: Any = self.model
        return bool(getattr(model, "rope_mixed", False) or getattr(model, "rope_is_mixed", False))

    def _check_grid(self, grid: tuple[int, int]) -> None:
        model: Any = self.model
        if model.rope is not None and tuple(grid) != self.grid_size:
            raise UsageError(
                f"the model's rotary positions are for {self.grid_size[0]}x{self.grid_size[1]} patches, "
                f"the images have {grid[0]}x{grid[1]}",
                "build the model for this size: --img-size, or timm.create_model(..., img_size=...)",
            )


class EvaBackbone(RotaryBackbone):
    """timm.models.eva.Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs."""

    pools_prefix = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pools_prefix = model.attn_pool is not None  # its attention pool sees all tokens, its averages patches

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens, absolute position embedding and, in some, the norm before the blocks."""
        eva: Any = self.model
        height, width = eva.patch_embed.dynamic_feat_size(images.shape[-2:])
        self._check_grid((height, width))
        dropout, eva.patch_drop = eva.patch_drop, None
        try:
            x, _ = eva._pos_embed(eva.patch_embed(images))
        finally:
            eva.patch_drop = dropout
        out: Tensor = eva.norm_pre(x)
        return out


class NaFlexBackbone(RotaryBackbone):
    """timm.models.naflexvit.NaFlexVit on ordinary batches of images of one size."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pools_prefix = model.pool_include_prefix

    def _grid(self) -> tuple[int, int]:
        from vitprune.backbones.preprocessing import input_size

        naflex: Any = self.model
        _, height, width = input_size(naflex)
        grid: tuple[int, int] = naflex.embeds.dynamic_feat_size((height, width))
        return grid

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens and absolute position embedding, resampled to the image's grid."""
        naflex: Any = self.model
        self._check_grid(naflex.embeds.dynamic_feat_size(images.shape[-2:]))
        x, _ = naflex.embeds(images)
        out: Tensor = naflex.norm_pre(x)
        return out
