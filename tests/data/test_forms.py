"""The same images in eight forms have the same labels, so that every figure is the same eight times."""

from pathlib import Path

import pytest
import torch
from imagenet_forms import FORMS, IDS, write_form
from PIL import Image

from vitprune.data import ModelClasses, batches, make_loader, open_data

VAL = Path(__file__).parents[3] / "shared" / "imagenet" / "val"


def seen(spec):
    """A fingerprint of every image, and its label."""
    images = open_data(str(spec), ModelClasses(1000)).val
    images.transform = lambda image: torch.tensor([*image.size, image.resize((1, 1)).getpixel((0, 0))[1]])
    read = batches(make_loader(images, 1))
    return sorted((tuple(image[0].tolist()), int(label)) for image, label in read)


@pytest.mark.parametrize("form", FORMS)
def test_drawn_images(form, tmp_path):
    pairs = []
    for number, index in enumerate([7, 993, 0, 999, 281, 7]):
        Image.new("RGB", (40 + number, 40), (9, 9, 9)).save(tmp_path / f"{number}.jpg")
        pairs.append((tmp_path / f"{number}.jpg", index))
    write_form(form, tmp_path / "form", pairs)
    assert [(size[0] - 40, label) for size, label in seen(tmp_path / "form")] == [
        (number, index) for number, (_, index) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Images of ImageNet with their classes, and what is seen of them in class folders."""
    pairs = [(path, IDS.index(path.parent.name)) for path in sorted(VAL.glob("*/*"))[::60]]
    folder = tmp_path_factory.mktemp("real") / "usual"
    write_form("folders by WordNet id", folder, pairs)
    return pairs, seen(folder)


@pytest.mark.skipif(not VAL.is_dir(), reason="needs ../shared with ImageNet images")
@pytest.mark.parametrize("form", list(FORMS)[1:])
def test_real_images(form, real, tmp_path):
    pairs, usual = real
    write_form(form, tmp_path / "form", pairs)
    assert seen(tmp_path / "form") == usual
