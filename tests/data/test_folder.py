"""Image folders and the errors a user meets with them."""

import os
import random
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from vitprune.data import (
    UNLABELLED,
    DataOptions,
    Faults,
    ModelClasses,
    Unreadable,
    batches,
    explain_worker_crash,
    make_loader,
    match_classes,
    open_data,
    training_loader,
)
from vitprune.data.images import ImageSet, open_image
from vitprune.data.loading import Batch
from vitprune.errors import DataError

TWO = ModelClasses(2)
WORDNET = ImageNetInfo().label_names()


def _paint(path, size=(32, 32), colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, colour, colour)).save(path)


def test_train_and_val_folders(image_folder):
    data = open_data(str(image_folder), TWO, training=True)
    assert (len(data.train), len(data.val)) == (12, 6)
    assert data.note is None
    assert data.val.labels == [0, 0, 0, 1, 1, 1]
    assert data.val.labelled
    assert open_data(str(image_folder), TWO).train is None, "eval needs no training images"


def test_class_folders_alone_hold_out_a_tenth_without_overlap(image_folder):
    root = image_folder / "train"
    data = open_data(str(root), TWO, training=True)
    train, val = set(data.train.items), set(data.val.items)
    assert len(val) == 1
    assert len(train) == 11
    assert not train & val
    assert data.note == "no separate train and val parts: 1 of 12 images held out"
    again = open_data(str(root), TWO, training=True)
    assert again.val.items == data.val.items, "the same images every time"
    assert len(open_data(str(root), TWO).val) == 12, "eval takes them all"


def test_a_part_of_imagenet_gets_imagenet_indices(tmp_path):
    for name in (WORDNET[7], WORDNET[993]):
        _paint(tmp_path / name / "a.jpg")
    data = open_data(str(tmp_path), ModelClasses(1000))
    assert data.val.labels == [7, 993]


@pytest.mark.parametrize("names", [["a", "b", "c"], WORDNET[:3]])
def test_class_count_that_does_not_fit_shows_both_sides(names):
    with pytest.raises(DataError, match=r"the model has 2 classes \(cat, dog\), but 'x' has 3 \(") as caught:
        match_classes(names, ModelClasses(2, ("cat", "dog")), "x")
    assert "need no labels" in caught.value.hint


def test_an_empty_class_folder_still_counts_and_options_of_tables_are_refused(image_folder):
    for options, words in (
        ({"streaming": True}, "is none"),
        ({"columns": ("a", "b")}, "is no table"),
        ({"splits": ("a", None)}, "no folder 'a'"),
    ):
        with pytest.raises(DataError, match=words):
            open_data(str(image_folder), TWO, DataOptions(**options))
    (image_folder / "val" / "aardvark").mkdir()
    with pytest.raises(DataError, match=r"2 classes \(cat, dog\), but .* has 3 .* lacks aardvark"):
        open_data(str(image_folder), TWO)


def test_without_labels_any_folder_will_do(tmp_path, image_folder):
    assert open_data(str(image_folder), TWO, training=True, labels=False).val.labelled, "labels that fit are kept"
    for index in range(4):
        _paint(tmp_path / "any" / "holiday" / f"{index}.JPG")
    _paint(tmp_path / "any" / "loose.png")
    data = open_data(str(tmp_path / "any"), ModelClasses(1000), training=True, labels=False)
    assert len(data.train) + len(data.val) == 5
    assert set(data.train.labels) == {UNLABELLED}
    assert not data.val.labelled


def test_what_is_no_folder_of_images_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _paint(tmp_path / "loose" / "a.png")
    (tmp_path / "empty").mkdir()
    for spec, words in (
        ("no/such/folder", "'no/such/folder' was not found"),
        ("imagenette2-of-mine", "'imagenette2-of-mine' was not found"),
        ("loose/a.png", "is a file, not a folder"),
        ("empty", "there are no images in"),
        ("loose", "not in class folders"),
    ):
        with pytest.raises(DataError, match=words):
            open_data(spec, TWO)


