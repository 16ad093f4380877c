"""What every adapter must hold to: the masked pass and the gathered one agree, and say something."""

import torch
from timm.models.eva import EvaBlockPostNorm
from timm.models.gemma4_vit import Gemma4Block
from torch import nn
from torch.nn.functional import cosine_similarity

from vitprune.model import SparseViT, attach


def dense_twin(sparse):
    return attach(sparse.model, keep=1.0)


def assert_dense_is_its_own(sparse, images):
    """With nothing pruned the output is that of the model's own code, bit for bit, in every pass."""
    with torch.no_grad():
        expected, twin = sparse.model(images), dense_twin(sparse)
        assert torch.equal(twin(images), expected)
        assert torch.equal(twin.select(images).logits, expected)
        assert torch.equal(twin.forward_masked(images).logits, expected)


def assert_masked_is_gathered(sparse, images):
    """Same tokens, same prediction, and not the dense model's answer."""
    with torch.no_grad():
        dense, selection, masked = sparse.model(images), sparse.select(images), sparse.forward_masked(images)
    for indices, kept in zip(selection.indices, masked.kept, strict=True):
        assert torch.equal(torch.zeros_like(kept).scatter_(1, indices, 1.0), kept)
    torch.testing.assert_close(masked.logits, selection.logits, rtol=0, atol=1e-4)
    last = selection.indices[-1].unsqueeze(-1).expand_as(selection.features)
    torch.testing.assert_close(masked.features.gather(1, last), selection.features, rtol=0, atol=1e-4)
    change = (selection.logits - dense).abs().mean() / dense.std()
    assert change > 0.02, f"dropping tokens changes the logits by {change:.1e}: the agreement says nothing"


class _SameTokens(nn.Module):
    """Runs a predictor, then returns what was recorded: rounding moves values, and not the choice of tokens."""

    def __init__(self, predictor, scores):
        super().__init__()
        self.predictor, self.scores = predictor, scores

    def forward(self, x, kept=None):
        assert self.predictor(x, kept).isfinite().all()
        return self.scores


def assert_same_in_low_precision(sparse, images, dtype=torch.bfloat16):
    """Both passes, under autocast and cast (which the model then is), on the tokens that fp32 keeps.

    Which tokens a tiny random model keeps hangs on the last bits, so on the processor, and is not compared.
    """
    with torch.no_grad():
        expected, selection, masked = sparse(images), sparse.select(images), sparse.forward_masked(images)
        predictors = map(_SameTokens, sparse.predictors, selection.scores)
        fixed = SparseViT(sparse.model, sparse.schedule, predictors, sparse.pruned, sparse.balance, sparse.beta).eval()
        assert sparse.balance is None, "the scores alone decide"
        kept = dict(zip(sparse.schedule.blocks, masked.kept, strict=True))

        def outputs(images):
            return [fixed(images), fixed.forward_masked(images, lambda _, before, stage: kept[stage.block]).logits]

        with torch.autocast("cpu", torch.bfloat16):
            mixed = outputs(images)
        fixed.to(dtype)
        cast = outputs(images.to(dtype))
    assert [logits.dtype for logits in cast] == [dtype] * 2
    for logits in (*mixed, *cast):
        assert cosine_similarity(logits.float(), expected).min() > 0.999


def calm_attention(model):
    """Bring random weights' attention logits to a trained model's size.

    The gate hides a pruned token up to eps * exp(logit), and two kinds have no norm or no scale before the softmax.
    """
    for block in getattr(model, "encoder", model).blocks:
        with torch.no_grad():
            if isinstance(block, Gemma4Block):
                block.attn.q_norm.weight.mul_(block.attn.head_dim**-0.5)
            if isinstance(block, EvaBlockPostNorm):
                block.attn.qkv.weight.mul_(0.3)


def assert_trained_alike(ones, others, atol=1e-3, share=0.99):
    """All but a few weights agree: AdamW makes a whole step of a gradient that is rounding alone, on any processor.

    Their losses, step by step, are the strict comparison beside this.
    """
    distances = torch.cat([(one - other).detach().abs().flatten() for one, other in zip(ones, others, strict=True)])
    far = (distances > atol).float().mean().item()
    assert far <= 1 - share, f"{far:.1%} of the weights differ by more than {atol}, up to {distances.max():.2e}"
