"""timm's CaiT: talking heads over patch tokens, then class attention layers that alone see the class token."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune.backbones.base import Backbone
from vitprune.backbones.pooling import weighted_pool
from vitprune.tokens.masking import key_bias, size_bias


class CaitBackbone(Backbone):
    """timm.models.cait.Cait.

    The class token joins after all blocks, so the sequence has no prefix here and the class attention layers are part
    of the head.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.num_prefix_tokens = 0

    @property
    def pooling(self) -> Literal["class token", "patches", "attention pool"]:
        """The class attention is a pool with the class token as its query."""
        return "attention pool" if self.model.global_pool == "token" else "patches"

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding and position embedding."""
        return self.model.pos_drop(self.model.patch_embed(images) + self.model.pos_embed)

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Timm's own block, or with a mask its parts around talking heads that heed it."""
        block = self.blocks[index]
        if attn_mask is None:
            return self._run(block, x)
        return self._run(_masked_block, x, block=block, mask=attn_mask)

    def norm(self, x: Tensor) -> Tensor:
        """Identity: timm norms after the class attention layers."""
        return x

    def norm_intermediate(self, x: Tensor) -> Tensor:
        """The norm after the class attention layers, as timm does."""
        return self.model.norm(x)

    def features(self, x: Tensor) -> Tensor:
        """Patch tokens (B, N, C) behind the class token, which has looked at all of them: (B, 1 + N, C), normed."""
        return self.model.norm(self.model.forward_cls(x))

    def head_of_features(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token, or the mean of patches, and classifier."""
        return self.model.forward_head(x, pre_logits)

    def token_features(self, x: Tensor) -> Tensor:
        """Patch tokens, normed."""
        return self.model.norm(x)

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Pooling and classifier."""
        return self.model.head(self.pool(x, kept, sizes))

    def pool(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Class attention over kept tokens, each counted as often as its size says, and norm."""
        if kept is None and sizes is None:
            return self.model.forward_head(self.model.norm(self.model.forward_cls(x)), pre_logits=True)
        if self.model.global_pool == "token":
            mask = key_bias(x.new_ones(x.shape[:2]) if kept is None else kept)
            if sizes is not None:
                mask = mask + size_bias(sizes)[:, 0, 0]
            token = self.model.cls_token.expand(x.shape[0], -1, -1)
            for layer in self.model.blocks_token_only:
                token = _class_attention_layer(layer, x, token, F.pad(mask, (1, 0)))
            pooled = self.model.norm(token)[:, 0]
        else:
            pooled = weighted_pool(self.model, self.model.norm(x), 0, kept, sizes, include_prefix=False)
        return self.model.head_drop(pooled)


def _masked_block(x: Tensor, block: Any, mask: Tensor) -> Tensor:
    x = x + block.drop_path(block.gamma_1 * _talking_heads(block.attn, block.norm1(x), mask))
    return x + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x)))


def _talking_heads(attention: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Timm's TalkingHeadAttn (https://arxiv.org/abs/2003.02436) with a mask: (B, T, C) to (B, T, C).

    Heads are mixed before and after the softmax. The second mixing adds a constant to every weight, also to that of a
    token which is gone or which stands for several: it is scaled as the weights themselves are, by the mask's factor.
    """
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv[0] * attention.scale, qkv[1], qkv[2]
    logits = query @ key.transpose(-2, -1)
    logits = attention.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weights = (logits + mask.to(logits.dtype)).softmax(dim=-1)
    weights = F.linear(weights.permute(0, 2, 3, 1), attention.proj_w.weight).permute(0, 3, 1, 2)
    constant = attention.proj_w.bias.view(1, -1, 1, 1)
    weights = weights + (constant * mask.exp()).to(weights.dtype)
    out = (attention.attn_drop(weights) @ value).transpose(1, 2).flatten(2)
    return attention.proj_drop(attention.proj(out))


def _class_attention_layer(layer: Any, x: Tensor, token: Tensor, mask: Tensor) -> Tensor:
    """Timm's LayerScaleBlockClassAttn with a mask (B, 1 + K) on the keys: the new class token, (B, 1, C)."""
    attention = layer.attn
    everything = layer.norm1(torch.cat((token, x), dim=1))
    heads = attention.num_heads
    query = attention.q(everything[:, :1]).unflatten(2, (heads, -1)).transpose(1, 2)
    key = attention.k(everything).unflatten(2, (heads, -1)).transpose(1, 2)
    value = attention.v(everything).unflatten(2, (heads, -1)).transpose(1, 2)
    dropout = attention.attn_drop.p if attention.training else 0.0
    bias = mask[:, None, None, :].to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    attended = attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))
    token = token + layer.drop_path(layer.gamma_1 * attended)
    return token + layer.drop_path(layer.gamma_2 * layer.mlp(layer.norm2(token)))
