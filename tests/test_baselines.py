"""Ways to spend the budget without training: rankings and token merging."""

import pytest
import torch
from torch import nn

from vitprune.backbones import wrap
from vitprune.baselines import EqualPredictor, RandomPredictor, ToMeViT, merges_per_block
from vitprune.errors import UnsupportedModelError
from vitprune.measure import count_macs
from vitprune.tokens.predictor import NormPredictor

NANO = {"img_size": 96, "num_classes": 10}  # 6 blocks, 36 patches


# Rankings


def test_random_scores_are_in_a_stream_of_their_own():
    x = torch.zeros(2, 9, 4)
    torch.manual_seed(0)
    one = [RandomPredictor(3)(x) for _ in range(2)]
    assert torch.equal(one[0], one[1])
    assert not torch.equal(RandomPredictor(4)(x), one[0])
    predictor = RandomPredictor(3)
    assert not torch.equal(predictor(x), predictor(x)), "another draw for every batch"
    assert one[0].shape == (2, 9)


def test_to_an_equal_predictor_no_token_matters_more_than_another():
    assert torch.equal(EqualPredictor()(torch.randn(2, 9, 4)), torch.zeros(2, 9))


def test_the_largest_norm_scores_highest():
    x = torch.randn(2, 9, 4)
    assert torch.equal(NormPredictor()(x).argsort(1), x.norm(dim=-1).argsort(1))


# Token merging


def test_merges_are_as_many_as_asked_for_and_late_ones_rise():
    for total in (0, 1, 96, 131):
        even, late = merges_per_block(12, total), merges_per_block(12, total, late=True)
        assert sum(even) == sum(late) == total
        assert max(even) - min(even) <= 1
        assert list(late) == sorted(late) or max(late[i] - late[i + 1] for i in range(11)) <= 1
    assert merges_per_block(12, 131, late=True)[-1] > 2.5 * merges_per_block(12, 131)[-1]


def test_merging_nothing_is_the_dense_model(make_vit, make_images):
    model = make_vit(**NANO)
    images = make_images(model)
    with torch.no_grad():
        torch.testing.assert_close(ToMeViT(model, [0] * 6)(images), model(images), rtol=1e-4, atol=1e-5)


def reference_merge(x, sizes, keys, merges):
    """The paper's steps for one image, token by token."""
    first, second = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    unit = keys / keys.norm(dim=-1, keepdim=True)
    best = []
    for a in first:
        similar = [float(unit[a] @ unit[b]) for b in second]
        best.append((max(similar), a, second[similar.index(max(similar))]))
    best.sort(reverse=True)
    groups = {token: [token] for token in range(len(x))}
    for _, a, b in best[:merges]:
        groups[b].append(a)
        del groups[a]
    order = [t for t in first if t in groups] + second
    merged = [sum(x[t] * sizes[t] for t in groups[o]) / sum(sizes[t] for t in groups[o]) for o in order]
    return torch.stack(merged), torch.stack([sum(sizes[t] for t in groups[o]) for o in order])


def test_merging_follows_the_paper_token_by_token(make_vit, make_images):
    model = make_vit(**NANO).double()
    images = make_images(model, count=1)
    merges = [5, 4, 0, 6, 3, 2]
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        sizes = torch.ones(x.shape[1] - 1, dtype=torch.float64)
        for block, count in zip(model.blocks, merges, strict=True):
            attn = block.attn
            qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            bias = torch.cat((torch.ones(1), sizes)).log()
            weights = (qkv[0] @ qkv[1].transpose(-2, -1) * attn.scale + bias).softmax(-1)
            x = x + block.ls1(attn.proj((weights @ qkv[2]).transpose(1, 2).flatten(2)))
            if count:
                patches, sizes = reference_merge(x[0, 1:], sizes, qkv[1][0].mean(0)[1:], count)
                x = torch.cat((x[:, :1], patches[None]), 1)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        expected = model.forward_head(model.norm(x))
        torch.testing.assert_close(ToMeViT(model, merges)(images), expected, rtol=1e-5, atol=1e-6)


def test_merging_costs_less_and_never_merges_more_than_half(make_vit, make_images):
    model = make_vit(**NANO)
    few, many = ToMeViT(model, [2] * 6), ToMeViT(model, [1000] * 6)
    size = (3, 96, 96)
    assert count_macs(many, size) < count_macs(few, size) < count_macs(model, size)
    with torch.no_grad():
        assert many(make_images(model)).isfinite().all()


def test_average_pooling_counts_merged_tokens_by_size(make_vit):
    """Identical tokens merge without a trace."""
    model = make_vit("test_vit2", **NANO)
    nn.init.zeros_(model.pos_embed)
    images = torch.ones(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            ToMeViT(model, [9, 5, 3, 0, 0, 0, 0, 0])(images), model(images), rtol=1e-4, atol=1e-4
        )


def test_other_blocks_and_merges_for_another_depth_are_refused(make_vit):
    model = make_vit(**NANO)
    assert wrap(model).depth == 6
    with pytest.raises(ValueError, match="6 blocks"):
        ToMeViT(model, [1] * 5)
    model.blocks[0] = nn.Sequential(model.blocks[0])
    with pytest.raises(UnsupportedModelError, match="Sequential"):
        ToMeViT(model, [0] * 6)
