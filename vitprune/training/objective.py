"""What a training step minimises, phase by phase."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune.model import MaskedOutput, Selection, SparseViT
from vitprune.schedule import Stage
from vitprune.tokens import distillation_loss, gather_tokens, gumbel_decision, ratio_loss, token_loss
from vitprune.training.recipe import LossWeights, Phase
from vitprune.training.warm_start import ranking_loss, teacher_signal


class StepLoss(NamedTuple):
    """The loss of a step.

    Attributes:
        total: weighted sum, a scalar with gradient.
        components: the unweighted losses by name, detached scalars.
        kept_ratios: share of the original tokens kept after each stage, (num_stages,), detached.
    """

    total: Tensor
    components: dict[str, Tensor]
    kept_ratios: Tensor


class Objective(nn.Module):
    """Student, teacher and losses as one module, so that a data-parallel wrapper sees the whole step.

    Args:
        student: the sparse model.
        teacher: the dense model, a SparseViT without stages; never trained, always in eval mode.
        weights: of the losses in the phases after the warm start.
        labels: whether to use the labels.
        tau: temperature of the Gumbel-softmax.
    """

    def __init__(
        self, student: SparseViT, teacher: SparseViT, weights: LossWeights, *, labels: bool = True, tau: float = 1.0
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.weights = weights
        self.labels = labels
        self.tau = tau

    def train(self, mode: bool = True) -> Objective:
        """Set the student's mode; the teacher stays in eval mode."""
        self.training = mode
        self.student.train(mode)
        return self

    def forward(self, images: Tensor, labels: Tensor, phase: Phase) -> StepLoss:
        """The loss of one batch.

        Args:
            images: (B, in_chans, H, W).
            labels: class indices (B,); ignored without labels and in the warm start.
            phase: see `Recipe`.
        """
        if phase == "warm":
            return self._warm(images)
        with torch.no_grad():
            teacher = self.teacher.select(images)
        if phase == "sampled":
            return self._sampled(images, labels, teacher)
        return self._deployed(images, labels, teacher)

    def _warm(self, images: Tensor) -> StepLoss:
        first_block = self.student.schedule.stages[0].block
        saliency = teacher_signal(self.teacher.backbone, images, first_block).saliency
        out = self.student.select(images)
        loss = ranking_loss(out.log_pi, out.indices, saliency)
        return StepLoss(loss, {"rank": loss.detach()}, self._deployed_ratios(out))

    def _sampled(self, images: Tensor, labels: Tensor, teacher: Selection) -> StepLoss:
        out = self.student.forward_masked(images, self._sample)
        losses = self._distil(out, labels, teacher) | {
            "token": token_loss(out.features, teacher.features, out.kept[-1]),
            "ratio": ratio_loss(out.kept, self.student.schedule.ratios),
        }
        return self._sum(losses, torch.stack([mask.detach().mean() for mask in out.kept]))

    def _sample(self, log_pi: Tensor, kept: Tensor, stage: Stage) -> Tensor:
        del kept, stage  # sampled decisions depend on neither; D-hat multiplies them afterwards
        return gumbel_decision(log_pi, self.tau)

    def _deployed(self, images: Tensor, labels: Tensor, teacher: Selection) -> StepLoss:
        out = self.student.select(images)
        matching = gather_tokens(teacher.features, out.indices[-1])
        losses = self._distil(out, labels, teacher) | {"token": token_loss(out.features, matching)}
        return self._sum(losses, self._deployed_ratios(out))

    def _distil(self, out: MaskedOutput | Selection, labels: Tensor, teacher: Selection) -> dict[str, Tensor]:
        losses = {"kl": distillation_loss(out.logits, teacher.logits)}
        if self.labels and self.weights.ce > 0:
            losses["ce"] = F.cross_entropy(out.logits.float(), labels)
        return losses

    def _sum(self, losses: dict[str, Tensor], kept_ratios: Tensor) -> StepLoss:
        total = torch.stack([getattr(self.weights, name) * loss for name, loss in losses.items()]).sum()
        return StepLoss(total, {name: loss.detach() for name, loss in losses.items()}, kept_ratios)

    def _deployed_ratios(self, out: Selection) -> Tensor:
        num_patches = self.student.schedule.num_patches
        return torch.tensor([chosen.shape[1] / num_patches for chosen in out.indices])
