"""Attention read from the side, against the matrix written out."""

import pytest
import torch
import torch.nn.functional as F

from vitprune.backbones import AttentionRecorder
from vitprune.errors import UnsupportedModelError


def test_attention_is_the_softmax_mean_over_heads_queries_and_calls():
    calls = [tuple(torch.randn(2, 3, 5, 4) for _ in range(3)) for _ in range(2)]
    with AttentionRecorder() as recorder:
        for query, key, value in calls:
            F.scaled_dot_product_attention(query, key, value)
    with AttentionRecorder() as other:
        F.scaled_dot_product_attention(*calls[0], scale=2.0)
    expected = (calls[0][0] @ calls[0][1].transpose(-2, -1) * 2).softmax(-1).mean((1, 2))
    torch.testing.assert_close(other.attention(), expected)
    matrices = torch.stack([(q @ k.transpose(-2, -1) / 2).softmax(-1) for q, k, _ in calls])  # (calls, B, heads, T, T)
    torch.testing.assert_close(recorder.attention(), matrices.mean((0, 2, 3)))
    torch.testing.assert_close(recorder.attention(slice(0, 1)), matrices.mean((0, 2))[:, 0])
    torch.testing.assert_close(recorder.attention().sum(-1), torch.ones(2))


def test_listening_changes_nothing_and_ends_with_the_block(make_vit, make_images):
    model = make_vit()
    images = make_images(model)
    with torch.no_grad():
        expected = model(images)
        with AttentionRecorder() as recorder:
            assert torch.equal(model(images), expected)
        model(images)
    assert len(recorder.queries) == len(model.blocks)
    assert not any(tensor.requires_grad for tensor in recorder.keys)


def test_unfused_attention_is_said(make_vit, make_images):
    model = make_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    with AttentionRecorder() as recorder:
        model(make_images(model))
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        recorder.attention()
