"""timm's preprocessing for a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import timm.data
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale
from torchvision.transforms.functional import center_crop

from vitprune.backbones import input_size, preprocessing
from vitprune.common.own_members import PublicSettings
from vitprune.errors import UnsupportedModelError

_LONGEST = 16
"""Sides to one: of longer images an evaluation looks at the centre alone."""


class Augmentation(PublicSettings):
    """What is done to training images, in timm's terms. Student and teacher see the same image."""

    crop_scale: float = Field(0.5, gt=0, le=1, description="smallest share of an image that a training crop shows")
    auto_augment: str | None = Field(None, description="timm's policy, such as rand-m9-mstd0.5-inc1")
    color_jitter: float = Field(0.0, ge=0)
    re_prob: float = Field(0.0, ge=0, le=1, description="probability of random erasing")
    mixup: float = Field(0.0, ge=0, description="alpha; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha; 0 is off")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that labels become class probabilities."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class Prepared:
    """timm's steps for a model, from an RGB image to a tensor (C, H, W), after what they do not do.

    With `exif` images are turned by their EXIF orientation first. With `center` the steps resize by the shorter side,
    and so keep nothing of the ends of a long image.
    """

    steps: Callable[[Any], Tensor]
    exif: bool
    center: bool

    def __call__(self, image: Image.Image) -> Tensor:
        if self.exif:
            image = ImageOps.exif_transpose(image)
        if self.center and max(image.size) > _LONGEST * min(image.size):
            # 1 x 12,000 pixels resized by the shorter side would take 2 GiB, of which the centre is used.
            size = tuple(min(side, _LONGEST * min(image.size)) for side in image.size)
            image = center_crop(image, [size[1], size[0]])
        return self.steps(image)


def eval_transform(model: nn.Module) -> Prepared:
    """Resize, crop and normalise as the model's weights want it."""
    prepared = preprocessing(model)
    exif = prepared.pop("exif")
    steps = _in_channels(model, timm.data.create_transform(**prepared))
    return Prepared(steps, exif, center=prepared["crop_mode"] == "center")


def train_transform(model: nn.Module, augmentation: Augmentation) -> Prepared:
    """A random crop, a horizontal flip, and what else the recipe asks for, normalised as the model's weights want it.

    The teacher sees the same image as the student, so its prediction is right for it whatever the label says.
    """
    prepared = preprocessing(model)
    exif = prepared.pop("exif")
    transform = timm.data.create_transform(
        **prepared,
        is_training=True,
        scale=(augmentation.crop_scale, 1.0),
        auto_augment=augmentation.auto_augment,
        color_jitter=augmentation.color_jitter or None,
        re_prob=augmentation.re_prob,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for op in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_at_least_one_bit, op.level_fn)
    return Prepared(_in_channels(model, transform), exif, center=False)  # a random crop comes before resizing


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], level: float, settings: Any) -> tuple[int]:
    # At its highest level timm keeps no bit, which Pillow 13 refuses; before, it made the image black.
    return (max(1, level_fn(level, settings)[0]),)


def _in_channels(model: nn.Module, transform: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Images come in three colours; a model of one channel sees them in grey."""
    channels, _, _ = input_size(model)
    if channels == 3:
        return transform
    if channels == 1:
        grey: Callable[[Any], Tensor] = Compose([Grayscale(), transform])
        return grey
    raise UnsupportedModelError(
        f"the model takes images of {channels} channels, images have three colours",
        "use vitprune from Python with a loader of your own: examples/train_loop.py",
    )
