"""The teacher's saliency against finite differences of the paper's formula, and the loss that ranks by it."""

import pytest
import torch

from vitprune.backbones import wrap
from vitprune.model import attach
from vitprune.tasks import task_named
from vitprune.tokens.selection import gather_tokens, topk_tokens
from vitprune.training.pretraining import ranking_loss, teacher_saliency

INFLUENCE = task_named("classification").influence
TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64, "num_classes": 10}  # 16 patches
TEACHERS = {
    "class token": {"name": "vit_tiny_patch16_224", **TINY},
    "class token and registers": {"name": "vit_tiny_patch16_224", **TINY, "reg_tokens": 2},
    "average": {"name": "vit_medium_patch16_gap_256", **TINY},
    "attention pool": {"name": "vit_base_patch16_siglip_224", **TINY},
    "distilled": {"name": "deit_tiny_distilled_patch16_224", **TINY},
}
by_teacher = pytest.mark.parametrize("kind", TEACHERS)


@pytest.fixture
def teacher(kind, make_vit):
    return make_vit(**TEACHERS[kind]).double()


def saliency_of(model, images, first_block, target="gradient"):
    """The saliency from images: what comes before the first stage is the caller's business."""
    backbone = wrap(model)
    with torch.no_grad():
        x = backbone.embed(images)
        for index in range(first_block):
            x = backbone.block(index, x)
    return teacher_saliency(backbone, x, first_block, target, INFLUENCE)


def gated(query, key, value, gate):
    """The paper's A = exp(P) G / sum exp(P) G, applied to the values."""
    weight = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).exp() * gate
    return weight / weight.sum(-1, keepdim=True) @ value


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)  # (B, T, C) to (B, heads, T, C / heads)


