"""From a timm model and what is asked for to a sparse model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from vitprune.backbones import wrap
from vitprune.common.renamed import renamed
from vitprune.common.wrappers import how_wrapped, unwrapped
from vitprune.errors import UsageError
from vitprune.model.attention import AttentionViT
from vitprune.model.sparse_vit import SparseViT
from vitprune.schedule import PredictorName, Pruned, Schedule, ScheduleName, Similarity, Sparsity, schedule_for


@renamed(stages="prune_at", schedule="token_schedule", ratios="tokens_left")
def attach(
    model: nn.Module,
    keep: float | tuple[float, float] | None = None,
    prune_at: Sequence[int] | None = None,
    *,
    token_schedule: ScheduleName | None = None,
    tokens_left: Sequence[float] | None = None,
    pruned: Pruned = Sparsity.pruned,
    align: int = 1,
    balance: float | None = Sparsity.balance,
    beta: float = Sparsity.beta,
    predictor: PredictorName = Sparsity.predictor,
    similarity: Similarity = Sparsity.similarity,
) -> SparseViT:
    """Attach untrained token predictors to a timm model.

    Example:
        model = timm.create_model("deit_tiny_patch16_224").eval()
        sparse = vitprune.attach(model, keep=0.7, prune_at=[3, 6, 9])
        logits = sparse(torch.randn(1, 3, 224, 224))

    Args:
        model: a timm model of a supported family; used as it is, not copied, so training the sparse model trains it.
            In whichever mode, training or eval, it is, the sparse model is too.
        keep: share of tokens one stage keeps, in (0, 1]; None for 0.7. At 1 the model stays dense. Of a range, (0.5,
            0.9), the ratio can be set later: `sparse.keep = 0.6`.
        prune_at: blocks before which predictors act; None for the default (12 blocks: 3, 6, 9).
        token_schedule: "late" or the paper's "geometric"; None for "late".
        tokens_left: shares of the original tokens left after each stage, instead of `keep` and `token_schedule`.
        pruned: "merge" merges pruned tokens into kept ones, "drop" (the paper's) removes them.
        align: token counts in multiples of this.
        balance: how much importance counts beside redundancy; None ranks by importance alone, as the paper does.
        beta: how much importance counts when tokens are averaged.
        predictor: "light" or "paper", which learn; or "attention", the model's own, which needs no training.
        similarity: what tokens are compared by, "features" or "keys". More on all of these in `vitprune.Sparsity`.

    Returns:
        The sparse model. Its predictors know nothing yet: train it, or use `vitprune.sparsify`.

    Raises:
        UnsupportedModelError: the model's tokens cannot be pruned.
        UsageError: no model, a sparse, compiled or otherwise wrapped one, or `tokens_left` beside `keep` or
            `token_schedule`; and see `vitprune.Sparsity` and `vitprune.make_schedule`.
    """
    for name, value in (("keep", keep), ("token_schedule", token_schedule)):
        if value is not None and tokens_left is not None:
            raise UsageError(f"{name} and tokens_left are mutually exclusive", "give one of them")
    how_many = Sparsity.asked(Sparsity.keep if keep is None else keep)
    token_schedule = Sparsity.token_schedule if token_schedule is None else token_schedule
    sparse = attach_as(
        model,
        Sparsity(
            prune_at=prune_at,
            token_schedule=token_schedule,
            tokens_left=tokens_left,
            pruned=pruned,
            align=align,
            balance=balance,
            beta=beta,
            predictor=predictor,
            similarity=similarity,
            **how_many,
        ),
    )
    if few := sparse.schedule.too_few:
        warnings.warn(few, UserWarning, stacklevel=3)  # past the wrapper for old names
    return sparse


def attach_as(model: nn.Module, sparsity: Sparsity) -> SparseViT:
    """As `attach`, by one object; the model remembers it."""
    inner = unwrapped(model)
    if isinstance(inner, SparseViT):
        raise UsageError("the model is sparse already", "start from the dense model, which is its .model")
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}, expected one of timm's", "timm.create_model makes it")
    if how := how_wrapped(model):
        hint = "attach first, to the model in it, and then do the same with the sparse one"
        raise UsageError(f"the {type(inner).__name__} is {how}", hint)
    return build(model, schedule_for(wrap(model), sparsity), **sparsity.selection)


def build(
    model: nn.Module,
    schedule: Schedule,
    predictor: PredictorName = Sparsity.predictor,
    pruned: Pruned = Sparsity.pruned,
    balance: float | None = Sparsity.balance,
    beta: float = Sparsity.beta,
    similarity: Similarity = Sparsity.similarity,
) -> SparseViT:
    """A sparse model with new predictors of a kind; the other arguments are those of `SparseViT`."""
    if predictor == "attention":
        return AttentionViT(model, schedule, pruned, balance, beta, similarity)
    return SparseViT(model, schedule, predictor, pruned, balance, beta, similarity)
