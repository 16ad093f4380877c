"""SparseViT: a timm vision transformer plus one token predictor per stage. Shapes and symbols: see passes.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitprune.backbones import Backbone, wrap
from vitprune.common.wrappers import how_wrapped
from vitprune.errors import UsageError
from vitprune.model.blend import Blend, with_child
from vitprune.model.passes import Decide, MaskedOutput, Selection, TaskName, Tokens
from vitprune.model.plan import Plan
from vitprune.model.timm_module import TimmModule
from vitprune.schedule import (
    PredictorName,
    Pruned,
    Schedule,
    Similarity,
    Sparsity,
    Stage,
    known_pruned,
    make_schedule,
    plan_label,
)
from vitprune.tokens.filling import Grid, pruned_grid, rows_after_dropping, rows_after_merging
from vitprune.tokens.masking import attention_bias, size_bias
from vitprune.tokens.merging import merge_gains, merge_masked, merge_tokens
from vitprune.tokens.predictor import PREDICTORS, is_trained
from vitprune.tokens.redundancy import choose_masked, choose_tokens
from vitprune.tokens.selection import flat_rows, log_probabilities, take_rows, topk_tokens

_NO_GRADIENT = (
    "the model is in training mode, but this pass gives its predictors no gradient: top-k has none. vitprune.Objective "
    "trains them, and so does forward_masked(images, decide) with a sampling decision such as "
    "vitprune.tokens.masking.gumbel_decision; to predict, call .eval() first; to train the backbone alone, "
    ".predictors.requires_grad_(False)"
)


class SparseViT(TimmModule):
    """A vision transformer that prunes unimportant and redundant patch tokens on the way.

    `forward` is what is deployed: the same, constant number of tokens for every image, really removed.
    `forward_masked` is what is trained: all tokens are there, pruned ones are hidden from attention and pooling.
    Both agree where the masked pass does not sample.

    It starts in the mode, training or eval, that `model` is in. Its `state_dict()` carries the plan, as a uint8 tensor
    "_extra_state": weights of another plan are refused, and of those that do not say theirs a warning tells.

    Args:
        model: a timm model of a supported family; used as it is, not copied.
        schedule: the plan; no stages means dense.
        predictors: new, untrained ones of a kind (see `vitprune.Sparsity`); or one module per stage, called as
            `predictor(x, kept)` on patch tokens (B, N, C) and D-hat (B, N) or None, giving keep scores (B, N).
        pruned: what happens to pruned tokens, see `vitprune.Sparsity`, as of the next two.
        balance: how much importance counts beside redundancy, where tokens are merged; None ranks by importance alone.
        beta: how much importance counts when tokens are averaged.
        similarity: what tokens are compared by, where they are merged.

    Raises:
        UnsupportedModelError: see `vitprune.backbones.wrap`, or its keys cannot be had.
        UsageError: `pruned` is unknown.

    Attributes:
        task: what it is for: by default an embedding where there is no classifier.
        class_names: in output order, where known; `vitprune.save` stores them.
        report: what training cost and gained, of a model from `vitprune.sparsify`; else None.
        blend: of a model trained for a range of keep ratios, the dense weights and those for the lowest ratio; those
            of `model` lie between them. None where all ratios have the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        predictors: Literal["light", "paper", "norm"] | Iterable[nn.Module] = "light",
        pruned: Pruned = Sparsity.pruned,
        balance: float | None = Sparsity.balance,
        beta: float = Sparsity.beta,
        similarity: Similarity = Sparsity.similarity,
    ) -> None:
        super().__init__()
        self.model = model
        self.pruned = known_pruned(pruned)
        merges = self.pruned == "merge"  # what is dropped is in no average, and nothing stands for it
        self.balance, self.beta = (balance, beta) if merges else (None, 0.0)
        self.similarity: Similarity = similarity if merges else "features"
        self.class_names: tuple[str, ...] | None = None
        self.report: Any = None  # a `vitprune.report.Report`, which stands above this module
        self.sparsity = schedule.sparsity  # what was asked for
        self.blend: Blend | None = None
        self.header: Any = None  # a `vitprune.checkpoint.sparse_file.Header`: of the file it is from, or was saved to
        self._backbone = wrap(model)
        if schedule.depth != self.backbone.depth:
            raise ValueError(f"expected a schedule for {self.backbone.depth} blocks, got one for {schedule.depth}")
        self._schedule = schedule
        if self.similarity == "keys":
            self.backbone.check_keys(schedule.blocks)
        if isinstance(predictors, str):
            device, kind = next(model.parameters()).device, PREDICTORS[predictors]
            predictors = [kind(self.backbone.embed_dim).to(device) for _ in schedule.stages]
        self.predictors = nn.ModuleList(predictors)
        if len(self.predictors) != len(schedule.stages):
            raise ValueError(
                f"expected one predictor per stage, got {len(self.predictors)} predictors and "
                f"{len(schedule.stages)} stages"
            )
        self.task: TaskName = "classification" if self.num_classes else "embedding"
        self.training = model.training
        self.predictors.train(model.training)
        self.register_load_state_dict_post_hook(_take_blended)  # type: ignore[no-untyped-call]

    @property
    def backbone(self) -> Backbone:
        """The adapter of `model`, of the one there is now: DataParallel gives its replicas others."""
        # torch.export shows proxies of the modules, which it traces all the same.
        if self._backbone.model is not self.model and not torch.compiler.is_exporting():
            if how := how_wrapped(self.model):
                raise UsageError(f"the model in the SparseViT is {how}", "do that with the SparseViT itself")
            self._backbone = wrap(self.model)
        return self._backbone

    @property
    def schedule(self) -> Schedule:
        """The plan, with the token counts of the model's grid now."""
        return self._schedule.resized(self.backbone.num_patches, self.backbone.num_prefix_tokens)

    @property
    def keep(self) -> float | None:
        """The keep ratio; None where shares were chosen freely. Of a model trained for a range it can be set.

        Example:
            sparse = vitprune.load("model.safetensors")  # of vitprune sparsify --keep 0.5-0.9
            sparse.keep = 0.6

        Raises:
            UsageError: the model was trained for one ratio, or for others than this.
        """
        asked = self.sparsity
        if asked is None:
            return None if self._schedule.stages else 1.0
        return None if asked.tokens_left is not None else asked.keep

    @keep.setter
    def keep(self, keep: float) -> None:
        if keep == self.keep:
            return
        if self.sparsity is None:
            raise UsageError("what the model was trained for is not known, so its keep ratio cannot be set")
        asked, now, backbone = self.sparsity.at(keep), self._schedule, self.backbone
        self._schedule = make_schedule(now.depth, now.num_patches, asked, backbone.num_prefix_tokens)
        self.sparsity = asked
        if self.blend is not None:
            self.blend.fill(self.model, keep)

    @property
    def keep_range(self) -> tuple[float, float] | None:
        """The lowest and highest keep ratio that the model was trained for; None for `keep` alone."""
        return self.sparsity.keep_range if self.sparsity else None

    @property
    def label(self) -> str:
        """How much is kept, for people: "keep 0.7", or "ratios 0.8,0.6,0.4"; or "dense"."""
        schedule = self.schedule
        return plan_label(self.keep, schedule.ratios, schedule.align) if schedule.stages else "dense"

    def at(self, keep: float) -> SparseViT:
        """The same model at another keep ratio of its range: a view, whose weights are this one's but for a `blend`'s.

        Raises:
            UsageError: as `keep`.
        """
        own = self.model if self.blend is None else self.blend.own_tail(self.model)
        view: SparseViT = with_child(self, "model", own)
        view.keep = keep
        return view

    @property
    def plan(self) -> Plan:
        """Schedule and what becomes of pruned tokens in one, as a `state_dict` and `repr` hold it."""
        schedule, asked = self.schedule, self.sparsity
        by_keep = asked if asked and asked.tokens_left is None else None
        return Plan(
            schedule.stages,
            schedule.num_patches,
            schedule.align,
            self.pruned,
            self.balance,
            self.beta,
            self.predictor,
            by_keep.keep if by_keep else None,
            by_keep.token_schedule if by_keep else None,
            self.similarity,
            self.keep_range,
        )

    @property
    def predictor(self) -> PredictorName | None:
        """The kind of the predictors; None if they are none of vitprune's."""
        kinds = [name for name, kind in PREDICTORS.items() if all(type(each) is kind for each in self.predictors)]
        return kinds[0] if kinds else None

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes), tokens removed.

        It trains the backbone, but gives predictors no gradient: see `forward_masked`.
        """
        self._warn_of_no_gradient()
        return self._head(self.run_blocks(self.backbone.embed(images)))[1]

    def select(self, images: Tensor, filled: bool = False) -> Selection:
        """As `forward`, with the tokens that were kept and what the predictors said.

        Args:
            images: (B, in_chans, H, W).
            filled: whether to give the features of all patches too, with gradient.
        """
        return self.select_from(self.backbone.embed(images), 0, filled)

    def select_from(self, x: Tensor, first_block: int, filled: bool = False) -> Selection:
        """As `select`, from the input (B, P + N, C) of block `first_block`; no stage may lie before it."""
        backbone, tokens = self.backbone, self.run_blocks(x, first_block, grid=Grid() if filled else None)
        x, logits, sizes = self._head(tokens)
        pooled, features = backbone.pool(x, sizes=sizes), backbone.token_features(x)
        full = backbone.token_features(backbone.norm(self._filled(tokens))) if filled else None
        return Selection(logits, pooled, features, tokens.indices, tokens.scores, sizes, tokens.choices, full)

    def run_blocks(
        self,
        x: Tensor,
        first_block: int = 0,
        end: int | None = None,
        grid: Grid | None = None,
        seen: Callable[[int, Tokens], None] | None = None,
    ) -> Tokens:
        """Blocks `first_block` to `end` - 1, each after its stage, and the stage before block `end`.

        Args:
            x: input of block `first_block`, (B, P + N, C).
            first_block: index; no stage may lie before it.
            end: index; None for all blocks.
            grid: a new one to follow each patch through the stages; None where the full grid is not asked for.
            seen: called after each block with its index and the tokens.
        """
        end = self.backbone.depth if end is None else end
        stages = self._stages_by_block(x.shape[1] - self.backbone.num_prefix_tokens)
        tokens, bias, positions = Tokens(x, grid=grid), None, self.backbone.positions_of()
        for block in range(first_block, end + 1):
            if block in stages:
                tokens = self.prune(tokens, *stages[block])
                # Once per stage, not in every block.
                bias = None if tokens.sizes is None else size_bias(tokens.sizes).to(tokens.x.dtype)
                positions = self.backbone.positions_of(tokens.indices[-1])
            if block < end:
                tokens = tokens._replace(x=self.backbone.block(block, tokens.x, bias, positions))
                if seen is not None:
                    seen(block, tokens)
        return tokens

    def prune(self, tokens: Tokens, stage: Stage, predictor: nn.Module) -> Tokens:
        """One stage: keep the patch tokens that `predictor` scores highest, and drop or merge the others.

        Args:
            tokens: (B, P + N, C).
            stage: how many to keep.
            predictor: of this stage.
        """
        x, sizes, prefix = tokens.x, tokens.sizes, self.backbone.num_prefix_tokens
        scores, choices = self.importance(tokens, predictor), tokens.choices
        if self.pruned == "merge" and stage.num_tokens < scores.shape[1]:
            like = self._compared_by(stage, x[:, prefix:])
            choice = choose_tokens(like, scores, stage.num_tokens, self.balance)
            kept, choices = choice.kept, (*choices, choice)
            x, sizes = merge_tokens(x, sizes, choice, prefix, merge_gains(scores, self.beta))
        else:
            kept = topk_tokens(scores, stage.num_tokens)
            x = take_rows(x, flat_rows(x, prefix, kept))
        originals = tokens.indices[-1].gather(1, kept) if tokens.indices else kept
        if (grid := tokens.grid) is not None:
            merged = len(choices) > len(tokens.choices)
            rows = rows_after_merging(choices[-1]) if merged else rows_after_dropping(kept, scores.shape[1])
            grid = pruned_grid(grid, tokens.x[:, prefix:], x[:, prefix:], rows)
        return Tokens(x, sizes, (*tokens.indices, originals), (*tokens.scores, scores), choices, grid)

    def importance(self, tokens: Tokens, predictor: nn.Module) -> Tensor:
        """Keep scores (B, K) of the patch tokens in `tokens`."""
        scores: Tensor = predictor(tokens.x[:, self.backbone.num_prefix_tokens :])
        return scores

    @torch.no_grad()
    def _compared_by(self, stage: Stage, patches: Tensor) -> Tensor:
        """What patch tokens (B, K, C) are compared by at a stage, (B, K, D)."""
        return self.backbone.keys(stage.block, patches) if self.similarity == "keys" else patches

    def _head(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Normed tokens (B, P + K, C), logits and the sizes (B, K) of patch tokens."""
        sizes = None if tokens.sizes is None else tokens.sizes[:, self.backbone.num_prefix_tokens :]
        x = self.backbone.norm(tokens.x)
        return x, self.backbone.head(x, sizes=sizes), sizes

    def forward_masked(self, images: Tensor, decide: Decide | None = None) -> MaskedOutput:
        """The training pass: all tokens are there, pruned ones are hidden from the others (DynamicViT section 3.3).

        Example:
            from vitprune.tokens.masking import gumbel_decision

            logits = sparse.forward_masked(images, lambda log_pi, kept, stage: gumbel_decision(log_pi)).logits

        Args:
            images: (B, in_chans, H, W).
            decide: how to sample decisions from the predictors' probabilities, which gives these a gradient; None to
                decide as `forward` does, which gives none.

        Raises:
            UsageError: the model prunes by its attention.
        """
        if decide is None:
            self._warn_of_no_gradient()
        return self.forward_masked_from(self.backbone.embed(images), 0, decide)

    def forward_masked_from(self, x: Tensor, first_block: int, decide: Decide | None = None) -> MaskedOutput:
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
                scores = predictor(patches, kept)
                log_pi, like = log_probabilities(scores), self._compared_by(stage, patches)
                if decide is None:
                    decision = choose_masked(like, scores, stage.num_tokens, kept, self.balance)
                else:
                    decision = decide(log_pi, kept, stage)
                if sizes is not None:
                    gains = merge_gains(scores, self.beta, kept)
                    patches, sizes = merge_masked(patches, sizes, kept, decision, gains, like)
                    x = torch.cat((x[:, :prefix], patches), dim=1)
                kept = kept * decision
                bias = attention_bias(kept, prefix, sizes)
                masks.append(kept)
                log_pis.append(log_pi)
            x = backbone.block(block, x, bias, positions)
        x = backbone.norm(x)
        seen = (kept if masks else None, sizes if masks else None)
        logits, pooled = backbone.head(x, *seen), backbone.pool(x, *seen)
        return MaskedOutput(logits, pooled, backbone.token_features(x), tuple(masks), tuple(log_pis))

    def _stages_by_block(self, num_patches: int) -> dict[int, tuple[Stage, nn.Module]]:
        """Stage and predictor by block; counts are recomputed where images of another size give another grid."""
        stages = self._schedule.stages_for(num_patches, self.backbone.num_prefix_tokens)
        return {stage.block: (stage, p) for stage, p in zip(stages, self.predictors, strict=True)}

    def _warn_of_no_gradient(self) -> None:
        if not self.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if any(map(is_trained, self.predictors)):
            self.say_once(_NO_GRADIENT, stacklevel=6)

    def extra_repr(self) -> str:
        """Model and plan."""
        name = self.pretrained_cfg.get("architecture") or type(self.model).__name__
        return f"{name}: {self.plan}"


def _take_blended(model: SparseViT, _: Any) -> None:
    """A `state_dict` may be of another keep ratio of the range."""
    if model.blend is not None:
        model.blend.fill(model.model, model.keep or 1.0)
