"""What the counter counts, against the paper's numbers and against arithmetic on shapes."""

import pytest
import timm
import torch
from torch import nn

from vitprune.measure import count_macs, count_params
from vitprune.model import attach

IMAGE = (3, 224, 224)


def make_vit():
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 8, "num_heads": 4, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def test_published_macs_of_deit_dense_and_at_keep_07():
    for size, dense_gmacs, sparse_gmacs in (("tiny", 1.254, 0.801), ("small", 4.599, 2.981), ("base", 17.564, 11.476)):
        with torch.device("meta"):
            model = timm.create_model(f"deit_{size}_patch16_224")
        assert round(count_macs(model, IMAGE) / 1e9, 3) == dense_gmacs
        assert (
            round(count_macs(attach(model, 0.7, schedule="geometric", dropped="drop"), IMAGE) / 1e9, 3) == sparse_gmacs
        )


def by_hand(model):
    """Every matrix product of a sparse ViT without biases, from its shapes alone."""
    backbone, schedule, in_chans, patch = model.backbone, model.schedule, 3, 8
    width, tokens = backbone.embed_dim, schedule.tokens_per_block()
    total = schedule.num_patches * in_chans * patch * patch * width  # patch embedding
    for patches in tokens:
        length = patches + backbone.num_prefix_tokens
        total += length * width * 3 * width  # q, k and v
        total += 2 * length * length * width  # q k^T and attention times v, all heads together
        total += length * width * width  # projection
        total += 2 * length * width * 4 * width  # MLP
    for block in schedule.blocks:
        seen = tokens[block - 1]
        total += seen * (width**2 + width * width // 2 + (width // 2) * (width // 4) + (width // 4) * 2)
    return total + width * backbone.num_classes


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.45])
@pytest.mark.parametrize("fused", [True, False])
def test_macs_are_the_sum_over_shapes(keep, fused):
    model = make_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    sparse = attach(model, keep, dropped="drop")
    assert count_macs(sparse, (3, 48, 48)) == by_hand(sparse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counter_leaves_the_model_as_it_is(dtype):
    model = attach(make_vit(), 0.7).to(dtype).train()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    count_macs(model, (3, 48, 48))
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, values)
    assert all(module.training for module in model.modules())


def test_macs_do_not_depend_on_device_or_surrounding_mode():
    expected = count_macs(attach(make_vit(), 0.7), (3, 48, 48))
    with torch.device("meta"):
        assert count_macs(attach(make_vit(), 0.7), (3, 48, 48)) == expected
    with torch.inference_mode():
        assert count_macs(attach(make_vit(), 0.7), (3, 48, 48)) == expected


class WithTable(nn.Module):
    """Keeps a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 5, bias=False)
        self.table = torch.ones(3, 2, 4)

    def forward(self, images):
        return self.linear(images + self.table)


def test_plain_tensor_attributes_may_take_part():
    assert count_macs(WithTable(), (3, 2, 4)) == 3 * 2 * 4 * 5


def test_params_include_the_predictors_and_a_shared_one_counts_once():
    layer, dense = nn.Linear(4, 4), make_vit()
    assert count_params(nn.Sequential(layer, layer)) == 20
    sparse = attach(dense, 0.7)
    assert count_params(sparse) == count_params(dense) + sum(count_params(p) for p in sparse.predictors)
