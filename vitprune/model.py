"""SparseViT: a timm vision transformer plus one token predictor per stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitprune.backbones import Backbone, wrap
from vitprune.schedule import Schedule, ScheduleName, Stage, make_schedule, plan_label, plan_slug
from vitprune.tokens import (
    TokenPredictor,
    attention_bias,
    flat_rows,
    fold_masked,
    fold_tokens,
    keep_scores,
    size_bias,
    split_tokens,
    take_rows,
    topk_decision,
    topk_tokens,
)

Dropped = Literal["drop", "fold"]
"""What becomes of the tokens that leave: gone, or folded into those that stay (see `vitprune.tokens.merging`)."""

Decide = Callable[[Tensor, Tensor, Stage], Tensor]
"""How the masked pass decides: (log_pi (B, N, 2), D-hat so far (B, N), stage) to D (B, N)."""


class Route(NamedTuple):
    """Which tokens the deployed pass kept.

    Attributes:
        indices: original positions of the tokens kept after each stage, each (B, K_s), rising.
        log_pi: what each predictor said of the tokens that reached it, each (B, K_{s-1}, 2).
        sizes: with folding, how many patches each token kept to the end stands for, (B, K); else None.
    """

    indices: tuple[Tensor, ...]
    log_pi: tuple[Tensor, ...]
    sizes: Tensor | None


class Selection(NamedTuple):
    """What the deployed pass computed and which tokens it kept.

    Attributes:
        logits: (B, num_classes).
        features: kept patch tokens after the final norm, (B, K, C).
        indices, log_pi, sizes: as in `Route`.
    """

    logits: Tensor
    features: Tensor
    indices: tuple[Tensor, ...]
    log_pi: tuple[Tensor, ...]
    sizes: Tensor | None


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
    return topk_decision(keep_scores(log_pi), stage.num_tokens, kept)


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
        dropped: what becomes of the tokens that leave.

    Raises:
        UnsupportedModelError: see `vitprune.backbones.wrap`.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        predictors: Iterable[nn.Module] | None = None,
        dropped: Dropped = "drop",
    ) -> None:
        super().__init__()
        self.model = model
        self.dropped = dropped
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
        x, route = self._walk(self.backbone.embed(images), 0, self.backbone.depth, telling=False)
        return self.backbone.head(self.backbone.norm(x), sizes=route.sizes)

    def select(self, images: Tensor) -> Selection:
        """The deployed pass, telling which tokens it kept and what the predictors said."""
        return self.select_from(self.backbone.embed(images), first_block=0)

    def select_from(self, x: Tensor, first_block: int) -> Selection:
        """As `select`, from the tokens (B, P + N, C) that block `first_block` is to see; no stage may lie before it."""
        x, trace = self._walk(x, first_block, self.backbone.depth)
        x = self.backbone.norm(x)
        logits = self.backbone.head(x, sizes=trace.sizes)
        return Selection(logits, self.backbone.token_features(x), *trace)

    def route_from(self, x: Tensor, first_block: int) -> Route:
        """As `select_from`, but only as far as the last predictor: which tokens stay, not what the model answers."""
        return self._walk(x, first_block, self.schedule.blocks[-1])[1]

    def _walk(self, x: Tensor, first_block: int, end: int, telling: bool = True) -> tuple[Tensor, Route]:
        """Blocks `first_block` to `end` - 1, and a stage that lies before block `end`.

        With `telling` False the route holds sizes only: nothing is computed that the answer does not need.
        """
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        place = backbone.positions_of()
        present: Tensor | None = None  # original positions of the patch tokens still there
        sizes: Tensor | None = None  # of all tokens, prefix tokens too
        bias: Tensor | None = None
        positions: list[Tensor] = []
        log_pis: list[Tensor] = []
        stages = self._stages_by_block(x.shape[1] - prefix)
        for index in range(first_block, end + 1):
            if index in stages:
                x, sizes, stays, logits = self._leave(x, sizes, *stages[index])
                bias = None if sizes is None else size_bias(sizes).to(x.dtype)  # once, not in every block
                if telling or backbone.tells_positions:
                    present = stays if present is None else present.gather(1, stays)
                    place = backbone.positions_of(present)
                if telling:
                    positions.append(present if present is not None else stays)
                    log_pis.append(logits.log_softmax(dim=-1))
            if index < end:
                x = self._block(index, x, bias, place)
        return x, Route(tuple(positions), tuple(log_pis), None if sizes is None else sizes[:, prefix:])

    def _leave(
        self, x: Tensor, sizes: Tensor | None, stage: Stage, predictor: nn.Module
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """One stage: who stays of the patch tokens.

        Args:
            x: (B, P + N, C).
            sizes: with folding, (B, P + N); None before the first stage.
            stage: how many stay.
            predictor: of this stage.

        Returns:
            Tokens (B, P + K, C), their sizes (B, P + K) or None, indices of those that stay (B, K) of N, and what the
            predictor said, (B, N, 2).
        """
        prefix = self.backbone.num_prefix_tokens
        logits = self._predict(predictor, x[:, prefix:])
        scores = keep_scores(logits)
        if self.dropped == "fold" and stage.num_tokens < scores.shape[1]:
            stays, leaves = split_tokens(scores, stage.num_tokens)
            return *fold_tokens(x, sizes, stays, leaves, prefix), stays, logits
        stays = topk_tokens(scores, stage.num_tokens)
        return take_rows(x, flat_rows(x, prefix, stays)), sizes, stays, logits

    def _block(self, index: int, x: Tensor, bias: Tensor | None, positions: Any) -> Tensor:
        return self.backbone.block(index, x, bias, positions)

    def _predict(self, predictor: nn.Module, patches: Tensor) -> Tensor:
        """log_pi (B, N, 2), or logits that it is the log-softmax of."""
        said: Tensor = predictor.logits(patches) if isinstance(predictor, TokenPredictor) else predictor(patches)
        return said

    def forward_masked(self, images: Tensor, decide: Decide = topk_decide) -> MaskedOutput:
        """The training pass: all tokens stay, dropped ones are hidden from the others (DynamicViT section 3.3).

        Args:
            images: (B, in_chans, H, W).
            decide: how to decide from the predictor's output; sampled in training, top-k to agree with `forward`.
        """
        return self.forward_masked_from(self.backbone.embed(images), 0, decide)

    def forward_masked_from(self, x: Tensor, first_block: int, decide: Decide = topk_decide) -> MaskedOutput:
        """As `forward_masked`, from the tokens that block `first_block` is to see; no stage may lie before it."""
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        num_patches = x.shape[1] - prefix
        kept = torch.ones(x.shape[0], num_patches, device=x.device)
        if x.dtype == torch.float64:
            kept = kept.double()
        sizes = torch.ones_like(kept) if self.dropped == "fold" else None
        bias: Tensor | None = None
        place = backbone.positions_of()
        masks: list[Tensor] = []
        log_pis: list[Tensor] = []
        stages = self._stages_by_block(num_patches)
        for index in range(first_block, backbone.depth):
            if index in stages:
                stage, predictor = stages[index]
                patches = x[:, prefix:]
                log_pi = predictor(patches, kept)
                decision = decide(log_pi, kept, stage)
                if sizes is not None:
                    patches, sizes = fold_masked(patches, sizes, kept, decision)
                    x = torch.cat((x[:, :prefix], patches), dim=1)
                kept = kept * decision
                bias = attention_bias(kept, prefix, sizes)
                masks.append(kept)
                log_pis.append(log_pi)
            x = backbone.block(index, x, bias, place)
        x = backbone.norm(x)
        logits = backbone.head(x, kept if masks else None, sizes if masks else None)
        return MaskedOutput(logits, backbone.token_features(x), tuple(masks), tuple(log_pis))

    def _stages_by_block(self, num_patches: int) -> dict[int, tuple[Stage, nn.Module]]:
        """Stage and predictor by block; counts are taken anew where a dynamic-size model sees another grid."""
        stages = self.schedule.stages_for(num_patches, self.backbone.num_prefix_tokens)
        return {stage.block: (stage, p) for stage, p in zip(stages, self.predictors, strict=True)}


@dataclass(frozen=True)
class Sparsity:
    """What a user may ask for: how many tokens leave, where, and what becomes of them.

    Attributes:
        keep: share of tokens one stage keeps, in (0, 1]; after s stages keep^s of the patch tokens are left.
        stages: block indices before which predictors act; None for the default (12 blocks: 3, 6, 9).
        schedule: how the stages share the work, see `vitprune.schedule.make_schedule`.
        ratios: free shares of the original tokens left after each stage, instead of `keep` and `schedule`.
        dropped: what becomes of the tokens that leave.
        align: token counts that fill tiles of this size, prefix tokens included, at the same cost; 1 for any.
    """

    keep: float = 0.7
    stages: Sequence[int] | None = None
    schedule: ScheduleName = "geometric"
    ratios: Sequence[float] | None = None
    dropped: Dropped = "drop"
    align: int = 1

    @property
    def label(self) -> str:
        """How much is kept, for people: "keep 0.7" or "ratios 0.8,0.6,0.4", and "align 8"."""
        return plan_label(None if self.ratios is not None else self.keep, self.ratios or (), self.align)

    @property
    def slug(self) -> str:
        """`label` as part of a folder's name: "keep0.7"."""
        return plan_slug(self.label)

    def plan(self, backbone: Backbone) -> Schedule:
        """The stages for this backbone.

        Raises:
            UsageError: `keep`, `stages`, `ratios` or `align` is out of range.
        """
        return make_schedule(
            backbone.depth,
            backbone.num_patches,
            self.keep,
            self.stages,
            shape=self.schedule,
            ratios=self.ratios,
            align=self.align,
            num_prefix_tokens=backbone.num_prefix_tokens,
        )


