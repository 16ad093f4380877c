"""SparseViT: a timm vision transformer plus one token predictor per stage.

Shapes: B images, P prefix tokens (class, distillation, registers), N patch tokens, K_s of them kept after stage s, C
channels. Of the paper: pi are a predictor's probabilities (drop, keep), D is the decision of one stage (1 keep), D-hat
the product of the decisions so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitprune.backbones import wrap
from vitprune.common.own_members import PublicModule
from vitprune.schedule import Pruned, Schedule, ScheduleName, Sparsity, Stage, known_pruned
from vitprune.tokens.masking import attention_bias, size_bias
from vitprune.tokens.merging import merge_masked, merge_tokens
from vitprune.tokens.predictor import TokenPredictor
from vitprune.tokens.selection import flat_rows, keep_scores, split_tokens, take_rows, topk_decision, topk_tokens

Decide = Callable[[Tensor, Tensor, Stage], Tensor]
"""How the masked pass decides: (log_pi (B, N, 2), D-hat so far (B, N), stage) to D (B, N)."""


class Tokens(NamedTuple):
    """A batch on its way through the blocks, and which of its tokens were kept so far.

    Attributes:
        x: (B, P + K, C).
        sizes: with merging, how many patches each token stands for, (B, P + K); None before the first stage.
        indices: original positions of the patch tokens kept at each stage so far, each (B, K_s), rising.
        scores: what each predictor said of the tokens that reached it, log_pi or its logits, each (B, K_{s-1}, 2).
    """

    x: Tensor
    sizes: Tensor | None = None
    indices: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()

    @property
    def log_pi(self) -> tuple[Tensor, ...]:
        """The log-softmax of `scores`."""
        return tuple(each.log_softmax(dim=-1) for each in self.scores)


class Selection(NamedTuple):
    """What the deployed pass computed and which tokens it kept.

    Attributes:
        logits: (B, num_classes).
        features: kept patch tokens after the final norm, (B, K, C).
        indices: original positions of the tokens kept after each stage, each (B, K_s), rising.
        log_pi: what each predictor said of the tokens that reached it, each (B, K_{s-1}, 2).
        sizes: with merging, how many patches each token kept to the end stands for, (B, K); else None.
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


