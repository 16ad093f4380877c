"""Images of which only is known which are alike, for embeddings: any names, the same numbers in train and val."""

import json

import datasets
import pytest
import torch
from datasets import ClassLabel, Value
from shards import png, write_parquet, write_tar

from vitprune.data import UNLABELLED, DataOptions, ImageStream, ModelClasses, OtherTask, batches, make_loader, open_data
from vitprune.errors import DataError

GROUP = ModelClasses(192, kind="group")
"""Of a model with 192 outputs, none of which is a class."""


def folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / f"{name}.png").write_bytes(png())


def parquet(path, labels, kind):
    write_parquet(path, [png()] * len(labels), labels, kind)


def groups(images):
    """What the data calls the group of each image."""
    images.transform = lambda image: torch.zeros(1)
    read = [int(target) for _, targets in batches(make_loader(images, 2)) for target in targets]
    return [images.class_names.get(number, number) for number in read]


@pytest.mark.parametrize("names", [("ant", "bee", "fox"), ("1", "2", "10")])
def test_class_folders_of_any_names_have_one_number_in_both_parts(tmp_path, names):
    folders(tmp_path / "train", names[:2])
    folders(tmp_path / "val", names[1:])
    data = open_data(str(tmp_path), GROUP, gallery=True)
    assert data.train.class_names == data.val.class_names == dict(enumerate(sorted(names)))
    assert groups(data.train) == sorted(names[:2])
    assert groups(data.val) == sorted(names[1:])
    assert data.understood == ["groups: 3 by the names of their folders"]
    assert data.note is None


def test_the_gallery_is_the_train_part_and_nothing_is_held_out(image_folder):
    data = open_data(str(image_folder), GROUP, gallery=True)
    assert (len(data.train), len(data.val)) == (12, 6)
    assert open_data(str(image_folder), GROUP).train is None
    data = open_data(str(image_folder / "val"), GROUP, gallery=True)
    assert data.train is None
    assert len(data.val) == 6
    data = open_data(str(image_folder), ModelClasses(2), DataOptions(limit=4), gallery=True)
    assert (len(data.train), len(data.val)) == (4, 4)
    data = open_data(str(image_folder / "train"), GROUP, training=True)
    assert (len(data.train), len(data.val)) == (11, 1), "training holds a tenth out"


def test_images_without_groups_or_of_one_are_unlabelled(tmp_path):
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.png").write_bytes(png())
    folders(tmp_path / "one", ["holiday"])
    folders(tmp_path / "layout", ["images", "labels"])
    for name, count in (("loose", 1), ("one", 1), ("layout", 2)):
        data = open_data(str(tmp_path / name), GROUP)
        assert groups(data.val) == [UNLABELLED] * count
        assert not data.val.labelled
        assert not [line for line in data.understood if "groups" in line]


def test_groups_from_a_file_and_folders_together(tmp_path):
    folders(tmp_path / "train", ["ant", "fox"])
    (tmp_path / "val").mkdir()
    for name in "ab":
        (tmp_path / "val" / f"{name}.png").write_bytes(png())
    (tmp_path / "val" / "metadata.csv").write_text("file_name,label\na.png,fox\nb.png,bee\n")
    data = open_data(str(tmp_path), GROUP, training=True)
    assert groups(data.val) == ["fox", "bee"]
    assert groups(data.train) == ["ant", "fox"]
    assert data.val.class_names == {0: "ant", 1: "bee", 2: "fox"}
    assert data.understood[0] == "groups: 3 labels of 2 images from 'metadata.csv'"


@pytest.mark.parametrize(
    ("train", "val", "kind", "expected"),
    [
        (["ant", "fox"], ["fox", "bee"], Value("string"), ["fox", "bee"]),
        ([7, 300], [300, 8], Value("int64"), ["300", "8"]),
        ([0, 1], [1, 2], ClassLabel(names=["ant", "bee", "fox"]), ["bee", "fox"]),
        (["ant", "fox"], ["fox", None], Value("string"), ["fox", UNLABELLED]),
    ],
)
def test_groups_from_columns(tmp_path, train, val, kind, expected):
    for name, labels in (("train", train), ("val", val)):
        parquet(tmp_path / f"{name}-0.parquet", labels, kind)
    data = open_data(str(tmp_path), GROUP)
    assert groups(data.val) == expected
    assert data.train.class_names == data.val.class_names
    assert sorted(data.val.class_names) == list(range(len(data.val.class_names)))
    assert data.understood == [f"groups: {len(data.val.class_names)} from column 'label'"]


def test_groups_in_streams(tmp_path):
    for name, labels in (("train", [0, 1]), ("val", [0, 2])):
        parquet(tmp_path / f"{name}-0.parquet", labels, ClassLabel(names=["fox", "bee", "ant"]))
    data = open_data(str(tmp_path), GROUP, DataOptions(streaming=True))
    assert isinstance(data.val, ImageStream)
    assert groups(data.train) == ["fox", "bee"]
    assert groups(data.val) == ["fox", "ant"]
    assert data.val.class_names == {0: "ant", 1: "bee", 2: "fox"}


@pytest.mark.parametrize("labels", [[3, 4], ["ant", "fox"]])
def test_groups_in_tar_files_are_numbers(tmp_path, labels):
    write_tar(tmp_path / "val-0.tar", [{"png": png(), "json": json.dumps({"label": each}).encode()} for each in labels])
    if labels == [3, 4]:
        data = open_data(str(tmp_path), GROUP)
        assert groups(data.val) == [3, 4]
        assert data.understood == ["groups: from column 'label'"]
        return
    with pytest.raises(DataError, match="names groups, whose number is not known before"):
        open_data(str(tmp_path), GROUP)
    assert groups(open_data(str(tmp_path), GROUP, labels=False).val) == [UNLABELLED] * 2


def test_columns_that_are_no_groups(tmp_path):
    parquet(tmp_path / "val-0.parquet", [[0, 1], [2]], datasets.List(Value("int64")))
    assert groups(open_data(str(tmp_path), GROUP).val) == [UNLABELLED] * 2
    with pytest.raises(OtherTask, match="several labels an image"):
        open_data(str(tmp_path), GROUP, DataOptions(columns=(None, "label")))
    parquet(tmp_path / "val-0.parquet", [0.5, 1.0], Value("float32"))
    with pytest.raises(OtherTask, match=r"has numbers such as 0\.5, not groups"):
        open_data(str(tmp_path), GROUP)


@pytest.mark.parametrize("row", ['"tags": ["cat"]', '"age": 0.5'])
def test_files_that_are_no_groups(tmp_path, row):
    (tmp_path / "a.png").write_bytes(png())
    file = tmp_path / "metadata.jsonl"
    file.write_text('{"file_name": "a.png", ' + row + "}\n")
    assert groups(open_data(str(tmp_path), GROUP).val) == [UNLABELLED]
    with pytest.raises(OtherTask):
        open_data(str(tmp_path), GROUP, DataOptions(labels=file))


def test_groups_are_no_names_of_outputs(tmp_path):
    folders(tmp_path, ["ant", "fox"])
    assert open_data(str(tmp_path), ModelClasses(2, kind="group")).class_names(2) is None
    assert open_data(str(tmp_path), ModelClasses(2)).class_names(2) == ("ant", "fox")


def test_the_demo_has_groups():
    data = open_data("demo", GROUP)
    assert data.val.labelled
    assert data.val.kind == "group"
    assert data.train.class_names == data.val.class_names
