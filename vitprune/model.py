"""SparseViT: a timm vision transformer plus one token predictor per stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitprune.backbones import wrap
from vitprune.schedule import Schedule, Stage, make_schedule, num_kept
from vitprune.tokens import TokenPredictor, attention_bias, gather_tokens, topk_decision, topk_tokens

Decide = Callable[[Tensor, Tensor, Stage], Tensor]
"""How the masked pass decides: (log_pi (B, N, 2), D-hat so far (B, N), stage) to D (B, N)."""


class Selection(NamedTuple):
    """What the deployed pass computed and which tokens it kept.

    Attributes:
        logits: (B, num_classes).
        features: kept patch tokens after the final norm, (B, K, C).
        indices: original positions of the tokens kept after each stage, each (B, K_s), rising.
        log_pi: what each predictor said of the tokens that reached it, each (B, K_{s-1}, 2).
    """

    logits: Tensor
    features: Tensor
    indices: tuple[Tensor, ...]
    log_pi: tuple[Tensor, ...]


class MaskedOutput(NamedTuple):
    """What the masked (training) pass computed.

    Attributes:
        logits: (B, num_classes).
        features: all patch tokens after the final norm, (B, N, C).
        kept: D-hat after each stage, each (B, N).
        log_pi: what each predictor said, each (B, N, 2).
    """

    logits: Tensor
    features: Tensor
    kept: tuple[Tensor, ...]
    log_pi: tuple[Tensor, ...]


def topk_decide(log_pi: Tensor, kept: Tensor, stage: Stage) -> Tensor:
    """The decision inference takes: the stage's number of highest keep scores."""
    return topk_decision(log_pi[..., 1], stage.num_tokens, kept)


class SparseViT(nn.Module):
    """A vision transformer that drops its least informative patch tokens on the way.

    `forward` is what is deployed: the same, constant number of tokens for every image, really removed.
    `forward_masked` is what is trained: all tokens stay, dropped ones are hidden from attention and pooling.
    Both agree when the masked pass decides by `topk_decide`.

    Args:
        model: a timm model of a supported family; used as it is, not copied.
        schedule: the plan; no stages means dense.
        predictors: one module per stage, called as `predictor(x, kept)` on patch tokens (B, N, C) and D-hat (B, N)
            or None, giving log_pi (B, N, 2). None for new, untrained TokenPredictors.

    Raises:
        UnsupportedModelError: see `vitprune.backbones.wrap`.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, predictors: Iterable[nn.Module] | None = None) -> None:
        super().__init__()
        self.model = model
        self.backbone = wrap(model)
        if schedule.depth != self.backbone.depth:
            raise ValueError(f"expected a schedule for {self.backbone.depth} blocks, got one for {schedule.depth}")
        self.schedule = schedule
        if predictors is None:
            device = next(model.parameters()).device
            predictors = [TokenPredictor(self.backbone.embed_dim).to(device) for _ in schedule.stages]
        self.predictors = nn.ModuleList(predictors)
        if len(self.predictors) != len(schedule.stages):
            raise ValueError(
                f"expected one predictor per stage, got {len(self.predictors)} predictors and "
                f"{len(schedule.stages)} stages"
            )

    @property
    def num_classes(self) -> int:
        """Width of the classifier."""
        return self.backbone.num_classes

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Timm's configuration of the weights, so that timm's data helpers work on this model too."""
        config: dict[str, Any] = getattr(self.model, "pretrained_cfg", None) or {}
        return config

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes), tokens removed."""
        x, _, _ = self._gathered(images, trace=False)
        return self.backbone.head(self.backbone.norm(x))

    def select(self, images: Tensor) -> Selection:
        """The deployed pass, telling which tokens it kept and what the predictors said."""
        x, indices, log_pi = self._gathered(images, trace=True)
        x = self.backbone.norm(x)
        return Selection(self.backbone.head(x), self.backbone.token_features(x), indices, log_pi)

    def _gathered(self, images: Tensor, trace: bool) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Tokens out of the last block, and with `trace` the original positions kept and log_pi per stage."""
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        x = backbone.embed(images)  # (B, P + N, C)
        num_patches = x.shape[1] - prefix
        positions: list[Tensor] = []
        log_pis: list[Tensor] = []
        stages = self._stages_by_block(num_patches)
        for index in range(backbone.depth):
            if index in stages:
                stage, predictor = stages[index]
                patches = x[:, prefix:]
                log_pi = predictor(patches)
                chosen = topk_tokens(log_pi[..., 1], stage.num_tokens)  # (B, K)
                x = torch.cat((x[:, :prefix], gather_tokens(patches, chosen)), dim=1)
                if trace:
                    positions.append(positions[-1].gather(1, chosen) if positions else chosen)
                    log_pis.append(log_pi)
            x = backbone.block(index, x)
        return x, tuple(positions), tuple(log_pis)

    def forward_masked(self, images: Tensor, decide: Decide = topk_decide) -> MaskedOutput:
        """The training pass: all tokens stay, dropped ones are hidden from the others (DynamicViT section 3.3).

        Args:
            images: (B, in_chans, H, W).
            decide: how to decide from the predictor's output; sampled in training, top-k to agree with `forward`.
        """
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        x = backbone.embed(images)
        num_patches = x.shape[1] - prefix
        kept = torch.ones(x.shape[0], num_patches, device=x.device)
        if x.dtype == torch.float64:
            kept = kept.double()
        bias: Tensor | None = None
        masks: list[Tensor] = []
        log_pis: list[Tensor] = []
        stages = self._stages_by_block(num_patches)
        for index in range(backbone.depth):
            if index in stages:
                stage, predictor = stages[index]
                log_pi = predictor(x[:, prefix:], kept)
                kept = kept * decide(log_pi, kept, stage)
                bias = attention_bias(kept, prefix)
                masks.append(kept)
                log_pis.append(log_pi)
            x = backbone.block(index, x, bias)
        x = backbone.norm(x)
        logits = backbone.head(x, kept if masks else None)
        return MaskedOutput(logits, backbone.token_features(x), tuple(masks), tuple(log_pis))

    def _stages_by_block(self, num_patches: int) -> dict[int, tuple[Stage, nn.Module]]:
        """Stage and predictor by block; counts are taken anew where a dynamic-size model sees another grid."""
        stages = self.schedule.stages
        if num_patches != self.schedule.num_patches:
            stages = tuple(replace(stage, num_tokens=num_kept(num_patches, stage.ratio)) for stage in stages)
        return {stage.block: (stage, p) for stage, p in zip(stages, self.predictors, strict=True)}


def attach(model: nn.Module, keep: float = 0.7, stages: Sequence[int] | None = None) -> SparseViT:
    """Attach untrained token predictors to a timm model.

    Args:
        model: a timm model of a supported family; used as it is, not copied.
        keep: share of tokens one stage keeps, in (0, 1]; after s stages keep^s of the patch tokens are left.
        stages: block indices before which predictors act; None for the default (12 blocks: 3, 6, 9).

    Returns:
        The sparse model. Its predictors know nothing yet: train it, or use `vitprune.sparsify`.

    Raises:
        UnsupportedModelError: the model's tokens cannot be dropped.
        UsageError: `keep` or `stages` is out of range.
    """
    backbone = wrap(model)
    return SparseViT(model, make_schedule(backbone.depth, backbone.num_patches, keep, stages))
