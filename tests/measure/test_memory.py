"""Peak memory of a pass, against allocations that can be added up by hand."""

import pytest
import torch
from torch import nn

from vitprune.measure.memory import peak_memory_mib

MIB = 2**20


class Allocates(nn.Module):
    """Holds 1 MiB of weights; at its peak 8 + 4 MiB besides."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(MIB // 4))

    def forward(self, images):
        first = torch.empty(2 * MIB)  # 8 MiB
        del first
        second = torch.empty(2 * MIB)
        third = torch.empty(MIB)  # and 4
        return second, third


def test_peak_is_the_largest_sum_at_one_time():
    model, images = Allocates(), torch.zeros(MIB // 2)
    with torch.no_grad():
        assert peak_memory_mib(lambda: model(images), model, images) == pytest.approx(1 + 2 + 12, abs=0.1)


def test_peak_grows_with_the_batch_by_more_than_the_images(make_vit):
    model = make_vit(img_size=96)

    def peak(count):
        images = torch.zeros(count, 3, 96, 96)
        with torch.inference_mode():
            return peak_memory_mib(lambda: model(images), model, images)

    images_mib = 4 * 3 * 96 * 96 * 4 / MIB
    assert peak(8) - peak(4) > images_mib
    assert peak(4) == peak(4)


def test_it_says_nothing_on_stderr(capfd):
    peak_memory_mib(lambda: torch.zeros(1), nn.Identity(), torch.zeros(1))
    assert capfd.readouterr() == ("", "")
