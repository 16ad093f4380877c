"""The full grid out of what is left: nothing is lost at a stage, and afterwards each patch goes with its owner."""

import pytest
import torch

from vitprune.tokens.filling import Grid, fill_tokens, pruned_grid, rows_after_dropping, rows_after_merging
from vitprune.tokens.merging import merge_tokens
from vitprune.tokens.redundancy import choose_tokens


@pytest.fixture
def x():
    return torch.randn(2, 1 + 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def merged(x, sizes, grid, count):
    choice = choose_tokens(x[:, 1:], x[:, 1:, 0], count, balance=0.1)
    after, sizes = merge_tokens(x, sizes, choice, 1)
    return after, sizes, pruned_grid(grid, x[:, 1:], after[:, 1:], rows_after_merging(choice))


def dropped(x, grid, kept):
    after = torch.cat((x[:, :1], x[:, 1:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 8))), dim=1)
    return after, pruned_grid(grid, x[:, 1:], after[:, 1:], rows_after_dropping(kept, x.shape[1] - 1))


def test_a_new_grid_changes_nothing(x):
    assert fill_tokens(x, Grid(), 1) is x


def test_directly_after_stages_every_patch_is_what_it_was(x):
    now, sizes, grid = x, None, Grid()
    for count in (7, 4, 1):
        now, sizes, grid = merged(now, sizes, grid, count)
        assert now.shape[1] == 1 + count
        torch.testing.assert_close(fill_tokens(now, grid, 1), x)
    now, grid = x, Grid()
    for kept in ([[1, 4, 9], [0, 2, 3]], [[0, 2], [1, 2]]):
        now, grid = dropped(now, grid, torch.tensor(kept))
        torch.testing.assert_close(fill_tokens(now, grid, 1), x)


def test_a_merged_patch_takes_part_in_what_happens_to_its_owner(x):
    now, sizes, grid = merged(x, None, Grid(), 5)
    first = torch.randn_like(now)
    expected = x[:, 1:] + first[:, 1:].gather(1, grid.rows.unsqueeze(-1).expand(-1, -1, 8))
    now, sizes, grid = merged(now + first, sizes, grid, 2)
    second = torch.randn_like(now)
    expected = expected + second[:, 1:].gather(1, grid.rows.unsqueeze(-1).expand(-1, -1, 8))
    filled = fill_tokens(now + second, grid, 1)
    torch.testing.assert_close(filled[:, 1:], expected)
    assert torch.equal(filled[:, :1], (now + second)[:, :1]), "prefix tokens are nobody's"


def test_a_dropped_patch_stays_what_it_was_when_it_left(x):
    now, grid = dropped(x, Grid(), torch.tensor([[1, 4, 9], [0, 2, 3]]))
    now, grid = dropped(now + 1, grid, torch.tensor([[0, 2], [1, 2]]))
    filled = fill_tokens(now + 10, grid, 1)[:, 1:]
    expected = x[:, 1:].clone()
    expected[0, [1, 9]] += 11
    expected[0, 4] += 1
    expected[1, [2, 3]] += 11
    expected[1, 0] += 1
    torch.testing.assert_close(filled, expected)


def test_gradient_reaches_patches_and_owners(x):
    x.requires_grad_()
    now, _, grid = merged(x, None, Grid(), 5)
    scale = torch.full((), 2.0, dtype=x.dtype, requires_grad=True)
    fill_tokens(now * scale, grid, 1).square().sum().backward()
    assert scale.grad.abs() > 0
    assert (x.grad.abs().sum(-1) > 0).all()
