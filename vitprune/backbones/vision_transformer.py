"""timm's VisionTransformer (ViT, DeiT, DeiT-III, CLIP, DINOv2, SigLIP, AugReg ...) and VisionTransformerDistilled."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor

from vitprune.backbones.base import Backbone, in_dtype_of
from vitprune.errors import UnsupportedModelError


class VisionTransformerBackbone(Backbone):
    """timm.models.vision_transformer.VisionTransformer and timm.models.deit.VisionTransformerDistilled."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pools_prefix = model.pool_include_prefix

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens, position embedding and, in CLIP, the norm before the blocks."""
        return self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images)))

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Run timm's own block."""
        return self._run(self.blocks[index], x, attn_mask=in_dtype_of(x, attn_mask))

    def check_halves(self) -> None:
        """Timm's plain `Block` only; its variants order or fuse the parts otherwise."""
        kinds = {type(block) for block in self.blocks}
        if kinds != {Block}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UnsupportedModelError(f"blocks of the kind {names} cannot be run in halves, as merging needs")

    def attention_half(self, index: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """As timm's `Block.forward` begins."""
        block = self.blocks[index]
        attended = block.attn(block.norm1(x), attn_mask=in_dtype_of(x, attn_mask))
        return x + block.drop_path1(block.ls1(attended))

    def mlp_half(self, index: int, x: Tensor) -> Tensor:
        """As timm's `Block.forward` ends."""
        block = self.blocks[index]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
