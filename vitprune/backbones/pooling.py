"""timm's ways of pooling tokens, over those kept only and each counted as often as its size says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune.tokens.masking import attention_bias, key_bias, size_bias


def weighted_pool(
    model: Any, x: Tensor, prefix: int, kept: Tensor | None, sizes: Tensor | None, include_prefix: bool
) -> Tensor:
    """`model.pool` of kept tokens.

    Args:
        model: a timm model with `global_pool` and, where it pools by attention, `attn_pool`.
        x: (B, P + N, C).
        prefix: P.
        kept: D-hat (B, N); None for all.
        sizes: how many patches each token stands for, (B, N); None for one.
        include_prefix: whether prefix tokens are pooled too.

    Returns:
        (B, C).
    """
    ones = x.new_ones(x.shape[0], x.shape[1] - prefix, dtype=torch.promote_types(x.dtype, torch.float32))
    kept, sizes = ones if kept is None else kept, ones if sizes is None else sizes
    if include_prefix:
        kept, sizes = (F.pad(weight, (prefix, 0), value=1.0) for weight in (kept, sizes))
    else:
        x = x[:, prefix:]
    attention_pool = getattr(model, "attn_pool", None)
    if attention_pool is not None and model.global_pool != "prr":
        bias = key_bias(kept)[:, None, None, :] + size_bias(sizes)
        return attention_pool(x, attn_mask=bias.to(x.dtype))
    if model.global_pool == "prr":
        return _prr_pool(attention_pool, x, kept, sizes)
    return reduce_tokens(x, kept * sizes, model.global_pool)


def reduce_tokens(x: Tensor, weight: Tensor, pool: str) -> Tensor:
    """Timm's `global_pool_nlc` of the tokens whose weight is not 0: x (B, T, C), weight (B, T) to (B, C)."""
    weight = weight.to(x.dtype).unsqueeze(-1)
    mean = (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    if pool == "avg":
        return mean
    largest = x.masked_fill(weight < 0.5, torch.finfo(x.dtype).min).amax(dim=1)
    # An image without a kept token pools to zero, as its mean does; the largest of nothing would overflow the norm.
    largest = largest.masked_fill(weight.amax(dim=1) < 0.5, 0.0)
    return largest if pool == "max" else 0.5 * (largest + mean)


def _prr_pool(pool: Any, x: Tensor, kept: Tensor, sizes: Tensor) -> Tensor:
    """Timm's AttentionPoolPrr, whose forward takes no mask: parameter-free self-attention, then token or mean."""
    tokens = pool.pre_norm(x)
    batch, length, channels = tokens.shape
    heads = tokens.reshape(batch, length, pool.num_heads, pool.head_dim).transpose(1, 2)
    bias = attention_bias(kept, sizes=sizes).to(heads.dtype)
    mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
    out: Tensor = pool.post_norm(mixed.transpose(1, 2).reshape(batch, length, channels))
    return out[:, 0] if pool.pool == "token" else reduce_tokens(out, kept * sizes, "avg")
