"""The demo data set, drawn on the fly: one shape of ten classes in front of clutter; and the small ViT trained on it.

Most patches show clutter only and say nothing about the class, as the background of a photograph does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitprune.data.images import ImageSet, Transform

IMAGE_SIZE = 112
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": IMAGE_SIZE,
    "patch_size": 8,
    "embed_dim": 144,
    "depth": 12,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": 10,
}
PREPROCESSING: dict[str, Any] = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
WEIGHTS = Path(__file__).with_name("demo.safetensors")
OBJECT_SHARE = (0.05, 0.16)  # least and greatest share of the image that the object covers

_Points = NDArray[np.float64]

_SUPERSAMPLING = 2
_CANVAS_SIZE = IMAGE_SIZE * _SUPERSAMPLING
_MAX_ROTATION = 30.0  # degrees
_MIN_CONTRAST = 100.0  # distance in RGB between the object and the gradient behind it
_NUM_IMAGES = {"train": 4000, "val": 1000}
_SPLIT_SEEDS = {"train": 0, "val": 1}


def _arc(start: float, stop: float, radius: float = 1.0, num_points: int = 48) -> _Points:
    angles = np.radians(np.linspace(start, stop, num_points))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> _Points:
    points = _arc(-90.0, 234.0, num_points=10)
    points[1::2] *= 0.42
    return points


def _heart() -> _Points:
    t = np.linspace(0.0, 2.0 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


def _crescent() -> _Points:
    # The circle cut away has its centre at (0.5, 0) and meets the outer one at +-60 degrees.
    return np.concatenate([_arc(60.0, 300.0), _arc(270.0, 90.0, radius=0.75**0.5) + np.array([0.5, 0.0])])


def _ring() -> _Points:
    # One polygon: round outside, in through a seam, and back round inside.
    return np.concatenate([_arc(0.0, 360.0), _arc(360.0, 0.0, radius=0.58)])


def _unit_area(points: Any) -> _Points:
    """Scale a polygon to area 1 and put the middle of its extent at the origin."""
    points = np.asarray(points, dtype=np.float64)
    x, y = points.T
    area = 0.5 * abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    middle = 0.5 * (points.min(axis=0) + points.max(axis=0))
    scaled: _Points = (points - middle) / np.sqrt(area)
    return scaled


# Outlines in image coordinates: y points down.
_OUTLINES: dict[str, _Points] = {
    name: _unit_area(points)
    for name, points in {
        "arrow": [(-3, -0.8), (0, -0.8), (0, -2.4), (3, 0), (0, 2.4), (0, 0.8), (-3, 0.8)],
        "crescent": _crescent(),
        "cross": [
            *[(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)],
            *[(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)],
        ],
        "disc": _arc(0.0, 360.0),
        "heart": _heart(),
        "hourglass": [(-1, -1.2), (1, -1.2), (0.12, 0), (1, 1.2), (-1, 1.2), (-0.12, 0)],
        "ring": _ring(),
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "star": _star(),
        "triangle": _arc(-90.0, 150.0, num_points=3),
    }.items()
}
CLASS_NAMES: tuple[str, ...] = tuple(_OUTLINES)


Split = Literal["train", "val"]


def demo_images(split: Split, num_images: int | None = None, transform: Transform | None = None) -> ImageSet:
    """Images of one object in front of clutter, with exactly balanced classes; the splits share none.

    There are 4000 for `train` and 1000 for `val` if nobody says how many. Image i is the same whatever the number.
    """
    num_images = _NUM_IMAGES[split] if num_images is None else num_images
    labels = [i % len(CLASS_NAMES) for i in range(num_images)]
    names = dict(enumerate(CLASS_NAMES))
    return ImageSet(range(num_images), labels, partial(_image, split), class_names=names, transform=transform)


def object_mask(split: Split, index: int) -> NDArray[np.bool_]:
    """Which pixels (112, 112) of an image show the object."""
    return draw(split, index)[1]


def draw(split: Split, index: int) -> tuple[Image.Image, NDArray[np.bool_]]:
    """The image of a split, as a function of its index only, and which of its pixels show the object."""
    rng = np.random.default_rng([_SPLIT_SEEDS[split], index])
    near = rng.uniform(0, 255, size=3)  # the two ends of the background's gradient
    far = near + rng.uniform(-70, 70, size=3)
    canvas = _background(rng, near, far)
    _draw_clutter(rng, canvas)
    mask = _object_mask(rng, CLASS_NAMES[index % len(CLASS_NAMES)])
    canvas.paste(_object_colour(rng, near, far), mask=mask)
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING)).astype(np.int16)
    pixels += rng.integers(-16, 17, size=pixels.shape, dtype=np.int16)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image, np.asarray(mask.reduce(_SUPERSAMPLING)) > 127


def _image(split: Split, index: int) -> Image.Image:
    return draw(split, index)[0]


def _object_colour(rng: np.random.Generator, near: _Points, far: _Points) -> tuple[int, ...]:
    """A colour that stands out from the background."""
    while True:
        colour = rng.integers(0, 256, size=3)
        if min(np.linalg.norm(colour - near), np.linalg.norm(colour - far)) >= _MIN_CONTRAST:
            return tuple(colour.tolist())


def _background(rng: np.random.Generator, near: _Points, far: _Points) -> Image.Image:
    """A gradient with cloudy texture."""
    size = 13
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, size), np.linspace(-0.5, 0.5, size))
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.7 * (x * np.cos(angle) + y * np.sin(angle))
    texture = rng.uniform(-32, 32, size=(size, size, 3))
    coarse = near + ramp[..., None] * (far - near) + texture
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    return image.resize((_CANVAS_SIZE, _CANVAS_SIZE), Image.Resampling.BILINEAR)


def _draw_clutter(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Lines, and small pieces of the outlines of all classes: locally like an object, but not one."""
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 8)):
        ends = rng.uniform(0, _CANVAS_SIZE, size=4)
        draw.line(ends.tolist(), fill=_colour(rng), width=int(rng.integers(1, 3)) * _SUPERSAMPLING)
    for _ in range(rng.integers(6, 15)):
        outline = _OUTLINES[CLASS_NAMES[rng.integers(len(CLASS_NAMES))]]
        start, length = rng.integers(len(outline)), max(3, len(outline) // 3)
        piece = np.roll(outline, -start, axis=0)[:length] - outline[start]
        points = rng.uniform(7, 16) * _SUPERSAMPLING * piece @ _rotation(rng.uniform(0, 360))
        points += rng.uniform(0, _CANVAS_SIZE, size=2)
        draw.line(points.ravel().tolist(), fill=_colour(rng), width=int(rng.integers(2, 4)) * _SUPERSAMPLING)


def _object_mask(rng: np.random.Generator, class_name: str) -> Image.Image:
    """The object on the canvas as 0 and 255: its size, rotation and place are random, and it is wholly inside."""
    area = rng.uniform(*OBJECT_SHARE) * _CANVAS_SIZE**2
    rotation = _rotation(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
    points = np.sqrt(area) * _OUTLINES[class_name] @ rotation
    lowest, highest = -points.min(axis=0), _CANVAS_SIZE - 1 - points.max(axis=0)
    points += rng.uniform(lowest, highest)
    mask = Image.new("L", (_CANVAS_SIZE, _CANVAS_SIZE))
    ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=255)
    return mask


def _rotation(degrees: float) -> _Points:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cos, sin], [-sin, cos]])


def _colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, size=3).tolist())
