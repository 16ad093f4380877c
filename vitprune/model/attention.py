"""A sparse model without predictors: what the classifier looks at says which tokens matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitprune.backbones import AttentionRecorder
from vitprune.errors import UsageError
from vitprune.model.passes import Decide, MaskedOutput, Tokens
from vitprune.model.sparse_vit import SparseViT
from vitprune.schedule import PredictorName, Pruned, Schedule, Similarity, Sparsity
from vitprune.tokens.precision import at_least_fp32


class AttentionViT(SparseViT):
    """A sparse model that needs no training: importance is read off the model itself.

    It is the logarithm of what the class token pays to a token in the block before the stage, mean over heads (the
    ranking of EViT, https://arxiv.org/abs/2202.07800), per patch where tokens were merged; of models that pool by
    attention, what their query would pay to it now; else its norm.

    Args:
        model: a timm model of a supported family; used as it is, not copied.
        schedule: the plan.
        pruned: what happens to pruned tokens, see `vitprune.Sparsity`, as of the next two.
        balance: how much importance counts beside redundancy, where tokens are merged.
        beta: how much importance counts when tokens are averaged.
        similarity: what tokens are compared by, where they are merged.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        pruned: Pruned = Sparsity.pruned,
        balance: float | None = Sparsity.balance,
        beta: float = Sparsity.beta,
        similarity: Similarity = Sparsity.similarity,
    ) -> None:
        nobody = [nn.Identity() for _ in schedule.stages]
        super().__init__(model, schedule, nobody, pruned, balance, beta, similarity)
        self._recorder = AttentionRecorder()

    @property
    def predictor(self) -> PredictorName:
        """Not a kind of predictor, but "attention"."""
        return "attention"

    def run_blocks(self, *arguments: Any, **more: Any) -> Tokens:
        """As a SparseViT does, with attention recorded."""
        if self._sees_class_token:
            with self._recorder:
                tokens = super().run_blocks(*arguments, **more)
            self._recorder.forget()
            return tokens
        return super().run_blocks(*arguments, **more)

    def importance(self, tokens: Tokens, predictor: nn.Module) -> Tensor:
        """Log attention or norm, (B, K)."""
        prefix = self.backbone.num_prefix_tokens
        if self._sees_class_token:
            self._recorder.forget(but_last=1)
            paid = self._recorder.attention(slice(0, 1))[:, prefix:]
        elif self.backbone.pooling == "attention pool":
            with self._recorder:
                self.backbone.pool(self.backbone.norm(tokens.x))
            paid = self._recorder.attention()[:, -(tokens.x.shape[1] - prefix) :]
            self._recorder.forget()
        else:
            return at_least_fp32(tokens.x[:, prefix:]).square().sum(dim=-1).sqrt()
        # The recorder leaves out the size bias, so that what merged tokens are paid is per patch already.
        return paid.clamp(min=torch.finfo(paid.dtype).tiny).log()

    def forward_masked_from(self, x: Tensor, first_block: int, decide: Decide | None = None) -> MaskedOutput:
        """Not to be had: the attention of all tokens is not that of those kept.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a model that prunes by its attention has no masked pass: there is no predictor to train",
            'vitprune.attach(model, predictor="light") has some; the phase "deployed" trains the backbone alone',
        )

    def _replicate_for_data_parallel(self) -> AttentionViT:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._recorder = AttentionRecorder()  # replicas run at the same time
        return replica  # type: ignore[no-any-return]

    @property
    def _sees_class_token(self) -> bool:
        return self.backbone.pooling == "class token" and self.backbone.num_prefix_tokens > 0
