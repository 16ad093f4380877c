"""Selection by importance and redundancy, against its formula in float64, one token at a time."""

import pytest
import torch

from vitprune.tokens import redundancy as module
from vitprune.tokens.redundancy import choose_masked, choose_tokens, redundancy, unit_vectors

BALANCES = [None, 0.0, 0.1, 2.0]


@pytest.fixture
def x():
    return torch.randn(3, 24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def scores():
    return torch.randn(3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def by_formula(x, scores, num_tokens, balance):
    """Kept tokens and, of each other one, the kept one it belongs to: of one image, (N, C) and (N,)."""
    count, priority = len(scores), scores
    if balance is not None:
        importance = scores - scores.mean()
        priority = []
        for i in range(count):
            likeness = [cosine(x[i], x[j]) for j in range(count) if scores[j] > scores[i]]
            priority.append(balance * importance[i].item() - max(likeness, default=-torch.inf))
        priority = torch.tensor(priority)
    kept = sorted(priority.argsort(descending=True)[:num_tokens].tolist())
    others = [i for i in range(count) if i not in kept]
    return kept, {i: max(kept, key=lambda j: cosine(x[i], x[j])) for i in others}


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("num_tokens", [1, 9, 23])
def test_kept_are_the_largest_balance_times_importance_less_redundancy(x, scores, balance, num_tokens):
    choice = choose_tokens(x, scores, num_tokens, balance)
    for image in range(3):
        kept, owners = by_formula(x[image], scores[image], num_tokens, balance)
        assert choice.kept[image].tolist() == kept
        pruned = choice.pruned[image].tolist()
        assert sorted(pruned) == sorted(owners)
        assert [kept[row] for row in choice.nearest[image].tolist()] == [owners[i] for i in pruned]


def test_the_most_important_token_is_kept_even_where_all_are_alike(scores):
    x = torch.ones(3, 24, 6, dtype=torch.float64)
    for balance in (0.0, 0.1, 2.0):
        kept = choose_tokens(x, scores, 1, balance).kept
        assert torch.equal(kept, scores.argmax(dim=1, keepdim=True))


def test_of_two_tokens_alike_the_more_important_is_kept(x, scores):
    x[:, 3] = 2 * x[:, 11]
    scores[:, 3], scores[:, 11] = 1.0, 1.5
    kept = choose_tokens(x, scores, 20, 0.01).kept
    assert (kept == 11).any(dim=1).all()
    assert not (kept == 3).any()


def test_of_equal_scores_the_first_is_the_more_important_so_ties_decide_alike_everywhere(x):
    tied = torch.zeros(3, 24, dtype=torch.float64)
    falling = -torch.arange(24, dtype=torch.float64).expand(3, -1) * 1e-9
    torch.testing.assert_close(redundancy(unit_vectors(x), tied), redundancy(unit_vectors(x), falling))
    r = redundancy(unit_vectors(x), tied)
    assert torch.equal(r.isinf().nonzero()[:, 1], torch.zeros(3, dtype=torch.long)), "one has nobody above it"


@pytest.mark.parametrize("balance", BALANCES)
def test_masked_decisions_are_those_among_the_gathered_tokens(x, scores, balance):
    first = choose_tokens(x, scores, 15, balance).kept
    kept = torch.zeros_like(scores).scatter_(1, first, 1.0)
    assert torch.equal(choose_masked(x, scores, 15, torch.ones_like(scores), balance), kept)
    rows = first.unsqueeze(-1).expand(-1, -1, 6)
    second = first.gather(1, choose_tokens(x.gather(1, rows), scores.gather(1, first), 7, balance).kept)
    decision = choose_masked(x, scores, 7, kept, balance)
    assert torch.equal(decision, torch.zeros_like(scores).scatter_(1, second, 1.0))


@pytest.mark.parametrize("balance", BALANCES)
def test_in_tiles_the_choice_is_the_same_and_no_larger_matrix_is_formed(x, scores, balance, monkeypatch):
    scores[0, 5:9] = scores[0, 2]  # of equal ones the first counts as the more important
    whole = choose_tokens(x, scores, 9, balance)
    monkeypatch.setattr(module, "MAX_MATRIX", 10)
    monkeypatch.setattr(module, "_TILE", 7)
    tiled = choose_tokens(x, scores, 9, balance)
    for one, other in zip(tiled[:3], whole[:3], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(tiled.redundancy, whole.redundancy)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # where nothing is sorted
    if balance is not None:
        torch.testing.assert_close(choose_tokens(x, scores, 9, balance).redundancy, whole.redundancy)


def test_low_precision_tokens_are_compared_in_fp32_with_and_without_autocast(x, scores):
    low, scores = x.bfloat16(), scores.float()
    expected = choose_tokens(low.float(), scores, 9, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = choose_tokens(low, scores, 9, 0.1)
    for found in (mixed, choose_tokens(low, scores, 9, 0.1)):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_tokens_of_zeros_and_huge_ones_spoil_nothing(x, scores):
    x[0, 4], x[1] = 0, 1e30 * x[1]
    choice = choose_tokens(x.float(), scores.float(), 9, 0.1)
    for image in range(3):
        assert sorted(choice.kept[image].tolist() + choice.pruned[image].tolist()) == list(range(24))
    assert unit_vectors(x)[0, 4].abs().sum() == 0


def test_the_choice_gets_no_gradient(x, scores):
    x.requires_grad_(True)
    scores.requires_grad_(True)
    assert not choose_masked(x, scores, 9, torch.ones(3, 24), 0.1).requires_grad
