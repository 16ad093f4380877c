"""Trainings of seconds: a nano model, twelve images."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from vitprune import Recipe, attach
from vitprune.data import ModelClasses, open_data
from vitprune.model import SparseViT
from vitprune.training.checkpoints import State
from vitprune.training.loop import train
from vitprune.training.progress import Progress, StepRecord

SHORT = {
    "pretraining_steps": 3,
    "steps": 8,
    "deployed_share": 0.5,
    "batch_size": 4,
    "num_workers": 0,
    "train_trunk": True,
    "backbone_lr_scale": 0.02,
    "rate_reference_kl": None,
}


@dataclass
class Trained:
    """What came of a training.

    Attributes:
        model: the dense one it began with.
        state: what a checkpoint after the last step holds.
    """

    student: SparseViT
    model: nn.Module
    progress: Progress
    records: list[StepRecord] = field(default_factory=list)
    state: State | None = None


@pytest.fixture
def run_training(make_vit, image_folder):
    """`run_training(model=None, *, keep=None, resume=None, stop_after=None, **what differs from SHORT)`."""

    def run_training(model=None, *, keep=None, resume=None, stop_after=None, **settings):
        recipe = Recipe(**SHORT | settings)
        model = model or make_vit(num_classes=2, img_size=64, depth=4)
        data = open_data(str(image_folder), ModelClasses(2), training=True)
        torch.manual_seed(recipe.seed)
        progress = Progress() if resume is None else Progress.restored(resume.about["progress"])
        student = attach(copy.deepcopy(model), keep, token_schedule="geometric", pruned="drop")
        trained = Trained(student, model, progress)
        teacher = attach(model, 1.0)
        steps = train(trained.student, teacher, data.train, recipe, torch.device("cpu"), progress, resume)
        for record, state, _ in steps:
            trained.records.append(record)
            if record.step == stop_after:
                trained.state = copy.deepcopy(state())  # its tensors are the student's
                steps.close()
        return trained

    return run_training


def _same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="session")
def same_weights():
    """`same_weights(one, other)`: whether two modules hold the same bits."""
    return _same_weights
