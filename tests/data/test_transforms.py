"""Training images can be augmented at any level."""

import pickle
import random

import pytest
import torch
from PIL import Image

from vitprune.data import Augmentation, train_transform
from vitprune.training.recipe import load_recipe


@pytest.mark.parametrize(
    "policy", ["rand-m10-n10-inc1", "rand-m0-n10", "original", load_recipe("paper").augmentation.auto_augment]
)
def test_every_level_of_every_policy_works(make_vit, policy):
    """timm's RandAugment may ask for an image of no bits, which Pillow refuses: one in some thousand images."""
    transform = train_transform(make_vit(), Augmentation(auto_augment=policy))
    steps = [step for step in transform.steps.transforms if hasattr(step, "ops") or hasattr(step, "policy")]
    image = Image.new("RGB", (48, 48), (200, 100, 50))
    random.seed(0)
    for step in steps:
        for op in [*getattr(step, "ops", ()), *(op for pair in getattr(step, "policy", ()) for op in pair)]:
            op.prob, op.magnitude_std = 1.0, 0.0
            for magnitude in (0, op.magnitude, 10):
                op.magnitude = magnitude
                assert op(image).size == (48, 48)
    assert steps
    assert torch.isfinite(pickle.loads(pickle.dumps(transform))(image)).all(), "worker processes receive it"
