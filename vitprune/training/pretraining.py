"""Pretraining of predictors: what the teacher already knows about its tokens, and the loss that ranks by it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune.backbones import AttentionRecorder, Backbone
from vitprune.tokens.masking import attention_bias

Target = Literal["auto", "attention", "gradient", "both"]
"""What tokens are ranked by: what the classifier attends to, the gate's gradient, or the sum of both."""


def teacher_saliency(backbone: Backbone, x: Tensor, first_block: int, target: Target = "auto") -> Tensor:
    """How much each patch token matters for the teacher's prediction.

    "gradient" is |d log p(top class) / d G_j|: how much the prediction would change if token j faded from attention,
    with the gate G (see `vitprune.tokens.masking`) on all blocks from `first_block`, where the first predictor
    sits, and in pooling. It is the signal that training through Gumbel noise estimates; here it comes without noise.

    "attention" is what the classifier looks at: the attention that the class token pays to each patch token, mean over
    heads and blocks of the later half; of an attention pool, its query's; else what all patch tokens pay to it.

    Args:
        backbone: the teacher; its weights get no gradient.
        x: tokens that block `first_block` sees, (B, P + N, C).
        first_block: index of the first gated block.
        target: "auto" is attention, which costs no backward pass and is easier to learn, but where the classifier
            averages patches, the gradient. "both" is the sum of the two, each over its mean.

    Returns:
        (B, N), at least 0, relative to the mean of its image, detached.
    """
    if target == "auto":
        target = "gradient" if backbone.pooling == "patches" else "attention"
    prefix = backbone.num_prefix_tokens
    by_gradient, by_attention = target != "attention", target != "gradient"
    recorder = AttentionRecorder()
    gate = torch.ones(x.shape[0], x.shape[1] - prefix, device=x.device, requires_grad=by_gradient)  # (B, N)
    with torch.set_grad_enabled(by_gradient):
        bias = attention_bias(gate, prefix) if by_gradient else None
        positions = backbone.positions_of()
        for index in range(first_block, backbone.depth):
            with recorder if _is_read(backbone, index) and by_attention else nullcontext():
                x = backbone.block(index, x, bias, positions)
        x = backbone.norm(x)
        with recorder if backbone.pooling == "attention pool" and by_attention else nullcontext():
            logits = backbone.head(x, gate if by_gradient else None)
        saliency = torch.zeros_like(gate)
        if by_gradient:
            # Each image's term depends on its own gate only, so the sum has per-image gradients.
            top = logits.float().log_softmax(dim=-1).amax(dim=-1).sum()
            (gradient,) = torch.autograd.grad(top, gate)
            saliency = saliency + _over_mean(gradient.abs())
    if by_attention:
        rows = slice(0, 1) if backbone.pooling == "class token" else slice(None)
        saliency = saliency + _over_mean(recorder.attention(rows)[:, -gate.shape[1] :])
    return saliency.detach()


def _is_read(backbone: Backbone, index: int) -> bool:
    return backbone.pooling != "attention pool" and index >= backbone.depth // 2


def _over_mean(saliency: Tensor) -> Tensor:
    return saliency / saliency.mean(dim=1, keepdim=True).clamp(min=torch.finfo(saliency.dtype).tiny)


def ranking_loss(log_pi: Sequence[Tensor], indices: Sequence[Tensor], saliency: Tensor) -> Tensor:
    """How far each stage's keep probabilities are from the saliency of the tokens it sees.

    The sum of two losses. Listwise: KL divergence of softmax(logit of keeping) over an image's tokens from their share
    of its saliency, which says how much a mistake costs. Per token: binary cross-entropy of keeping the K_s most
    salient, which makes pi a probability and the share kept the scheduled one.

    Args:
        log_pi: per stage, (B, K_{s-1}, 2), of the tokens that reach it.
        indices: per stage, original positions of the tokens it keeps, (B, K_s).
        saliency: (B, N).

    Returns:
        Mean over stages and images, and in the second over tokens.
    """
    losses, present = [], saliency
    for stage, (stage_log_pi, chosen) in enumerate(zip(log_pi, indices, strict=True)):
        share = present / present.sum(dim=1, keepdim=True).clamp(min=torch.finfo(present.dtype).tiny)
        listed = (stage_log_pi[..., 1] - stage_log_pi[..., 0]).log_softmax(dim=1)
        losses.append(F.kl_div(listed, share, reduction="batchmean"))
        best = present.topk(chosen.shape[1], dim=1).indices
        target = torch.zeros_like(present).scatter_(1, best, 1.0)
        losses.append(-torch.lerp(stage_log_pi[..., 0], stage_log_pi[..., 1], target).mean())
        if stage + 1 < len(indices):
            present = saliency.gather(1, chosen)
    return torch.stack(losses).sum() / len(indices)
