"""timm's VisionTransformer (ViT, DeiT, DeiT-III, CLIP, DINOv2, SigLIP, AugReg ...) and VisionTransformerDistilled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitprune.backbones.base import Backbone
from vitprune.tokens import attention_bias, key_bias


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

    def head(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Timm's own head, or with `kept` the same one on a pooling that leaves dropped tokens out."""
        vit: Any = self.model
        if kept is not None and (vit.attn_pool is not None or vit.global_pool != "token"):
            masked: Tensor = vit.head(vit.head_drop(vit.fc_norm(self._masked_pool(x, kept))))
            return masked
        logits: Tensor | tuple[Tensor, Tensor] = vit.forward_head(x)  # reads prefix tokens only, or every token counts
        if isinstance(logits, tuple):  # a distilled model in its own training mode gives both heads
            logits = (logits[0] + logits[1]) / 2
        return logits

    def _masked_pool(self, x: Tensor, kept: Tensor) -> Tensor:
        """`model.pool` over kept tokens only: (B, P + N, C) to (B, C)."""
        vit: Any = self.model
        if vit.pool_include_prefix:
            kept = F.pad(kept, (self.num_prefix_tokens, 0), value=1.0)
        else:
            x = x[:, self.num_prefix_tokens :]
        pooled: Tensor
        if vit.global_pool == "map":
            pooled = vit.attn_pool(x, attn_mask=key_bias(kept)[:, None, None, :].to(x.dtype))
        elif vit.global_pool == "prr":
            pooled = _masked_prr_pool(vit.attn_pool, x, kept)
        else:
            pooled = _masked_reduce(x, kept, vit.global_pool)
        return pooled


def _masked_reduce(x: Tensor, kept: Tensor, pool: str) -> Tensor:
    """Timm's `global_pool_nlc` of the kept tokens: x (B, T, C), kept (B, T) to (B, C)."""
    weight = kept.to(x.dtype).unsqueeze(-1)
    mean = (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    if pool == "avg":
        return mean
    largest = x.masked_fill(weight < 0.5, torch.finfo(x.dtype).min).amax(dim=1)
    # An image without a kept token pools to zero, as its mean does; the largest of nothing would overflow the norm.
    largest = largest.masked_fill(weight.amax(dim=1) < 0.5, 0.0)
    return largest if pool == "max" else 0.5 * (largest + mean)


def _masked_prr_pool(pool: Any, x: Tensor, kept: Tensor) -> Tensor:
    """Timm's AttentionPoolPrr, whose forward takes no mask: parameter-free self-attention, then token or mean."""
    tokens = pool.pre_norm(x)
    batch, length, channels = tokens.shape
    heads = tokens.reshape(batch, length, pool.num_heads, pool.head_dim).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=attention_bias(kept).to(heads.dtype))
    out: Tensor = pool.post_norm(mixed.transpose(1, 2).reshape(batch, length, channels))
    return out[:, 0] if pool.pool == "token" else _masked_reduce(out, kept, "avg")