def top_log_probability(model, images, gate, first_block):
    """log p(top class) per image, every gated sum written out; gate (B, N) in float64."""
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    batch, length, _ = x.shape
    keys = torch.cat((gate.new_ones(batch, prefix), gate), dim=1)
    self_or_key = torch.where(torch.eye(length, dtype=torch.bool), 1.0, keys[:, None, :])[:, None]
    for index, block in enumerate(model.blocks):
        count = block.attn.num_heads
        query, key, value = (heads(part, count) for part in block.attn.qkv(block.norm1(x)).chunk(3, dim=-1))
        here = self_or_key if index >= first_block else torch.ones_like(self_or_key)
        x = x + block.ls1(block.attn.proj(gated(query, key, value, here).transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if model.attn_pool is not None:
        pool = model.attn_pool
        query = heads(pool.q(pool.latent.expand(batch, -1, -1)), pool.num_heads)
        key, value = (heads(part, pool.num_heads) for part in pool.kv(x[:, prefix:]).chunk(2, dim=-1))
        x = pool.proj(gated(query, key, value, gate[:, None, None, :]).transpose(1, 2).flatten(2))
        x = (x + pool.mlp(pool.norm(x)))[:, 0]
        logits = model.head(model.fc_norm(x))
    elif hasattr(model, "head_dist"):
        logits = (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    elif model.global_pool == "avg":
        x = (x[:, prefix:] * gate[..., None]).sum(1) / gate.sum(1, keepdim=True)
        logits = model.head(model.fc_norm(x))
    else:
        logits = model.head(model.fc_norm(x[:, 0]))
    return logits.log_softmax(-1).amax(-1)


@by_teacher
@pytest.mark.parametrize("first_block", [0, 2])
def test_saliency_is_the_derivative_by_finite_differences(teacher, make_images, first_block):
    images, step = make_images(teacher), 1e-5
    saliency = saliency_of(teacher, images, first_block)
    with torch.no_grad():
        ones = torch.ones(2, 16, dtype=torch.float64)
        torch.testing.assert_close(
            top_log_probability(teacher, images, ones, first_block), teacher(images).log_softmax(-1).amax(-1)
        )
        slopes = []
        for token in range(16):
            nudge = torch.zeros_like(ones)
            nudge[:, token] = step
            above = top_log_probability(teacher, images, ones + nudge, first_block)
            below = top_log_probability(teacher, images, ones - nudge, first_block)
            slopes.append((above - below) / (2 * step))
    expected = torch.stack(slopes, dim=1).abs()
    expected = expected / expected.mean(dim=1, keepdim=True)
    assert expected.min() < 0.5 * expected.max()
    torch.testing.assert_close(saliency.double(), expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def attention_paid(model, images):
    """What the classifier reads, mean over heads and the later half of the blocks, every product written out."""
    prefix, probabilities = model.num_prefix_tokens, []
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for index, block in enumerate(model.blocks):
        query, key, _ = (heads(part, block.attn.num_heads) for part in block.attn.qkv(block.norm1(x)).chunk(3, dim=-1))
        if index >= len(model.blocks) // 2:
            probabilities.append((query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1).mean(1))
        x = block(x)
    x = model.norm(x)
    if model.attn_pool is not None:
        pool = model.attn_pool
        query = heads(pool.q(pool.latent.expand(len(x), -1, -1)), pool.num_heads)
        key, _ = (heads(part, pool.num_heads) for part in pool.kv(x[:, prefix:]).chunk(2, dim=-1))
        return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1).mean((1, 2))
    paid = torch.stack(probabilities).mean(0)  # (B, T, T)
    rows = paid[:, :1] if model.global_pool == "token" else paid
    return rows.mean(1)[:, prefix:]


@by_teacher
def test_attention_is_what_the_classifier_reads_and_both_is_the_sum(teacher, make_images):
    images = make_images(teacher)
    with torch.no_grad():
        expected = attention_paid(teacher, images)
    expected = expected / expected.mean(1, keepdim=True)
    assert expected.std() > 0.01
    gradient, attention, both = (saliency_of(teacher, images, 1, t) for t in ("gradient", "attention", "both"))
    torch.testing.assert_close(attention.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both, gradient + attention)


@by_teacher
def test_the_teacher_gets_no_gradient_and_needs_none(teacher, make_images):
    """Its weights have no gradient after it, and a frozen teacher under no_grad gives the same."""
    images = make_images(teacher)
    expected = saliency_of(teacher, images, 1)
    assert not expected.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    teacher.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(saliency_of(teacher, images, 1), expected)


@pytest.mark.parametrize(
    ("target", "first_block", "graph"),
    [("attention", 1, [False] * 4), ("gradient", 2, [False, False, True, True])],
)
def test_a_graph_is_built_where_the_gradient_needs_it(make_vit, make_images, target, first_block, graph):
    model, building = make_vit(**TEACHERS["class token"]), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: building.append(torch.is_grad_enabled()))
    saliency_of(model, make_images(model), first_block, target)
    assert building == graph


def test_saliency_survives_gradient_checkpointing(make_vit, make_images):
    model = make_vit(**TEACHERS["class token"])
    images = make_images(model)
    expected = saliency_of(model, images, 1)
    model.set_grad_checkpointing()
    torch.testing.assert_close(saliency_of(model, images, 1), expected)


@by_teacher
def test_saliency_is_finite_and_ranks_alike_in_bf16(kind, make_vit, make_images):
    model = make_vit(**TEACHERS[kind])
    images = make_images(model, count=4)
    expected = saliency_of(model, images, 1)
    with torch.autocast("cpu", torch.bfloat16):
        saliency = saliency_of(model, images, 1)
    assert saliency.isfinite().all()
    assert torch.nn.functional.cosine_similarity(saliency.float(), expected).min() > 0.8


# Ranking


def outcome(saliency, score_of, counts=(11, 7, 5)):
    """What predictors that score the tokens present by `score_of` their saliency say and keep, stage by stage."""
    every, indices = [], []
    present = torch.arange(saliency.shape[1]).expand_as(saliency)
    for count in counts:
        scores = score_of(saliency.gather(1, present))
        every.append(scores)
        present = present.gather(1, topk_tokens(scores, count))
        indices.append(present)
    return every, indices


@pytest.fixture
def saliency():
    return torch.rand(4, 16, generator=torch.Generator().manual_seed(0))


def test_ranking_loss_is_the_divergence_from_the_saliency_of_the_tokens_present(saliency):
    generator = torch.Generator().manual_seed(1)
    every, indices = outcome(saliency, lambda s: torch.randn(s.shape, generator=generator))
    expected, present = 0.0, [list(range(16)) for _ in range(4)]
    for scores, chosen in zip(every, indices, strict=True):
        lists = []
        for image in range(4):
            values = saliency[image, present[image]].double()
            share = values / values.sum()
            shares = zip(share, scores[image].double().softmax(0), strict=True)
            lists.append(sum(p * (p.log() - q.log()) for p, q in shares).item())
            present[image] = chosen[image].tolist()
        expected += sum(lists) / len(lists) / len(every)
    assert ranking_loss(every, indices, saliency).item() == pytest.approx(expected, rel=1e-5)


def test_every_predictor_gets_a_finite_gradient(saliency):
    every, indices = outcome(saliency, lambda s: s - 0.5)
    leaves = [scores.requires_grad_() for scores in every]
    ranking_loss(leaves, indices, saliency).backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("kind", ["class token", "average", "attention pool"])
def test_predictors_learn_the_teachers_ranking(kind, make_vit, make_images):
    """Some steps on one batch must bring the predictors from chance to the teacher's choice."""
    model = make_vit(**TEACHERS[kind]).requires_grad_(False)
    torch.manual_seed(0)
    sparse = attach(model, 0.6, [1, 2], token_schedule="geometric", pruned="drop")
    images = make_images(model, count=4)
    saliency = saliency_of(model, images, 1)
    best = topk_tokens(saliency, 9)
    optimizer = torch.optim.AdamW(sparse.predictors.parameters(), lr=3e-3)

    def step():
        selection = sparse.select(images)
        loss = ranking_loss(selection.scores, selection.indices, saliency)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        share = gather_tokens(torch.zeros(4, 16, 1).scatter_(1, best[..., None], 1.0), selection.indices[0]).mean()
        return loss.item(), share.item()

    history = [step() for _ in range(500)]
    assert history[-1][0] < 0.7 * history[0][0], "what is left is the uncertainty of probabilities as even as these"
    assert history[0][1] < 0.8
    assert history[-1][1] > 0.9
