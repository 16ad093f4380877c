"""timm's preprocessing for a model."""

from __future__ import annotations

import timm.data
from torch import nn

from vitprune.backbones import preprocessing
from vitprune.data.pictures import Transform


def eval_transform(model: nn.Module) -> Transform:
    """Resize, crop and normalise as the model's weights want it."""
    transform: Transform = timm.data.create_transform(**preprocessing(model))
    return transform


def train_transform(model: nn.Module, crop_scale: float) -> Transform:
    """A random crop of at least `crop_scale` of the picture's area, and a horizontal flip; nothing stronger.

    The teacher sees the same crop as the student, so its answer is right for it whatever the label says.
    """
    transform: Transform = timm.data.create_transform(
        **preprocessing(model),
        is_training=True,
        scale=(crop_scale, 1.0),
        auto_augment=None,
        color_jitter=None,
        re_prob=0.0,
    )
    return transform
