"""timm's preprocessing for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import timm.data
from torch import nn

from vitprune.backbones import preprocessing
from vitprune.data.pictures import Transform

if TYPE_CHECKING:
    from vitprune.training import Augmentation


def eval_transform(model: nn.Module) -> Transform:
    """Resize, crop and normalise as the model's weights want it."""
    transform: Transform = timm.data.create_transform(**preprocessing(model))
    return transform


def train_transform(model: nn.Module, augmentation: Augmentation) -> Transform:
    """A random crop, a horizontal flip, and what else the recipe asks for, normalised as the model's weights want it.

    The teacher sees the same picture as the student, so its answer is right for it whatever the label says.
    """
    transform: Transform = timm.data.create_transform(
        **preprocessing(model),
        is_training=True,
        scale=(augmentation.crop_scale, 1.0),
        auto_augment=augmentation.auto_augment,
        color_jitter=augmentation.color_jitter or None,
        re_prob=augmentation.re_prob,
        re_mode="pixel",
    )
    return transform