def test_imagenet_folder_comes_from_the_environment(image_folder, monkeypatch):
    monkeypatch.setenv("VITPRUNE_IMAGENET", str(image_folder))
    assert len(open_data("imagenet", TWO).val) == 6
    monkeypatch.setenv("VITPRUNE_IMAGENET", str(image_folder / "absent"))
    with pytest.raises(DataError, match=r"absent.* was not found"):
        open_data("imagenet", TWO)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_named(image_folder, num_workers):
    victim = image_folder / "val" / "dog" / "1.png"
    content = victim.read_bytes()
    data = open_data(str(image_folder), TWO)
    data.val.transform = _to_tensor
    for damaged in (content[: len(content) // 2], b"not an image", b""):
        victim.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read image '.*val/dog/1.png'"):
            list(batches(make_loader(data.val, 2, num_workers=num_workers)))
    victim.unlink()
    with pytest.raises(DataError, match="No such file or directory"):
        list(batches(make_loader(data.val, 2, num_workers=num_workers)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_left_out_where_that_is_allowed(image_folder, num_workers):
    for name in ("0", "1"):
        (image_folder / "val" / "cat" / f"{name}.png").write_bytes(b"not an image")
    data = open_data(str(image_folder), TWO)
    data.val.transform = _to_tensor
    faults = Faults(allowed_share=1.0)
    read = list(batches(make_loader(data.val, 2, num_workers=num_workers), faults))
    assert [labels.tolist() for _, labels in read] == [[0, 1], [1, 1]], "a batch of which nothing is left is none"
    assert (faults.count, faults.seen) == (2, 6)
    assert [name.rpartition("/")[2] for name in faults.names] == ["0.png", "1.png"]


def test_too_many_unreadable_images_are_an_error():
    faults, bad = Faults(allowed_share=0.01), Unreadable("bad.png", "truncated")
    for _ in range(10):  # as many as 1 % of a thousand
        faults.note(Batch(None, torch.empty(0), (bad,)))
    with pytest.raises(DataError, match=r"11 of 11 images .* share of 0.01; the last was 'bad.png': truncated"):
        faults.note(Batch(None, torch.empty(0), (bad,)))
    assert faults.names == ["bad.png"]


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "LA", "CMYK", "1", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.tiff"
        Image.new(mode, (8, 8)).save(path)
        assert open_image(path).mode == "RGB"


def test_sample_is_the_same_every_time_and_keeps_labels():
    images = ImageSet(range(100), list(range(100)), read=None)
    sample = images.sample(10)
    assert len(sample) == 10
    assert sample.items == sample.labels == sorted(sample.items)
    assert images.sample(10).items == sample.items
    assert images.sample(1000) is images


def test_training_loader_shuffles_by_seed_and_drops_the_short_batch(image_folder):
    data = open_data(str(image_folder), TWO, training=True)
    data.train.transform = _to_tensor

    def order(seed):
        loader = training_loader(data.train, 5, seed=seed)
        return [labels.tolist() for _, labels in islice(batches(loader), 4)]

    assert [len(batch) for batch in order(0)] == [5] * 4, "two passes, each short of a last batch of two"
    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_training_batch_depends_on_its_number_alone(image_folder, num_workers):
    """Crops too: reading can begin at any batch, with any number of workers."""
    data = open_data(str(image_folder), TWO, training=True)
    data.train.transform = _random

    def read(first, count):
        loader = training_loader(data.train, 5, seed=3, first_step=first, num_workers=num_workers)
        return [(images.flatten().tolist(), labels.tolist()) for images, labels in islice(batches(loader), count)]

    everything = read(0, 7)
    state = torch.get_rng_state()
    assert read(3, 4) == everything[3:]
    assert torch.equal(torch.get_rng_state(), state) or num_workers, "the caller's generator is left alone"
    images = [images for images, _ in everything]
    assert len({tuple(images) for images in images}) == 7, "every pass crops anew"


def _random(image):
    return torch.tensor([random.random(), float(torch.rand(())), float(np.random.rand())])  # noqa: NPY002


def _to_tensor(image):
    return torch.zeros(3, *image.size)


def _die(image):
    """Stands for what the kernel does to a worker when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_a_worker_that_dies_is_told_with_a_way_out(image_folder):
    data = open_data(str(image_folder), ModelClasses(2))
    data.val.transform = _die
    with pytest.raises(DataError, match="a process that reads images died") as caught, explain_worker_crash():
        list(batches(make_loader(data.val, 2, num_workers=1)))
    assert "--workers" in caught.value.hint
