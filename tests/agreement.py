"""What every adapter must hold to: the masked pass and the gathered one agree, and say something."""

import torch
from timm.models.eva import EvaBlockPostNorm
from timm.models.gemma4_vit import Gemma4Block

from vitprune.model import attach


def dense_twin(sparse):
    return attach(sparse.model, keep=1.0)


def assert_dense_is_its_own(sparse, images):
    """With nothing dropped the output is that of the model's own code, bit for bit, in every pass."""
    with torch.no_grad():
        expected, twin = sparse.model(images), dense_twin(sparse)
        assert torch.equal(twin(images), expected)
        assert torch.equal(twin.select(images).logits, expected)
        assert torch.equal(twin.forward_masked(images).logits, expected)


def assert_masked_is_gathered(sparse, images):
    """Same tokens, same answer, and not the dense model's answer."""
    with torch.no_grad():
        dense, selection, masked = sparse.model(images), sparse.select(images), sparse.forward_masked(images)
    for indices, kept in zip(selection.indices, masked.kept, strict=True):
        assert torch.equal(torch.zeros_like(kept).scatter_(1, indices, 1.0), kept)
    torch.testing.assert_close(masked.logits, selection.logits, rtol=0, atol=1e-4)
    last = selection.indices[-1].unsqueeze(-1).expand_as(selection.features)
    torch.testing.assert_close(masked.features.gather(1, last), selection.features, rtol=0, atol=1e-4)
    change = (selection.logits - dense).abs().mean() / dense.std()
    assert change > 0.02, f"dropping tokens changes the logits by {change:.1e}: the agreement says nothing"


def calm_attention(model):
    """Bring random weights' attention logits to a trained model's size.

    The gate hides a dropped token up to eps * exp(logit), and two kinds have no norm or no scale before the softmax.
    """
    for block in getattr(model, "encoder", model).blocks:
        with torch.no_grad():
            if isinstance(block, Gemma4Block):
                block.attn.q_norm.weight.mul_(block.attn.head_dim**-0.5)
            if isinstance(block, EvaBlockPostNorm):
                block.attn.qkv.weight.mul_(0.3)
