"""What the counter counts, against the paper's numbers and against arithmetic on shapes."""

import timm
import torch
from torch import nn

from vitprune.measure import count_macs, count_params
from vitprune.measure.bound import ZeroOverheadViT
from vitprune.model import attach
from vitprune.model.plan import PLAN_KEY


def make_vit():
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def test_published_macs_of_deit_small_dense_and_at_keep_07():
    """Of other sizes: see below."""
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    assert round(count_macs(model, (3, 224, 224)) / 1e9, 3) == 4.599
    sparse = attach(model, 0.7, token_schedule="geometric", pruned="drop", predictor="paper")
    assert round(count_macs(sparse, (3, 224, 224)) / 1e9, 3) == 2.981


def test_choosing_tokens_costs_little():
    """Predictors, similarity and merging, of DeiT-S at keep .7."""
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    sparse = attach(model, 0.7)
    macs, bound = (count_macs(each, (3, 224, 224)) for each in (sparse, ZeroOverheadViT(sparse)))
    assert 0.005 < 1 - bound / macs < 0.015


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


def test_macs_are_the_sum_over_shapes():
    for keep, fused in ((1.0, True), (0.7, False), (0.45, True)):
        model = make_vit()
        for block in model.blocks:
            block.attn.fused_attn = fused
        sparse = attach(model, keep, pruned="drop", predictor="paper")
        assert count_macs(sparse, (3, 48, 48)) == by_hand(sparse)


def test_counter_leaves_the_model_as_it_is():
    model = attach(make_vit(), 0.7).to(torch.bfloat16).train()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    count_macs(model, (3, 48, 48))
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    before.pop(PLAN_KEY)  # made anew for each
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, values)
    assert all(module.training for module in model.modules())


def test_macs_do_not_depend_on_device_or_surrounding_mode():
    expected = count_macs(attach(make_vit(), 0.7), (3, 48, 48))
    for mode in (torch.device("meta"), torch.inference_mode()):
        with mode:
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
