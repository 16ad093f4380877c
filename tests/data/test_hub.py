"""Hub data sets: the table part on tables made here, the network part by its errors."""

import datasets
import pytest
from PIL import Image

from vitprune.data import UNLABELLED, ModelClasses, batches, make_loader, open_data
from vitprune.data.tables import read_table
from vitprune.errors import DataError, HubError


def _table(names=("cat", "dog"), labels=(0, 1, 1)):
    images = [Image.new("L", (8, 8), 10 * index) for index in range(len(labels))]
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"img": images, "fine_label": list(labels)}, features=features)


def test_columns_are_found_by_their_kind():
    images = read_table(_table(), ModelClasses(2), "x/y")
    image, label = images[1]
    assert image.mode == "RGB"
    assert label == 1
    assert images.labels == [0, 1, 1]


def test_classes_the_model_knows_by_name_are_reordered():
    assert read_table(_table(), ModelClasses(2, ("dog", "cat")), "x/y").labels == [1, 0, 0]


def test_labels_may_be_left_out():
    assert set(read_table(_table(), None, "x/y").labels) == {UNLABELLED}


def test_class_count_that_does_not_fit_is_an_error():
    with pytest.raises(DataError, match="the model has 3 classes, but 'x/y' has 2"):
        read_table(_table(), ModelClasses(3), "x/y")


def test_table_without_images_is_an_error():
    with pytest.raises(DataError, match="no column of images, only text"):
        read_table(datasets.Dataset.from_dict({"text": ["a"]}), None, "x/y")


def test_table_can_be_read_in_worker_processes():
    images = read_table(_table(), ModelClasses(2), "x/y")
    images.transform = _size
    (_, labels), *_ = batches(make_loader(images, 3, num_workers=1))
    assert labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("spec", ["imagenet", "imagenette", "hf:nobody/nothing"])
def test_hub_out_of_reach_is_one_sentence_with_a_way_out(spec, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError(f"Couldn't reach '{args[0]}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.delenv("VITPRUNE_IMAGENET", raising=False)
    with pytest.raises(HubError, match="Hugging Face Hub") as caught:
        open_data(spec, ModelClasses(1000))
    assert "folder" in caught.value.hint


def test_gated_data_set_says_how_to_get_in(monkeypatch):
    def gated(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    monkeypatch.delenv("VITPRUNE_IMAGENET", raising=False)
    with pytest.raises(HubError, match="'ILSVRC/imagenet-1k' is gated") as caught:
        open_data("imagenet", ModelClasses(1000))
    assert "hf auth login" in caught.value.hint


def _size(image):
    import torch

    return torch.zeros(image.size)
