"""Merging: by hand, gathered against masked, and what it must not change."""

import pytest
import torch

from vitprune.tokens.masking import attention_bias, size_bias
from vitprune.tokens.merging import merge_gains, merge_masked, merge_tokens
from vitprune.tokens.redundancy import choose_tokens
from vitprune.tokens.selection import gather_tokens, split_tokens, topk_decision, topk_tokens


@pytest.fixture
def x():
    return torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def sizes():
    return torch.randint(1, 5, (3, 20), generator=torch.Generator().manual_seed(2)).double()


@pytest.fixture
def ones():
    return torch.ones(3, 20, dtype=torch.float64)


@pytest.fixture
def scores():
    return torch.randn(3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_split_is_top_k_and_the_rest(scores):
    kept, pruned = split_tokens(scores, 13)
    assert torch.equal(kept, topk_tokens(scores, 13))
    assert pruned.shape == (3, 7)
    for image in range(3):
        assert sorted(kept[image].tolist() + pruned[image].tolist()) == list(range(20))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_each_pruned_token_joins_its_most_similar_by_weighted_average(x, scores, sizes, beta):
    choice = choose_tokens(x, scores, 13, None)
    kept, pruned = choice.kept, choice.pruned
    tokens, new_sizes = merge_tokens(x, sizes, choice, gains=merge_gains(scores, beta))
    weights = sizes * (beta * (scores - scores.mean(1, keepdim=True))).exp()
    for image in range(3):
        groups = {token: [token] for token in kept[image].tolist()}
        for token in pruned[image].tolist():
            nearest = max(groups, key=lambda s: torch.cosine_similarity(x[image, token], x[image, s], dim=0).item())
            groups[nearest].append(token)
        for row, members in enumerate(groups.values()):
            torch.testing.assert_close(new_sizes[image, row], sizes[image, members].sum())
            weight = weights[image, members]
            mean = (x[image, members] * weight[:, None]).sum(0) / weight.sum()
            torch.testing.assert_close(tokens[image, row], mean)
    torch.testing.assert_close(new_sizes.sum(1), sizes.sum(1))


@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_tokens_stay_as_they_are(x, scores, sizes, prefix):
    choice, gains = choose_tokens(x, scores, 13, None), merge_gains(scores, 1.0)
    before = torch.randn(3, prefix, 8, dtype=torch.float64)
    ones = torch.ones(3, prefix, dtype=torch.float64)
    tokens, new_sizes = merge_tokens(
        torch.cat((before, x), dim=1), torch.cat((ones, sizes), dim=1), choice, prefix, gains
    )
    expected, expected_sizes = merge_tokens(x, sizes, choice, gains=gains)
    torch.testing.assert_close(tokens, torch.cat((before, expected), dim=1))
    torch.testing.assert_close(new_sizes, torch.cat((ones, expected_sizes), dim=1))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_masked_merging_is_gathered_merging_and_no_sizes_are_ones(x, scores, ones, beta):
    x[0, 4] = 0  # has no direction, and spoils nothing
    choice, gains = choose_tokens(x, scores, 13, None), merge_gains(scores, beta)
    kept, pruned = choice.kept, choice.pruned
    tokens, new_sizes = merge_tokens(x, None, choice, gains=gains)
    assert tokens.isfinite().all()
    assert new_sizes[0].sum() == 20
    for got, expected in zip(merge_tokens(x, ones, choice, gains=gains), (tokens, new_sizes), strict=True):
        torch.testing.assert_close(got, expected)
    masked, masked_sizes = merge_masked(x, ones, ones, topk_decision(scores, 13), gains)
    torch.testing.assert_close(gather_tokens(masked, kept), tokens)
    torch.testing.assert_close(masked_sizes.gather(1, kept), new_sizes)
    assert torch.equal(gather_tokens(masked, pruned), gather_tokens(x, pruned)), "nobody sees them: let them be"


def test_merging_where_no_token_is_kept_changes_nothing(x, ones):
    tokens, new_sizes = merge_masked(x, ones, ones, torch.zeros_like(ones))
    assert torch.equal(tokens, x)
    assert torch.equal(new_sizes, ones)


def test_tokens_pruned_before_do_not_merge_again(x, scores, ones):
    kept = topk_decision(scores, 13)
    _, sizes = merge_masked(x, ones, ones, kept)
    decision = topk_decision(-scores, 6, kept)
    _, later = merge_masked(x, sizes, kept, decision)
    torch.testing.assert_close((later * kept * decision).sum(1), ones.sum(1))


def test_gradient_reaches_merged_tokens_and_not_the_choice(x, scores, ones):
    x.requires_grad_(True)
    decision = topk_decision(scores, 13).requires_grad_(True)
    tokens, _ = merge_masked(x, ones, ones, decision)
    (tokens * decision.detach().unsqueeze(-1)).sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all(), "a pruned token is felt through the token that it joined"
    assert decision.grad is None


def test_bf16_tokens_stay_bf16_and_sizes_exact(x, scores):
    x = x.bfloat16()
    choice = choose_tokens(x, scores, 3, None)
    tokens, sizes = merge_tokens(x, torch.ones(3, 20), choice, gains=merge_gains(scores.float(), 1.0))
    assert tokens.dtype == torch.bfloat16
    assert sizes.dtype == torch.float32
    assert torch.equal(sizes.sum(1), torch.full((3,), 20.0))


def test_size_bias_weighs_a_key_as_that_many_copies():
    query, keys = torch.randn(1, 1, 4), torch.randn(1, 3, 4)
    sizes = torch.tensor([[1.0, 3.0, 2.0]])
    weights = (query @ keys.transpose(1, 2) + size_bias(sizes)[:, 0]).softmax(-1)
    copies = keys[:, [0, 1, 1, 1, 2, 2]]
    spread = (query @ copies.transpose(1, 2)).softmax(-1)[0, 0]
    torch.testing.assert_close(weights[0, 0], torch.stack((spread[0], spread[1:4].sum(), spread[4:].sum())))


def test_gate_with_sizes_counts_on_the_diagonal_too():
    kept = torch.tensor([[1.0, 0.0, 1.0]])
    sizes = torch.tensor([[2.0, 1.0, 4.0]])
    bias = attention_bias(kept, 1, sizes)[0, 0]
    gate = attention_bias(kept, 1)[0, 0]
    torch.testing.assert_close(bias - gate, torch.tensor([1.0, 2.0, 1.0, 4.0]).log().expand(4, 4))


def test_gains_are_bounded_relative_to_the_tokens_present_and_no_function_to_learn(scores):
    scores.requires_grad_(True)
    gains = merge_gains(1e4 * scores, 1.0)
    assert gains.isfinite().all()
    assert (gains > 0).all()
    assert not gains.requires_grad
    assert merge_gains(scores, 0.0) is None
    torch.testing.assert_close(merge_gains(scores + 7, 1.0), merge_gains(scores, 1.0))
    kept = topk_decision(scores.detach(), 13)
    at = split_tokens(scores.detach(), 13)[0]
    masked = merge_gains(scores, 1.0, kept).gather(1, at)
    torch.testing.assert_close(masked, merge_gains(scores.gather(1, at), 1.0))
