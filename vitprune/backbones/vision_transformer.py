"""timm's VisionTransformer (ViT, DeiT, DeiT-III, CLIP, DINOv2, SigLIP, AugReg ...) and VisionTransformerDistilled."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitprune.backbones.base import Backbone
from vitprune.errors import UnsupportedModelError
from vitprune.tokens import attention_bias, key_bias, size_bias


class VisionTransformerBackbone(Backbone):
    """timm.models.vision_transformer.VisionTransformer and timm.models.deit.VisionTransformerDistilled.

    Modifications against timm's own forward:
    - the loop over `model.blocks` is ours, so that tokens can leave between blocks and a mask can be passed;
    - `patch_drop` (random token dropout in training) is not applied: the predictors decide which tokens go;
    - with `kept`, average, max and attention pooling see kept tokens only.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embed_dim = model.embed_dim
        self.depth = len(model.blocks)
        self.num_prefix_tokens = model.num_prefix_tokens
        rows, columns = model.patch_embed.grid_size
        self.grid_size = (int(rows), int(columns))
        self.num_classes = model.num_classes

    @property
    def reads(self) -> Literal["class token", "patches", "attention pool"]:
        """By timm's `global_pool`; the parameter-free pool ("prr") has no query of its own."""
        vit: Any = self.model
        if vit.global_pool == "map":
            return "attention pool"
        return "class token" if vit.global_pool == "token" else "patches"

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens, position embedding and, in CLIP, the norm before the blocks."""
        vit: Any = self.model
        x: Tensor = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        return x

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Run timm's own block; honours `model.set_grad_checkpointing()`."""
        vit: Any = self.model
        block = vit.blocks[index]
        if attn_mask is not None:
            attn_mask = attn_mask.to(x.dtype)  # fused attention wants the mask in the dtype of the queries
        if vit.grad_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, attn_mask, use_reentrant=False)
        elif attn_mask is None:
            out = block(x)
        else:
            out = block(x, attn_mask=attn_mask)
        return out

    def check_halves(self) -> None:
        """Timm's plain `Block` only; its variants order or fuse the parts otherwise."""
        vit: Any = self.model
        kinds = {type(block) for block in vit.blocks}
        if kinds != {Block}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UnsupportedModelError(f"blocks of the kind {names} cannot be run in halves, as merging needs")

    def attention_half(self, index: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """As timm's `Block.forward` begins."""
        vit: Any = self.model
        block = vit.blocks[index]
        mask = None if attn_mask is None else attn_mask.to(x.dtype)
        out: Tensor = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask)))
        return out

    def mlp_half(self, index: int, x: Tensor) -> Tensor:
        """As timm's `Block.forward` ends."""
        vit: Any = self.model
        block = vit.blocks[index]
        out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return out

    def norm(self, x: Tensor) -> Tensor:
        """The final norm; identity where timm norms after pooling."""
        vit: Any = self.model
        out: Tensor = vit.norm(x)
        return out

    def token_features(self, x: Tensor) -> Tensor:
        """Patch tokens, through `fc_norm` where that is the model's only norm, so that their scale is bounded."""
        vit: Any = self.model
        patches = x[:, self.num_prefix_tokens :]
        if isinstance(vit.norm, nn.Identity):
            patches = vit.fc_norm(patches)
        return patches

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Timm's own head, or with `kept` or `sizes` the same one on a pooling that heeds them."""
        vit: Any = self.model
        uneven = kept is not None or sizes is not None
        if uneven and (vit.attn_pool is not None or vit.global_pool != "token"):
            masked: Tensor = vit.head(vit.head_drop(vit.fc_norm(self._weighted_pool(x, kept, sizes))))
            return masked
        logits: Tensor | tuple[Tensor, Tensor] = vit.forward_head(x)  # reads prefix tokens only, or every token counts
        if isinstance(logits, tuple):  # a distilled model in its own training mode gives both heads
            logits = (logits[0] + logits[1]) / 2
        return logits

    def tail(self, first_block: int) -> list[nn.Module]:
        """Blocks, norms, pooling and classifier(s)."""
        vit: Any = self.model
        ends = [getattr(vit, name, None) for name in ("norm", "attn_pool", "fc_norm", "head", "head_dist")]
        return [*vit.blocks[first_block:], *(module for module in ends if module is not None)]

    def set_drop_path(self, rate: float) -> None:
        """Replace what timm calls `drop_path*` in every block."""
        vit: Any = self.model
        for index, block in enumerate(vit.blocks):
            share = rate * index / max(1, self.depth - 1)
            for module in list(block.modules()):
                for name, _ in list(module.named_children()):
                    if name.startswith("drop_path"):
                        setattr(module, name, DropPath(share) if share else nn.Identity())

    def _weighted_pool(self, x: Tensor, kept: Tensor | None, sizes: Tensor | None) -> Tensor:
        """`model.pool` over kept tokens only, each counted as often as its size says: (B, P + N, C) to (B, C)."""
        vit: Any = self.model
        prefix = self.num_prefix_tokens
        ones = x.new_ones(x.shape[0], x.shape[1] - prefix, dtype=torch.promote_types(x.dtype, torch.float32))
        kept, sizes = ones if kept is None else kept, ones if sizes is None else sizes
        if vit.pool_include_prefix:
            kept, sizes = (F.pad(weight, (prefix, 0), value=1.0) for weight in (kept, sizes))
        else:
            x = x[:, prefix:]
        pooled: Tensor
        if vit.global_pool == "map":
            bias = key_bias(kept)[:, None, None, :] + size_bias(sizes)
            pooled = vit.attn_pool(x, attn_mask=bias.to(x.dtype))
        elif vit.global_pool == "prr":
            pooled = _masked_prr_pool(vit.attn_pool, x, kept, sizes)
        else:
            pooled = _masked_reduce(x, kept * sizes, vit.global_pool)
        return pooled


def _masked_reduce(x: Tensor, weight: Tensor, pool: str) -> Tensor:
    """Timm's `global_pool_nlc` of the tokens whose weight is not 0: x (B, T, C), weight (B, T) to (B, C)."""
    weight = weight.to(x.dtype).unsqueeze(-1)
    mean = (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    if pool == "avg":
        return mean
    largest = x.masked_fill(weight < 0.5, torch.finfo(x.dtype).min).amax(dim=1)
    # An image without a kept token pools to zero, as its mean does; the largest of nothing would overflow the norm.
    largest = largest.masked_fill(weight.amax(dim=1) < 0.5, 0.0)
    return largest if pool == "max" else 0.5 * (largest + mean)


def _masked_prr_pool(pool: Any, x: Tensor, kept: Tensor, sizes: Tensor) -> Tensor:
    """Timm's AttentionPoolPrr, whose forward takes no mask: parameter-free self-attention, then token or mean."""
    tokens = pool.pre_norm(x)
    batch, length, channels = tokens.shape
    heads = tokens.reshape(batch, length, pool.num_heads, pool.head_dim).transpose(1, 2)
    bias = attention_bias(kept, sizes=sizes).to(heads.dtype)
    mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
    out: Tensor = pool.post_norm(mixed.transpose(1, 2).reshape(batch, length, channels))
    return out[:, 0] if pool.pool == "token" else _masked_reduce(out, kept * sizes, "avg")
