"""The warm start: what the teacher already knows about its tokens, and predictors that learn to rank by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitprune.backbones import Backbone
from vitprune.tokens import attention_bias


class TeacherSignal(NamedTuple):
    """One pass of the teacher, forward and backward.

    Attributes:
        logits: (B, num_classes).
        features: patch tokens after the final norm, (B, N, C).
        saliency: how much the answer depends on each patch token, (B, N), at least 0.
    """

    logits: Tensor
    features: Tensor
    saliency: Tensor


def teacher_signal(backbone: Backbone, images: Tensor, first_block: int) -> TeacherSignal:
    """|d log p(top class) / d G_j|: how much the teacher's answer would change if token j faded from attention.

    The gate G (see `vitprune.tokens.attention_bias`) acts from `first_block` on, where the first predictor sits, and
    in pooling. This is the signal that training through Gumbel noise estimates; here it comes without noise.

    Args:
        backbone: the teacher; its weights get no gradient.
        images: (B, in_chans, H, W).
        first_block: index of the first gated block.
    """
    prefix = backbone.num_prefix_tokens
    with torch.no_grad():
        x = backbone.embed(images)
        for index in range(first_block):
            x = backbone.block(index, x)
    gate = torch.ones(x.shape[0], x.shape[1] - prefix, device=x.device, requires_grad=True)  # (B, N)
    with torch.enable_grad():
        bias = attention_bias(gate, prefix)
        for index in range(first_block, backbone.depth):
            x = backbone.block(index, x, bias)
        x = backbone.norm(x)
        logits = backbone.head(x, gate)
        # Each image's term depends on its own gate only, so the sum has per-image gradients.
        top = logits.float().log_softmax(dim=-1).amax(dim=-1).sum()
        (gradient,) = torch.autograd.grad(top, gate)
    return TeacherSignal(logits.detach(), backbone.token_features(x).detach(), gradient.abs())


def ranking_loss(log_pi: Sequence[Tensor], indices: Sequence[Tensor], saliency: Tensor) -> Tensor:
    """How far each stage's keep probabilities are from keeping the most salient of the tokens it sees.

    Binary cross-entropy, per token: the target is 1 for the K_s most salient tokens still there. So the predictor
    learns the ranking and, at once, to keep the share it should.

    Args:
        log_pi: per stage, (B, K_{s-1}, 2), of the tokens that reach it.
        indices: per stage, original positions of the tokens it keeps, (B, K_s).
        saliency: (B, N).

    Returns:
        Mean over stages, images and tokens.
    """
    losses, present = [], saliency
    for stage, (stage_log_pi, chosen) in enumerate(zip(log_pi, indices, strict=True)):
        best = present.topk(chosen.shape[1], dim=1).indices
        target = torch.zeros_like(present).scatter_(1, best, 1.0)
        losses.append(-torch.lerp(stage_log_pi[..., 0], stage_log_pi[..., 1], target).mean())
        if stage + 1 < len(indices):
            present = saliency.gather(1, chosen)
    return torch.stack(losses).mean()
