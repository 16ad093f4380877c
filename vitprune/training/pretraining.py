"""Pretraining of predictors: what the teacher already knows about its tokens, and the loss that ranks by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune.backbones import AttentionRecorder, Backbone
from vitprune.tokens.masking import attention_bias

Target = Literal["auto", "attention", "gradient", "both"]
"""What tokens are ranked by: what the classifier attends to, the gate's gradient, or the sum of both."""


def teacher_saliency(
    backbone: Backbone, x: Tensor, first_block: int, target: Target, influence: Callable[[Tensor], Tensor]
) -> Tensor:
    """How much each patch token matters for the teacher's output.

    "gradient" is |d I / d G_j|, I the influence (of a classifier, log p of its top class): how much the output would
    change if token j faded from attention, with the gate G (see `vitprune.tokens.masking`) on all blocks from
    `first_block`, where the first predictor sits, and in pooling. It is the signal that training through Gumbel noise
    estimates; here it comes without noise.

    "attention" is what the classifier looks at: the attention that the class token pays to each patch token, mean over
    heads and blocks of the later half; of an attention pool, its query's; else what all patch tokens pay to it.

    Args:
        backbone: the teacher; its weights get no gradient.
        x: tokens that block `first_block` sees, (B, P + N, C).
        first_block: index of the first gated block.
        target: "auto" is attention, which costs no backward pass and is easier to learn, but where the classifier
            averages patches, the gradient. "both" is the sum of the two, each over its mean.
        influence: a scalar of the outputs (B, ...), see `vitprune.tasks.Task.influence`.

    Returns:
        (B, N), at least 0, relative to the mean of its image, detached.
    """
    if target == "auto":
        target = "gradient" if backbone.pooling == "patches" else "attention"
    prefix, pools = backbone.num_prefix_tokens, backbone.pooling == "attention pool"
    by_gradient, by_attention = target != "attention", target != "gradient"
    recorder = AttentionRecorder()
    gate = torch.ones(x.shape[0], x.shape[1] - prefix, device=x.device, requires_grad=by_gradient)  # (B, N)
    with torch.set_grad_enabled(by_gradient):
        bias = attention_bias(gate, prefix) if by_gradient else None
        positions = backbone.positions_of()
        for index in range(first_block, backbone.depth):
            is_read = by_attention and not pools and index >= backbone.depth // 2
            with recorder if is_read else nullcontext():
                x = backbone.block(index, x, bias, positions)
        x = backbone.norm(x)
        with recorder if by_attention and pools else nullcontext():
            logits = backbone.head(x, gate if by_gradient else None)
        saliency = torch.zeros_like(gate)
        if by_gradient:
            # Each image's term depends on its own gate only, so the sum has per-image gradients.
            (gradient,) = torch.autograd.grad(influence(logits), gate)
            saliency = saliency + _over_mean(gradient.abs())
    if by_attention:
        rows = slice(0, 1) if backbone.pooling == "class token" else slice(None)
        saliency = saliency + _over_mean(recorder.attention(rows)[:, -gate.shape[1] :])
    return saliency.detach()


def _over_mean(saliency: Tensor) -> Tensor:
    return saliency / saliency.mean(dim=1, keepdim=True).clamp(min=torch.finfo(saliency.dtype).tiny)


def ranking_loss(scores: Sequence[Tensor], indices: Sequence[Tensor], saliency: Tensor) -> Tensor:
    """How far each stage's keep scores are from the saliency of the tokens it sees.

    KL divergence of softmax(score) over an image's tokens from their share of its saliency: it says how much a mistake
    costs, and makes exp(a), of a score less its mean, a token's saliency up to a factor.

    Args:
        scores: per stage, of the tokens that reach it, (B, K_{s-1}).
        indices: per stage, original positions of the tokens it keeps, (B, K_s).
        saliency: (B, N).

    Returns:
        Mean over stages and images.
    """
    losses, present = [], saliency
    for stage, each in enumerate(scores):
        share = present / present.sum(dim=1, keepdim=True).clamp(min=torch.finfo(present.dtype).tiny)
        losses.append(F.kl_div(each.log_softmax(dim=1), share, reduction="batchmean"))
        if stage + 1 < len(scores):
            present = saliency.gather(1, indices[stage])
    return torch.stack(losses).mean()
