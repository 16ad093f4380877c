"""Pruning by what the model itself looks at, without predictors or training."""

import pytest
import torch

from vitprune.checkpoint.sparse_file import describe, load_sparse, save
from vitprune.errors import UsageError
from vitprune.model import AttentionViT, attach, attach_as
from vitprune.model.plan import PLAN_KEY
from vitprune.schedule import Sparsity

NANO = {"img_size": 96, "num_classes": 10}  # 6 blocks, 36 patches
KINDS = {"class token": "test_vit", "average": "test_vit2", "attention pool": "test_vit3"}


def untrained(model, keep=0.5, stages=(2, 4), **more):
    return attach_as(model, Sparsity(keep, list(stages), predictor="attention", **more)).eval()


def attention_of(model, x, index):
    """What each query pays to each key in a block, mean over heads, every product written out: (B, T, T)."""
    attn = model.blocks[index].attn
    qkv = attn.qkv(model.blocks[index].norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (qkv[0] @ qkv[1].transpose(-2, -1) * attn.scale).softmax(-1).mean(1)


@pytest.fixture
def tokens(make_vit, make_images):
    """`tokens(name)`: a model, images, and the tokens that block 1 sees and gives."""

    def tokens(name):
        model = make_vit(name, **NANO)
        images = make_images(model)
        with torch.no_grad():
            before = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(images))))
            return model, images, before, model.blocks[1](before)

    return tokens


def test_importance_is_what_the_class_token_pays_in_the_block_before(tokens):
    model, images, before, _ = tokens(KINDS["class token"])
    sparse = untrained(model, pruned="drop")
    with torch.no_grad():
        expected = attention_of(model, before, 1)[:, 0, model.num_prefix_tokens :]
        selection = sparse.select(images)
    torch.testing.assert_close(selection.scores[0].exp(), expected)
    best = expected.topk(sparse.schedule.num_tokens[0], dim=1).indices.sort(1).values
    assert torch.equal(selection.indices[0], best)


def test_without_a_class_token_it_is_the_norm_and_of_an_attention_pool_what_its_query_pays(tokens):
    model, images, _, after = tokens(KINDS["average"])
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        scores = untrained(model).select(images).scores[0]
        torch.testing.assert_close(scores, after[:, prefix:].norm(dim=-1))
    model, images, _, after = tokens(KINDS["attention pool"])
    pool = model.attn_pool
    with torch.no_grad():
        x = model.norm(after)
        x = x if model.pool_include_prefix else x[:, model.num_prefix_tokens :]
        query = pool.q_norm(
            pool.q(pool.latent.expand(len(x), -1, -1)).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        )
        key = pool.kv(x).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4)[0]
        paid = (query @ pool.k_norm(key).transpose(-2, -1) * pool.scale).softmax(-1).mean(dim=(1, 2))
        scores = untrained(model).select(images).scores[0]
    torch.testing.assert_close(scores.exp(), paid[:, -36:])


def test_of_merged_tokens_it_counts_per_patch(make_vit, make_images):
    model = make_vit(**NANO)
    sparse, images = untrained(model), make_images(model)
    with torch.no_grad():
        selection = sparse.select(images)
        seen = []
        handle = model.blocks[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        sparse(images)
        handle.remove()
        # Attention as it is weighs a key by its size: softmax(q k + log size). Without that it is per patch.
        per_patch = attention_of(model, seen[0], 3)[:, 0, 1:]
    assert seen[0].shape[1] == 1 + sparse.schedule.num_tokens[0]
    torch.testing.assert_close(selection.scores[1].exp(), per_patch)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded_and_exported_without_a_weight_more(make_vit, make_images, tmp_path, kind):
    model = make_vit(KINDS[kind], **NANO)
    sparse, images = untrained(model), make_images(model)
    assert set(sparse.state_dict()) == {PLAN_KEY, *(f"model.{name}" for name in model.state_dict())}
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    loaded, metadata = load_sparse(tmp_path / "model.safetensors")
    assert (metadata.predictor, metadata.balance, metadata.beta) == ("attention", 0.1, 1.0)
    assert isinstance(loaded, AttentionViT)
    with torch.no_grad():
        expected = sparse(images)
        assert torch.equal(loaded(images), expected)
        assert not torch.allclose(expected, attach(model, keep=1.0)(images), atol=1e-3)
        program = torch.export.export(sparse, (images,))
        torch.testing.assert_close(program.module()(images), expected)
    with pytest.raises(UsageError, match="no masked pass"):
        sparse.forward_masked(images)
