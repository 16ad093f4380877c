"""Models whose attention adds a bias for every pair of positions: BEiT, and timm's relative-position ViTs.

Their blocks take no mask and no gathered bias, so the attention between timm's own layers is ours, unless all tokens
are there and nothing is masked.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from torch import Tensor

from vitprune.backbones.base import Backbone
from vitprune.tokens.selection import index_dtype


class PairwiseBackbone(Backbone):
    """The bias of a pair of tokens is gathered with them: rows for queries, columns for keys."""

    def positions_of(self, present: Tensor | None = None) -> Tensor | None:
        """Rows of the bias, prefix tokens first, (B, P + K)."""
        if present is None:
            return None
        dtype, count = index_dtype(), self.num_prefix_tokens
        prefix = torch.arange(count, dtype=dtype, device=present.device).expand(present.shape[0], -1)
        return torch.cat((prefix, present.to(dtype) + count), dim=1).long()  # ONNX gathers by 64 bits

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Timm's own block, or its parts around an attention that heeds mask and positions."""
        block = self.blocks[index]
        shared = self._shared_bias()
        if attn_mask is None and positions is None:
            return self._run(block, x, **({} if shared is None else {self._shared_name: shared}))
        bias = self._bias(block.attn, shared)
        if bias is not None and positions is not None:
            rows, columns = positions[:, :, None], positions[:, None, :]
            bias = bias[0][:, rows, columns].transpose(0, 1)
        if attn_mask is not None:
            bias = attn_mask if bias is None else bias + attn_mask

        def run(tokens: Tensor) -> Tensor:
            return self._compose(block, tokens, lambda y: _attend(block.attn, *self._split(block.attn, y), bias))

        return self._run(run, x)

    _shared_name = ""
    """What timm's block calls the bias that all blocks share."""

    @abstractmethod
    def _shared_bias(self) -> Tensor | None:
        """The bias that all blocks share, (1, heads, P + N, P + N) or (heads, ...)."""

    @abstractmethod
    def _bias(self, attention: Any, shared: Tensor | None) -> Tensor | None:
        """The bias of one block, (1, heads, P + N, P + N)."""

    @abstractmethod
    def _split(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of tokens (B, T, C), each (B, heads, T, D)."""

    @abstractmethod
    def _compose(self, block: Any, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Timm's block around `attend`."""


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 * heads * D) to three of (B, heads, T, D)."""
    query, key, value = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention and output projection: (B, heads, T, D) to (B, T, C)."""
    dropout = attention.attn_drop.p if attention.training else 0.0
    mask = None if bias is None else bias.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))


class BeitBackbone(PairwiseBackbone):
    """timm.models.beit.Beit: BEiT and BEiT v2."""

    _shared_name = "shared_rel_pos_bias"

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, class token and, where there is one, absolute position embedding."""
        x = self.model.patch_embed(images)
        x = torch.cat((self.model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.model.pos_embed is not None:
            x = x + self.model.pos_embed
        return self.model.pos_drop(x)

    def _shared_bias(self) -> Tensor | None:
        return None if self.model.rel_pos_bias is None else self.model.rel_pos_bias()

    def _bias(self, attention: Any, shared: Tensor | None) -> Tensor | None:
        if attention.relative_position_bias_table is None:
            return None if shared is None else shared.unsqueeze(0)
        own: Tensor = attention._get_rel_pos_bias()
        return own if shared is None else own + shared

    def _split(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = None
        if attention.q_bias is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        return _heads(F.linear(x, attention.qkv.weight, bias), attention.num_heads)

    def _compose(self, block: Any, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        attended = attend(block.norm1(x))
        x = x + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
        mixed = block.mlp(block.norm2(x))
        return x + block.drop_path2(mixed if block.gamma_2 is None else block.gamma_2 * mixed)


class RelPosBackbone(PairwiseBackbone):
    """timm.models.vision_transformer_relpos.VisionTransformerRelPos, Swin-like, MLP or shared bias."""

    _shared_name = "shared_rel_pos"

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding and, where there is one, the class token; positions are in the bias alone."""
        x: Tensor = self.model.patch_embed(images)
        if self.model.cls_token is not None:
            x = torch.cat((self.model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x

    def _shared_bias(self) -> Tensor | None:
        return None if self.model.shared_rel_pos is None else self.model.shared_rel_pos.get_bias()

    def _bias(self, attention: Any, shared: Tensor | None) -> Tensor | None:
        return shared if attention.rel_pos is None else attention.rel_pos.get_bias()

    def _split(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = _heads(attention.qkv(x), attention.num_heads)
        return attention.q_norm(query), attention.k_norm(key), value

    def _compose(self, block: Any, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if isinstance(block, ResPostRelPosBlock):
            x = x + block.drop_path1(block.norm1(attend(x)))
            out: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
        else:
            x = x + block.drop_path1(block.ls1(attend(block.norm1(x))))
            out = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return out