def attach(
    model: nn.Module,
    keep: float = 0.7,
    stages: Sequence[int] | None = None,
    *,
    schedule: ScheduleName = "geometric",
    ratios: Sequence[float] | None = None,
    dropped: Dropped = "drop",
    align: int = 1,
) -> SparseViT:
    """Attach untrained token predictors to a timm model.

    Args:
        model: a timm model of a supported family; used as it is, not copied.
        keep: share of tokens one stage keeps, in (0, 1].
        stages: block indices before which predictors act.
        schedule: how the stages share the work.
        ratios: free shares left after each stage, instead of `keep` and `schedule`.
        dropped: what becomes of the tokens that leave.
        align: token counts in multiples of this. More on all of these in `Sparsity`.

    Returns:
        The sparse model. Its predictors know nothing yet: train it, or use `vitprune.sparsify`.

    Raises:
        UnsupportedModelError: the model's tokens cannot be dropped.
        UsageError: `keep`, `stages` or `ratios` is out of range.
    """
    return attach_as(model, Sparsity(keep, stages, schedule, ratios, dropped, align))


def attach_as(model: nn.Module, sparsity: Sparsity) -> SparseViT:
    """As `attach`, by one object."""
    return SparseViT(model, sparsity.plan(wrap(model)), dropped=sparsity.dropped)
