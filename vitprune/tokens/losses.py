"""The losses of DynamicViT section 3.3 and of what the classifier reads, as pure functions.

Weighting and summing is the recipe's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ratio_loss(kept: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """Mean over stages and images of (share of tokens kept - target)^2 (eq. 15).

    Args:
        kept: D-hat after each stage, each (B, N), N the original number of patch tokens.
        ratios: target share of each stage.
    """
    if len(kept) != len(ratios):
        raise ValueError(f"expected one target per stage, got {len(kept)} stages and {len(ratios)} targets")
    # Divided by the real number of stages: the authors' code divides by 3 whatever there is.
    return torch.stack(
        [((mask.mean(dim=1) - ratio) ** 2).mean() for mask, ratio in zip(kept, ratios, strict=True)]
    ).mean()


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of the class distributions, by logits (B, num_classes), batch mean (eq. 14), in fp32.

    No gradient flows into the teacher's.
    """
    student = F.log_softmax(logits.float(), dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float(), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_distillation_loss(logits: Tensor, teacher_logits: Tensor, kept: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of every kept token's own class distribution, mean over tokens, in fp32.

    What takes the place of `token_loss` in LV-ViT, whose patch tokens have a classifier: logits are
    (B, N, num_classes), the others as there.
    """
    student = F.log_softmax(logits.float(), dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float(), dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)  # (B, N)
    return _mean_over_kept(divergence, kept)


def token_loss(
    features: Tensor, teacher_features: Tensor, kept: Tensor | None = None, *, relative: bool = False
) -> Tensor:
    """Mean squared error of the final features over the tokens the student kept (eq. 13), in fp32.

    Args:
        features: student's patch tokens after the final norm, (B, N, C).
        teacher_features: teacher's, at the same positions, (B, N, C).
        kept: the student's final D-hat (B, N); None when all N tokens are kept ones.
        relative: divide by the mean square of the teacher's features in each image, so that a backbone with large ones
            does not drown the other losses: 1 is then as wrong as all zeros.
    """
    target = teacher_features.detach().float()
    error = (features.float() - target).square().mean(dim=-1)  # (B, N)
    if relative:  # image by image, so that what else is in the batch does not matter
        error = error / target.square().mean(dim=(1, 2)).clamp(min=torch.finfo(target.dtype).tiny).unsqueeze(1)
    return _mean_over_kept(error, kept)


def pooled_loss(pooled: Tensor, teacher_pooled: Tensor) -> Tensor:
    """Squared error of what the classifier reads, (B, C), over the mean square of the teacher's, batch mean, in fp32.

    No gradient flows into the teacher's.
    """
    target = teacher_pooled.detach().float()
    scale = target.square().mean(dim=1).clamp(min=torch.finfo(target.dtype).tiny)
    return ((pooled.float() - target).square().mean(dim=1) / scale).mean()


def _mean_over_kept(losses: Tensor, kept: Tensor | None) -> Tensor:
    """Mean of losses (B, N) over the tokens that D-hat (B, N) keeps; 0 if that is none."""
    if kept is None:
        return losses.mean()
    weight = kept.detach().to(losses.dtype)
    return (losses * weight).sum() / weight.sum().clamp(min=1)
