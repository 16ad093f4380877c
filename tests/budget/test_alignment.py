"""The alignment that is fastest here."""

import pytest
import torch

from vitprune.budget.alignment import choose_align, fastest_align
from vitprune.common.progress import SILENT
from vitprune.errors import UsageError
from vitprune.measure import Timing
from vitprune.schedule import Sparsity


def test_what_is_hardly_faster_is_not_worth_it():
    for cost, best in (
        ({1: 1.0, 8: 0.9, 16: 0.95}, 8),
        ({1: 1.0, 8: 0.995, 16: 0.999}, 1),
        ({1: 1.0, 8: 0.9, 16: 0.899}, 8),
    ):
        assert choose_align(cost) == best


def test_only_tiles_that_can_be_filled_are_measured(make_vit, monkeypatch):
    timed = []

    def benchmark(models, *args, **settings):
        timed.extend(models)
        return [Timing(name, 1, *[1.0] * 4, None, 1) for name in models]

    monkeypatch.setattr("vitprune.budget.alignment.benchmark", benchmark)
    given = make_vit(img_size=64), 1, torch.device("cpu"), "fp32", SILENT
    assert fastest_align(given[0], Sparsity(0.7), *given[1:]) in (1, 8, 16)
    assert timed == ["1", "8", "16"], "17 tokens fill no tile of 32"
    with pytest.raises(UsageError, match="stages are 99"):
        fastest_align(given[0], Sparsity(0.7, [99]), *given[1:])