class SparseViT(PublicModule):
    """A vision transformer that drops its least informative patch tokens on the way.

    `forward` is what is deployed: the same, constant number of tokens for every image, really removed.
    `forward_masked` is what is trained: all tokens are there, pruned ones are hidden from attention and pooling.
    Both agree when the masked pass decides by `topk_decide`.

    Args:
        model: a timm model of a supported family; used as it is, not copied.
        schedule: the plan; no stages means dense.
        predictors: one module per stage, called as `predictor(x, kept)` on patch tokens (B, N, C) and D-hat (B, N)
            or None, giving log_pi (B, N, 2). None for new, untrained TokenPredictors.
        pruned: what happens to pruned tokens, see `vitprune.Sparsity`.

    Raises:
        UnsupportedModelError: see `vitprune.backbones.wrap`.
        UsageError: `pruned` is unknown.

    Attributes:
        class_names: in output order, where known; `vitprune.save` stores them.
        report: what training cost and gained, of a model from `vitprune.sparsify`; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        predictors: Iterable[nn.Module] | None = None,
        pruned: Pruned = "drop",
    ) -> None:
        super().__init__()
        self.model = model
        self.pruned = known_pruned(pruned)
        self.class_names: tuple[str, ...] | None = None
        self.report: Any = None  # a `vitprune.report.Report`, which stands above this module
        self.sparsity: Sparsity | None = None  # what `attach` was asked for
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
        """Width of the classifier; 0 without one."""
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        """C, channels of `forward_features`."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Timm's configuration of the weights, so that timm's data helpers work on this model too."""
        config: dict[str, Any] = getattr(self.model, "pretrained_cfg", None) or {}
        return config

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The same by timm's older name."""
        return self.pretrained_cfg

    def get_classifier(self) -> Any:
        """The model's classifier; of a distilled model both of them."""
        return self.model.get_classifier()  # type: ignore[operator]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier, as timm's; 0 for none: then `forward` gives pooled features (B, C).

        Args:
            num_classes: width of the new classifier.
            global_pool: another way to pool, by timm's name; None leaves it.
        """
        device = next(self.model.parameters()).device
        self.model.reset_classifier(num_classes, *(() if global_pool is None else (global_pool,)))  # type: ignore[operator]
        self.model.to(device)
        self.class_names = None

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens that are left after all stages, after the final norm: (B, in_chans, H, W) to (B, P + K, C).

        Prefix tokens (class, distillation, registers) come first, then the K kept patch tokens by rising position.
        """
        return self.backbone.norm(self.run_blocks(self.backbone.embed(images)).x)

    def forward_head(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Pool and classify what `forward_features` gave: (B, P + K, C) to logits (B, num_classes).

        Args:
            x: (B, P + K, C).
            sizes: (B, K), how many patches each kept token stands for, as `select` gives them. Only models that merge
                and pool over patches need it to agree with `forward`; without it kept tokens count alike.
        """
        return self.backbone.head(x, sizes=sizes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes), tokens removed."""
        return self._head(self.run_blocks(self.backbone.embed(images)))[1]

    def select(self, images: Tensor) -> Selection:
        """As `forward`, with the tokens that were kept and what the predictors said."""
        return self.select_from(self.backbone.embed(images), first_block=0)

    def select_from(self, x: Tensor, first_block: int) -> Selection:
        """As `select`, from the input (B, P + N, C) of block `first_block`; no stage may lie before it."""
        tokens = self.run_blocks(x, first_block)
        x, logits, sizes = self._head(tokens)
        return Selection(logits, self.backbone.token_features(x), tokens.indices, tokens.log_pi, sizes)

    def run_blocks(self, x: Tensor, first_block: int = 0, end: int | None = None) -> Tokens:
        """Blocks `first_block` to `end` - 1, each after its stage, and the stage before block `end`.

        Args:
            x: input of block `first_block`, (B, P + N, C).
            first_block: index; no stage may lie before it.
            end: index; None for all blocks.
        """
        end = self.backbone.depth if end is None else end
        stages = self._stages_by_block(x.shape[1] - self.backbone.num_prefix_tokens)
        tokens, bias, positions = Tokens(x), None, self.backbone.positions_of()
        for block in range(first_block, end + 1):
            if block in stages:
                tokens = self.prune(tokens, *stages[block])
                # Once per stage, not in every block.
                bias = None if tokens.sizes is None else size_bias(tokens.sizes).to(tokens.x.dtype)
                positions = self.backbone.positions_of(tokens.indices[-1])
            if block < end:
                tokens = tokens._replace(x=self.backbone.block(block, tokens.x, bias, positions))
        return tokens

    def prune(self, tokens: Tokens, stage: Stage, predictor: nn.Module) -> Tokens:
        """One stage: keep the patch tokens that `predictor` scores highest, and drop or merge the others.

        Args:
            tokens: (B, P + N, C).
            stage: how many to keep.
            predictor: of this stage.
        """
        x, sizes, prefix = tokens.x, tokens.sizes, self.backbone.num_prefix_tokens
        patches = x[:, prefix:]
        logits = predictor.logits(patches) if isinstance(predictor, TokenPredictor) else predictor(patches)
        scores = keep_scores(logits)
        if self.pruned == "merge" and stage.num_tokens < scores.shape[1]:
            kept, pruned = split_tokens(scores, stage.num_tokens)
            x, sizes = merge_tokens(x, sizes, kept, pruned, prefix)
        else:
            kept = topk_tokens(scores, stage.num_tokens)
            x = take_rows(x, flat_rows(x, prefix, kept))
        originals = tokens.indices[-1].gather(1, kept) if tokens.indices else kept
        return Tokens(x, sizes, (*tokens.indices, originals), (*tokens.scores, logits))

    def _head(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Normed tokens (B, P + K, C), logits and the sizes (B, K) of patch tokens."""
        sizes = None if tokens.sizes is None else tokens.sizes[:, self.backbone.num_prefix_tokens :]
        x = self.backbone.norm(tokens.x)
        return x, self.backbone.head(x, sizes=sizes), sizes

    def forward_masked(self, images: Tensor, decide: Decide = topk_decide) -> MaskedOutput:
        """The training pass: all tokens are there, pruned ones are hidden from the others (DynamicViT section 3.3).

        Args:
            images: (B, in_chans, H, W).
            decide: how to decide from the predictor's output; sampled in training, top-k to agree with `forward`.
        """
        return self.forward_masked_from(self.backbone.embed(images), 0, decide)

    def forward_masked_from(self, x: Tensor, first_block: int, decide: Decide = topk_decide) -> MaskedOutput:
        """As `forward_masked`, from the input (B, P + N, C) of block `first_block`; no stage may lie before it."""
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        num_patches = x.shape[1] - prefix
        stages, positions = self._stages_by_block(num_patches), backbone.positions_of()
        kept = torch.ones(x.shape[0], num_patches, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        sizes = torch.ones_like(kept) if self.pruned == "merge" else None
        bias: Tensor | None = None
        masks: list[Tensor] = []
        log_pis: list[Tensor] = []
        for block in range(first_block, backbone.depth):
            if block in stages:
                stage, predictor = stages[block]
                patches = x[:, prefix:]
                log_pi = predictor(patches, kept)
                decision = decide(log_pi, kept, stage)
                if sizes is not None:
                    patches, sizes = merge_masked(patches, sizes, kept, decision)
                    x = torch.cat((x[:, :prefix], patches), dim=1)
                kept = kept * decision
                bias = attention_bias(kept, prefix, sizes)
                masks.append(kept)
                log_pis.append(log_pi)
            x = backbone.block(block, x, bias, positions)
        x = backbone.norm(x)
        logits = backbone.head(x, kept if masks else None, sizes if masks else None)
        return MaskedOutput(logits, backbone.token_features(x), tuple(masks), tuple(log_pis))

    def _stages_by_block(self, num_patches: int) -> dict[int, tuple[Stage, nn.Module]]:
        """Stage and predictor by block; counts are recomputed where images of another size give another grid."""
        stages = self.schedule.stages_for(num_patches, self.backbone.num_prefix_tokens)
        return {stage.block: (stage, p) for stage, p in zip(stages, self.predictors, strict=True)}


def attach(
    model: nn.Module,
    keep: float = Sparsity.keep,
    stages: Sequence[int] | None = None,
    *,
    schedule: ScheduleName = Sparsity.schedule,
    ratios: Sequence[float] | None = None,
    pruned: Pruned = Sparsity.pruned,
    align: int = 1,
) -> SparseViT:
    """Attach untrained token predictors to a timm model.

    Args:
        model: a timm model of a supported family; used as it is, not copied.
        keep: share of tokens one stage keeps, in (0, 1].
        stages: blocks before which predictors act; None for the default (12 blocks: 3, 6, 9).
        schedule: "late" or the paper's "geometric".
        ratios: shares of the original tokens left after each stage, instead of `keep` and `schedule`.
        pruned: "merge" merges pruned tokens into kept ones, "drop" (the paper's) removes them.
        align: token counts in multiples of this. More on all of these in `vitprune.Sparsity`.

    Returns:
        The sparse model. Its predictors know nothing yet: train it, or use `vitprune.sparsify`.

    Raises:
        UnsupportedModelError: the model's tokens cannot be pruned.
        UsageError: see `vitprune.Sparsity` and `vitprune.make_schedule`.
    """
    return attach_as(model, Sparsity(keep, stages, schedule, ratios, pruned, align))


def attach_as(model: nn.Module, sparsity: Sparsity) -> SparseViT:
    """As `attach`, by one object; the model remembers it."""
    sparse = SparseViT(model, sparsity.plan(wrap(model)), pruned=sparsity.pruned)
    sparse.sparsity = sparsity
    return sparse
