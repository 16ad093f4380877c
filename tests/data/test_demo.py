import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform
from torch.utils.data import DataLoader

from vitprune.data.demo import (
    ARCHITECTURE,
    CLASS_NAMES,
    IMAGE_SIZE,
    MODEL_ARGS,
    OBJECT_SHARE,
    PREPROCESSING,
    WEIGHTS,
    demo_images,
    object_mask,
)


def test_an_image_depends_on_its_split_and_index_only():
    first = demo_images("val")[7][0]
    again = demo_images("val", num_images=8)[7][0]
    assert first.mode == "RGB"
    assert first.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert first.tobytes() == again.tobytes()
    assert len({demo_images(split)[i][0].tobytes() for split in ("train", "val") for i in range(50)}) == 100


def test_classes_are_balanced():
    for split, expected in (("train", 4000), ("val", 1000)):
        images = demo_images(split)
        assert len(images) == expected
        assert tuple(images.class_names.values()) == CLASS_NAMES
        assert np.bincount(images.labels).tolist() == [expected // len(CLASS_NAMES)] * len(CLASS_NAMES)
        assert [images[i][1] for i in range(20)] == images.labels[:20]


def test_object_covers_the_stated_share():
    shares = np.array([object_mask("train", i).mean() for i in range(200)])
    # The outline's pixels round outwards.
    assert shares.min() > OBJECT_SHARE[0]
    assert shares.max() < OBJECT_SHARE[1] + 0.015
    for label in range(len(CLASS_NAMES)):
        of_class = shares[label :: len(CLASS_NAMES)]
        assert of_class.mean() == pytest.approx(np.mean(OBJECT_SHARE), abs=0.025)


def test_mask_shows_the_object():
    images = demo_images("val")
    for i in range(50):
        pixels = np.asarray(images.read(i)).astype(float)
        mask = object_mask("val", i)
        inside, outside = pixels[mask], pixels[~mask]
        colour = np.median(inside, axis=0)
        assert mask.shape == pixels.shape[:2]
        # One colour and noise inside, but for the edge; another one outside, but for clutter.
        assert np.mean(np.linalg.norm(inside - colour, axis=1) < 50) > 0.85
        assert np.mean(np.linalg.norm(outside - colour, axis=1) > 50) > 0.85


def test_transform_is_applied_and_the_set_pickles():
    image, label = demo_images("val", transform=lambda image: image.size)[3]
    assert image == (IMAGE_SIZE, IMAGE_SIZE)
    assert label == 3
    images = demo_images("train", num_images=5)
    copy = pickle.loads(pickle.dumps(images))
    assert len(copy) == 5
    assert copy[4][0].tobytes() == images[4][0].tobytes()


def test_shipped_model_is_small_and_knows_the_classes():
    assert WEIGHTS.stat().st_size < 5_000_000
    model = timm.create_model(ARCHITECTURE, **MODEL_ARGS).eval()
    model.load_state_dict(load_file(WEIGHTS), strict=True)
    assert len(model.blocks) == 12
    assert model.patch_embed.num_patches == 196
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    transform = create_transform(**PREPROCESSING, is_training=False)
    images, labels = next(iter(DataLoader(demo_images("val", transform=transform), batch_size=100)))
    with torch.inference_mode():
        assert (model(images).argmax(1) == labels).float().mean() > 0.97
