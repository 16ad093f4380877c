"""timm's two attention kernels: one switch for all layers, the same answers, and the faster one found."""

import pytest
import torch
from torch import nn

from vitprune.measure import attention, set_attention
from vitprune.measure.attention import choose_attention


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "beit_base_patch16_224"])
def test_both_kernels_give_the_same_answer(make_vit, make_images, name):
    small = {"embed_dim": 64, "depth": 2, "num_heads": 2} if name.startswith("beit") else {}
    model = make_vit(name, img_size=96, **small)
    images = make_images(model)
    with torch.no_grad():
        fused = model(images)
        assert set_attention(model, "unfused")
        torch.testing.assert_close(model(images), fused, rtol=0, atol=1e-4)
    assert not any(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))


def test_folding_works_with_both(make_sparse, make_images):
    sparse = make_sparse(img_size=96)
    sparse.dropped = "fold"
    images = make_images(sparse)
    with torch.no_grad():
        fused = sparse(images)
        set_attention(sparse, "unfused")
        torch.testing.assert_close(sparse(images), fused, rtol=0, atol=1e-4)


@pytest.mark.parametrize("faster", ["fused", "unfused"])
def test_auto_takes_for_all_what_is_faster_for_the_first(make_vit, monkeypatch, faster):
    def time_calls(run, num_calls, device):
        kernel = "fused" if models["dense"].blocks[0].attn.fused_attn else "unfused"
        return [1.0 if kernel == faster else 2.0]

    monkeypatch.setattr(attention, "time_calls", time_calls)
    monkeypatch.setattr(attention, "_SECONDS", 0.0)
    models = {"dense": make_vit(img_size=96), "other": make_vit(img_size=96, seed=1)}
    assert choose_attention(models, torch.zeros(1, 3, 96, 96), "auto") == faster
    for model in models.values():
        assert {block.attn.fused_attn for block in model.blocks} == {faster == "fused"}


def test_a_model_without_the_switch_is_left_alone():
    assert not set_attention(nn.Linear(2, 2), "unfused")
    assert choose_attention({"model": nn.Linear(2, 2)}, torch.zeros(1, 2), "auto") == "fused"
