"""Models whose attention turns queries and keys by their positions: Eva (EVA-02, DINOv3, PE ...) and NaFlexVit."""

from __future__ import annotations

from typing import Any

from timm.layers import apply_keep_indices_nlc
from torch import Tensor

from vitprune.backbones.base import Backbone, input_size
from vitprune.errors import UsageError


class RotaryBackbone(Backbone):
    """Rotary positions are gathered with their tokens, those of one table per block ("mixed") too.

    They depend on the patch grid, so the images must have the size that the model was built for. timm's random shifts
    and scalings of the coordinates in training are not applied: teacher and student would see different ones.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._built_for = self._grid_of(*input_size(model)[1:])

    def positions_of(self, present: Tensor | None = None) -> Any:
        """Sines and cosines: (N, D), or per block (depth, heads, N, D).

        Of given tokens (B, 1, K, D), or (depth, B, heads, K, D).
        """
        if self.encoder.rope is None:
            return None
        table = self._table(self.encoder.rope)
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
        table = self.positions_of() if positions is None else positions
        rope = {} if table is None else {"rope": table[index] if self._per_block else table}
        return self._run(self.blocks[index], x, attn_mask, **rope)

    @property
    def _per_block(self) -> bool:
        return bool(getattr(self.model, "rope_mixed", False) or getattr(self.model, "rope_is_mixed", False))

    def _grid(self) -> tuple[int, int]:
        return self._built_for

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        return self._patches.dynamic_feat_size((height, width))

    def _check_size(self, images: Tensor) -> None:
        """Raise UsageError where images have another patch grid than the model's fixed positions are for."""
        rows, columns = self._grid_of(*images.shape[-2:])
        if (rows, columns) != self.grid_size and getattr(self.encoder, "rope", self) is not None:
            raise UsageError(
                f"the model's rotary positions are for {self.grid_size[0]}x{self.grid_size[1]} patches, "
                f"the images have {rows}x{columns}",
                "build the model for this size: --img-size, or timm.create_model(..., img_size=...)",
            )


class EvaBackbone(RotaryBackbone):
    """timm.models.eva.Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs."""

    @property
    def pools_prefix(self) -> bool:
        """Its attention pool sees all tokens, its averages patches."""
        return self.model.attn_pool is not None

    def _grid(self) -> tuple[int, int]:
        return self.model.patch_embed.grid_size

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens, absolute position embedding and, in some, the norm before the blocks."""
        self._check_size(images)
        dropout, self.model.patch_drop = self.model.patch_drop, None
        try:
            x, _ = self.model._pos_embed(self.model.patch_embed(images))
        finally:
            self.model.patch_drop = dropout
        return self.model.norm_pre(x)


class NaFlexBackbone(RotaryBackbone):
    """timm.models.naflexvit.NaFlexVit on ordinary batches of images of one size."""

    floors = False

    @property
    def _patches(self) -> Any:
        return self.model.embeds

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens and absolute position embedding, resampled to the image's grid."""
        self._check_size(images)
        x, _ = self.model.embeds(images)
        return self.model.norm_pre(x)
