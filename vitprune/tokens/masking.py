"""Training: sampled keep decisions and the attention gate that hides pruned tokens from the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GATE_EPS = 1e-6
"""Added to the gate before its logarithm. Not a clamp: clamping kills the gradient of pruned tokens."""


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of `like`, as torch's gumbel_softmax draws it."""
    return -torch.empty_like(like).exponential_().log()


def gumbel_decision(
    log_pi: Tensor, tau: float = 1.0, noise: float = 1.0, draw: Callable[[Tensor], Tensor] = gumbel_noise
) -> Tensor:
    """Sample D from pi by Gumbel-softmax, hard forward and soft (straight-through) backward.

    Args:
        log_pi: log-probabilities (B, N, 2), [..., 1] is keep.
        tau: temperature, above 0.
        noise: scale of the Gumbel noise; 1 samples from pi, 0 keeps what is likelier kept than not.
        draw: gives the noise for a tensor.

    Returns:
        D (B, N) of zeros and ones, with the gradient of the soft sample.
    """
    soft = ((log_pi + noise * draw(log_pi)) / tau).softmax(dim=-1)[..., 1]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # in this order the value is exactly 0 or 1


def key_bias(kept: Tensor) -> Tensor:
    """log(D-hat + eps): what is added to the logits of attention to token j.

    exp(P_ij) G_ij / sum_k exp(P_ik) G_ik is the softmax of P + log G. The eps keeps the logarithm finite and,
    unlike -inf, lets a pruned token's decision still receive the gradient of what would change if it came back. D-hat
    (B, T), prefix tokens included as ones, gives a bias (B, T), at least fp32.
    """
    kept = kept.float() if kept.dtype.itemsize < 4 else kept
    return (kept + GATE_EPS).log()


def attention_bias(kept: Tensor, num_prefix_tokens: int = 0, sizes: Tensor | None = None) -> Tensor:
    """The attention gate as an additive mask for self-attention (DynamicViT eq. 10-11).

    G_ij = 1 if i == j else D-hat_j; prefix tokens are always kept.

    Args:
        kept: D-hat of the patch tokens (B, N).
        num_prefix_tokens: P, the number of tokens in front that are never pruned.
        sizes: with merging, how many patches each patch token stands for, (B, N).

    Returns:
        log(G + eps), (B, 1, P + N, P + N), to be passed as `attn_mask`; with `sizes`, their logarithm added.
    """
    bias = key_bias(F.pad(kept, (num_prefix_tokens, 0), value=1.0))  # (B, T)
    num_tokens = bias.shape[1]
    diagonal = torch.eye(num_tokens, dtype=torch.bool, device=bias.device)
    gate = bias[:, None, None, :].masked_fill(diagonal, 0.0)  # (B, 1, T, T)
    return gate if sizes is None else gate + size_bias(sizes, num_prefix_tokens)


def size_bias(sizes: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Proportional attention: log of how many patches each key stands for, at least 1, (B, N); P prefix tokens are one.

    Returns:
        Bias (B, 1, 1, P + N), to be passed as `attn_mask`.
    """
    if num_prefix_tokens:
        sizes = F.pad(sizes, (num_prefix_tokens, 0), value=1.0)
    return sizes.log()[:, None, None, :]
