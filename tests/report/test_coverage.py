"""Object coverage, against predictors that know where the object is."""

import pytest
import torch
from torch import nn

from vitprune.baselines import RandomPredictor
from vitprune.data import eval_transform, open_data
from vitprune.loading.load import load_model
from vitprune.model import SparseViT, attach
from vitprune.report import object_coverage


class _Oracle(nn.Module):
    """Scores every patch by a map (B, N) that is set from outside."""

    scores = None

    def forward(self, x, kept=None):
        score = self.scores
        if x.shape[1] != score.shape[1]:  # later stages: the tokens that are left are those of highest score
            score = score.sort(dim=1, descending=True).values[:, : x.shape[1]]
        return torch.stack((1 - score, score), dim=-1)


def test_oracle_covers_the_object_and_its_opposite_none_of_it():
    model = load_model("demo").model
    data = open_data("demo", None)
    data.val = data.val.sample(8)
    data.val.transform = eval_transform(model)
    masks = torch.stack([torch.from_numpy(data.object_mask(item)) for item in data.val.items])
    shares = masks.float().reshape(8, 12, 8, 12, 8).mean(dim=(2, 4)).reshape(8, 144)

    schedule = attach(model, keep=0.5, stages=[3]).schedule
    oracle, opposite = _Oracle(), _Oracle()
    oracle.scores, opposite.scores = shares, 1 - shares
    sparse = {
        "oracle": SparseViT(model, schedule, [oracle]),
        "opposite": SparseViT(model, schedule, [opposite]),
        "random": SparseViT(model, schedule, [RandomPredictor()]),
        "dense": model,
    }
    coverage = object_coverage(sparse, data, torch.device("cpu"))
    assert coverage == {
        "oracle": 100.0,
        "opposite": 0.0,
        "random": pytest.approx(50, abs=20),
    }
