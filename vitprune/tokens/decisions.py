"""Training: sampled keep decisions and the attention gate that hides dropped tokens from the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATE_EPS = 1e-6
"""Added to the gate before its logarithm. Not a clamp: clamping kills the gradient of dropped tokens."""


def gumbel_decision(log_pi: Tensor, tau: float = 1.0) -> Tensor:
    """Sample D from pi by Gumbel-softmax, hard forward and soft (straight-through) backward.

    Args:
        log_pi: log-probabilities (B, N, 2), [..., 1] is keep.
        tau: temperature, above 0.

    Returns:
        D (B, N) of zeros and ones, with the gradient of the soft sample.
    """
    return F.gumbel_softmax(log_pi, tau=tau, hard=True)[..., 1]


def key_bias(kept: Tensor) -> Tensor:
    """log(D-hat + eps): what is added to the logits of attention to token j.

    exp(P_ij) G_ij / sum_k exp(P_ik) G_ik is the softmax of P + log G. The eps keeps the logarithm finite and,
    unlike -inf, lets a dropped token's decision still receive the gradient of what would change if it came back.

    Args:
        kept: D-hat (B, T), prefix tokens included as ones.

    Returns:
        Bias (B, T), at least fp32.
    """
    kept = kept.float() if kept.dtype.itemsize < 4 else kept
    return (kept + GATE_EPS).log()


def attention_bias(kept: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """The attention gate as an additive mask for self-attention (DynamicViT eq. 10-11).

    G_ij = 1 if i == j else D-hat_j; prefix tokens are always kept.

    Args:
        kept: D-hat of the patch tokens (B, N).
        num_prefix_tokens: P, the number of tokens in front that are never dropped.

    Returns:
        log(G + eps), (B, 1, P + N, P + N), to be passed as `attn_mask`.
    """
    bias = key_bias(F.pad(kept, (num_prefix_tokens, 0), value=1.0))  # (B, T)
    num_tokens = bias.shape[1]
    diagonal = torch.eye(num_tokens, dtype=torch.bool, device=bias.device)
    return bias[:, None, None, :].masked_fill(diagonal, 0.0)  # (B, 1, T, T)
