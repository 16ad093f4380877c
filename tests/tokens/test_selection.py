"""Top-k: which tokens, in which order, and the same by mask."""

import itertools

import pytest
import torch

from vitprune.tokens.selection import add_to_rows, flat_rows, gather_tokens, take_rows, topk_decision, topk_tokens


@pytest.fixture
def scores():
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_tokens", [1, 7, 39, 40])
def test_the_highest_scores_are_chosen_in_raster_order_and_marked_alike(scores, num_tokens):
    before = scores.clone()
    best = scores.argsort(dim=1, descending=True)[:, :num_tokens].sort(dim=1).values
    assert torch.equal(topk_tokens(scores, num_tokens), best)
    assert torch.equal(topk_decision(scores, num_tokens), torch.zeros(5, 40).scatter_(1, best, 1.0))
    assert torch.equal(scores, before)


def test_gather_takes_views_and_passes_the_gradient_to_the_chosen_tokens_only():
    x = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    indices = torch.tensor([[0, 2], [1, 3], [4, 0]])
    gathered = gather_tokens(x[:, 2:], indices)
    assert torch.equal(gathered, x[:, 2:].gather(1, indices.unsqueeze(-1).expand(-1, -1, 4)))
    gathered.sum().backward()
    assert torch.equal(x.grad[..., 0], torch.zeros(3, 7).scatter_(1, indices + 2, 1.0))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rows_of_a_sequence_are_its_prefix_and_the_patches_named(prefix):
    x = torch.randn(3, prefix + 6, 4, generator=torch.Generator().manual_seed(0))
    some, others = torch.tensor([[1, 2], [0, 5], [4, 3]]), torch.tensor([[5], [1], [2]])
    taken = take_rows(x, flat_rows(x, prefix, some, others))
    patches = torch.cat((some, others), dim=1).unsqueeze(-1).expand(-1, -1, 4)
    assert torch.equal(taken, torch.cat((x[:, :prefix], x[:, prefix:].gather(1, patches)), dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_added_to_the_rows_named_in_place_and_by_a_product(dtype):
    generator = torch.Generator().manual_seed(0)
    base, values = (torch.randn(3, count, 4, generator=generator).to(dtype) for count in (5, 7))
    rows = torch.randint(0, 5, (3, 7), generator=generator)
    expected = base.to(torch.float64, copy=True)
    for image, row in itertools.product(range(3), range(7)):
        expected[image, rows[image, row]] += values[image, row].double()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    compiled = torch.compile(add_to_rows, backend="eager", fullgraph=True)
    numbers = compiled(base[..., 0].clone(), rows, values[..., 0])
    torch.testing.assert_close(numbers, expected[..., 0].to(dtype), rtol=tolerance, atol=tolerance)
    for found in (add_to_rows(base.clone(), rows, values), compiled(base.clone(), rows, values)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=tolerance, atol=tolerance)


def test_decision_among_the_kept_is_selection_among_the_gathered(scores):
    first = topk_tokens(scores, 20)
    later = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    second = first.gather(1, topk_tokens(later.gather(1, first), 9))
    decision = topk_decision(later, 9, kept=topk_decision(scores, 20))
    assert torch.equal(decision, torch.zeros(5, 40).scatter_(1, second, 1.0))


def test_pruned_tokens_never_come_back_whatever_the_scores(scores):
    kept = topk_decision(scores, 20)
    tempting = torch.where(kept == 0, 1e30, scores)  # pruned tokens score highest
    decision = topk_decision(tempting, 10, kept)
    assert (decision <= kept).all()
    low, kept = torch.tensor([[0.0, -1e30, -1e4]]), torch.tensor([[0.0, 1.0, 1.0]])
    for count in (2, 3):  # sampled decisions may have kept fewer
        assert topk_decision(low, count, kept).tolist() == [[0, 1, 1]], "a pruned token loses even to the lowest score"


def test_equal_and_infinite_scores_still_give_the_exact_count():
    scores = torch.zeros(3, 10)
    assert (topk_decision(scores, 4).sum(1) == 4).all()
    assert [len(set(row)) for row in topk_tokens(scores, 4).tolist()] == [4, 4, 4]
    lowest = torch.full((1, 5), -torch.inf)
    lowest[0, 2] = 0
    decision = topk_decision(lowest, 2)
    assert (decision.sum(), decision[0, 2]) == (2, 1)
