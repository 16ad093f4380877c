"""Random numbers that depend on what they are for."""

import random

import numpy as np
import torch

from vitprune.common.seeding import derive_seed, isolated_rng, seed_all


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002  # what transforms use


def test_near_numbers_give_unlike_seeds():
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_a_block_has_numbers_of_its_own_and_changes_no_others():
    seed_all(1)
    expected = draw()
    seed_all(1)
    with isolated_rng(3, 4):
        first = draw()
    with isolated_rng(3, 4):
        assert draw() == first
    assert draw() == expected
    assert not set(first) & set(expected)
