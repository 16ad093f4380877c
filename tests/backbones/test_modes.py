"""Adapters beside the usual: unfused attention, gradient checkpointing, other sizes, training mode, low precision."""

import pytest
import torch
from agreement import assert_masked_is_gathered, assert_same_in_low_precision, dense_twin
from architectures import ALL, PLAIN

from vitprune.errors import UsageError
from vitprune.model import attach

UNUSUAL = ("class token", "no class token, attention pool", "average and max", "refined, average")
ROTARY = ("EVA-02", "DINOv3", "RoPE ViT, mixed", "NaFlex, axial", "Qwen3", "Gemma 4")


@pytest.mark.parametrize("kind", [*UNUSUAL, "differential attention", "LV-ViT, skip_lam 2"])
def test_unfused_attention_agrees_too(make_sparse, make_images, kind):
    sparse = make_sparse(**ALL[kind])
    images = make_images(sparse)
    fused = sparse.forward_masked(images).logits
    for module in sparse.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert_masked_is_gathered(sparse, images)
    torch.testing.assert_close(sparse.forward_masked(images).logits, fused, rtol=0, atol=1e-4)
    assert torch.equal(dense_twin(sparse)(images), sparse.model(images))


@pytest.mark.parametrize("kind", UNUSUAL)
def test_masked_and_gathered_pass_run_in_bf16(make_sparse, make_images, kind):
    sparse = make_sparse(**ALL[kind])
    assert_same_in_low_precision(sparse, make_images(sparse))


@pytest.mark.parametrize("kind", ["class token", "one register", "parallel things", "LV-ViT, skip_lam 2"])
def test_gradient_checkpointing_changes_neither_output_nor_gradient(make_sparse, make_images, kind):
    sparse = make_sparse(**ALL[kind])
    images = make_images(sparse)

    def outcome():
        sparse.zero_grad()
        logits = sparse.forward_masked(images).logits
        logits.square().sum().backward()
        return logits.detach(), [parameter.grad for parameter in sparse.model.parameters()]

    logits, gradients = outcome()
    sparse.model.set_grad_checkpointing()
    checkpointed_logits, checkpointed_gradients = outcome()
    assert torch.equal(checkpointed_logits, logits)
    for checkpointed, plain in zip(checkpointed_gradients, gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
    assert_masked_is_gathered(sparse, images)
    assert torch.equal(dense_twin(sparse)(images), sparse.model(images))  # gradients on: timm checkpoints as well


def test_gradient_checkpointing_recomputes_every_block(make_sparse, make_images):
    sparse = make_sparse(**PLAIN)
    images = make_images(sparse)
    calls = []
    for index, block in enumerate(sparse.model.blocks):
        block.norm1.register_forward_hook(lambda *_, index=index: calls.append(index))
    sparse.model.set_grad_checkpointing()
    logits = sparse.forward_masked(images).logits
    assert calls == [0, 1, 2, 3]
    logits.sum().backward()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [(128, 96), (160, 160), (192, 224)])
def test_dynamic_image_size_is_timms_and_keeps_the_share_of_the_tokens_it_has(make_sparse, make_images, size):
    sparse = make_sparse("test_vit", keep=0.7)
    images = make_images(sparse, size=size)
    num_patches = size[0] * size[1] // 256
    with torch.no_grad():
        assert torch.equal(dense_twin(sparse)(images), sparse.model(images))
        counts = [indices.shape[1] for indices in sparse.select(images).indices]
    assert counts == [num_patches * 7**s // 10**s for s in (1, 2, 3)]
    assert_masked_is_gathered(sparse, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mask_comes_in_the_dtype_of_the_tokens(make_sparse, make_images, dtype):
    """Fused attention on a GPU refuses anything else."""
    sparse = make_sparse(**PLAIN).to(dtype)
    seen = []
    for block in sparse.model.blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("attn_mask")), with_kwargs=True)
    sparse.forward_masked(make_images(sparse))
    assert seen[0] is None
    assert [mask.dtype for mask in seen[1:]] == [dtype] * 3


@pytest.mark.parametrize("kind", ROTARY)
def test_another_image_size_than_the_positions_are_for_is_refused(make_sparse, make_images, kind):
    sparse = make_sparse(**ALL[kind])
    height, width = make_images(sparse).shape[-2:]
    with pytest.raises((UsageError, AssertionError), match=r"img_size|positions are for|doesn't match"):
        sparse(torch.randn(1, 3, 2 * height, 2 * width))


def test_timms_own_token_dropout_and_coordinate_noise_are_left_out(make_vit, make_images):
    """Teacher and student share the trunk and must see the same tokens in the same places."""
    for arguments in (PLAIN, {**ALL["DINOv3"], "rope_rescale_coords": 2.0}):
        model = make_vit(**arguments, patch_drop_rate=0.5)
        sparse, images = attach(model, 0.5, pruned="drop"), make_images(model)
        with torch.no_grad():
            expected = sparse(images)
            assert torch.equal(sparse.train()(images), expected)
            assert sparse.forward_masked(images).features.shape[1] == 36
        assert model.patch_drop is not None
        assert model.training
