"""Which class is which: by name, by any spelling of ImageNet's classes, by an order that is known, or not at all."""

import json
import unicodedata

import datasets
import pytest
import torch
from safetensors.torch import save_file
from shards import png, write_parquet, write_tar
from timm.data import ImageNetInfo

from vitprune.cli.app import run
from vitprune.data import DataOptions, ModelClasses, make_loader, match_classes, open_data
from vitprune.data.loading import batches
from vitprune.errors import DataError

INFO = ImageNetInfo("imagenet-1k")
IDS = INFO.label_names()
IMAGENET = ModelClasses(1000)
SOME = {"tench": 0, "English springer": 217, "cassette player": 482, "parachute": 701}


def folders(root, names):
    """A folder for each name with one image, darker for the earlier ones."""
    for shade, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "image.png").write_bytes(png(shade))
    return str(root)


def parquet(root, values, kind):
    write_parquet(root / "val.parquet", map(png, range(len(values))), values, kind)
    return str(root)


def tar(root, values, suffix):
    labels = [json.dumps({"label": each}) if suffix == "json" else str(each) for each in values]
    write_tar(root / "val.tar", [{"png": png(shade), suffix: label.encode()} for shade, label in enumerate(labels)])
    return str(root)


def labels_of(data):
    """Label of each image by its shade."""
    data.val.transform = lambda image: torch.tensor(image.getpixel((0, 0))[0])
    read = batches(make_loader(data.val, 4, num_workers=0))
    return {int(shade): int(label) for shades, labels in read for shade, label in zip(shades, labels, strict=True)}


def _class_label(names):
    return datasets.ClassLabel(names=list(names))


WORDS, INDICES = list(SOME), list(SOME.values())
SPELLINGS = {
    "ids": lambda root: folders(root, [IDS[i] for i in INDICES]),
    "ids and names": lambda root: folders(root, [f"{IDS[i]}-{word.replace(' ', '_')}" for word, i in SOME.items()]),
    "names": lambda root: folders(root, WORDS),
    "numbers": lambda root: folders(root, map(str, INDICES)),
    "parquet, numbered ids": lambda root: parquet(root, range(4), _class_label(IDS[i] for i in INDICES)),
    "parquet, words": lambda root: parquet(root, WORDS, datasets.Value("string")),
    "parquet, ids": lambda root: parquet(root, [IDS[i] for i in INDICES], datasets.Value("string")),
    "parquet, numbers": lambda root: parquet(root, INDICES, datasets.Value("int64")),
    "tar, cls": lambda root: tar(root, INDICES, "cls"),
    "tar, json": lambda root: tar(root, INDICES, "json"),
    "tar, json of ids": lambda root: tar(root, [IDS[i] for i in INDICES], "json"),
}


@pytest.mark.parametrize("write", SPELLINGS.values(), ids=SPELLINGS)
def test_a_part_of_imagenet_is_understood_in_any_spelling(write, tmp_path):
    data = open_data(write(tmp_path / "set"), IMAGENET)
    assert labels_of(data) == dict(enumerate(INDICES))
    assert data.how_classes


def test_classes_are_matched_by_name_where_the_model_knows_its_own():
    found = match_classes(["dog", "cat"], ModelClasses(3, ("dog", "bird", "cat")), "x")
    assert found.index == {"cat": 2, "dog": 0}
    assert not found.by_order


def test_what_looks_the_same_is_the_same_name():
    apart = unicodedata.normalize("NFD", "café")
    assert apart != "café"
    assert match_classes([apart, "bar"], ModelClasses(2, ("bar", "café")), "x").index == {apart: 1, "bar": 0}


def test_the_whole_of_imagenet_by_its_descriptions_keeps_the_data_s_order(tmp_path):
    """Two classes are called crane, as on the Hub: in a column with an order of its own that is no doubt."""
    names = [INFO.label_name_to_description(each) for each in IDS]
    names[517] = "crane2"
    data = open_data(parquet(tmp_path / "hub", [0, 134, 517, 999], _class_label(names)), IMAGENET)
    assert labels_of(data) == {0: 0, 1: 134, 2: 517, 3: 999}
    with pytest.raises(DataError, match="'crane', as several of ImageNet are called") as caught:
        match_classes(["crane", "tench"], IMAGENET, "x")
    assert "n02012849 or n03126707" in caught.value.hint


def test_an_order_that_is_no_question_is_taken_and_said(tmp_path):
    data = open_data(folders(tmp_path / "set", ["cat", "dog", "emu"]), ModelClasses(3))
    assert data.val.labels == [0, 1, 2]
    assert data.how_classes == "in the order of their names: cat, dog, emu"


@pytest.mark.parametrize(
    ("names", "timm", "torchvision"),
    [
        ([*map(str, range(1, 13))], [*map(str, range(1, 13))], sorted(map(str, range(1, 13)))),
        (["cherry", "Banana", "apple"], ["apple", "Banana", "cherry"], ["Banana", "apple", "cherry"]),
    ],
)
def test_an_order_that_is_a_question_is_asked_for(names, timm, torchvision, tmp_path):
    folder = folders(tmp_path / "set", names)
    model = ModelClasses(len(names))
    with pytest.raises(DataError, match=r"the order of the \d+ classes of .* is not known") as caught:
        open_data(folder, model)
    assert "--class-order timm or --class-order torchvision" in caught.value.hint
    for order, expected in (("timm", timm), ("torchvision", torchvision)):
        data = open_data(folder, model, DataOptions(class_order=order))
        assert data.class_names(len(names)) == tuple(expected)
        assert f"in {order}'s order" in data.how_classes


def test_ids_in_an_order_of_their_own_are_not_mixed_with_imagenets():
    model = ModelClasses(1000, tuple(reversed(IDS)))
    assert match_classes([IDS[0]], model, "x").index == {IDS[0]: 999}
    with pytest.raises(DataError, match="but 'x' has 1"):
        match_classes(["tench"], model, "x")


def test_an_order_that_is_given_wins_over_numbers_as_imagenet_has_them():
    names = [*map(str, range(1000))]
    assert match_classes(names, IMAGENET, "x").index["2"] == 2
    assert (
        match_classes(names, ModelClasses(1000, order="torchvision"), "x").index["2"] == sorted(names).index("2") != 2
    )


MAPS = {
    "lines.txt": "dog\ncat\nemu\n",
    "list.json": '["dog", "cat", "emu"]',
    "names.json": '{"cat": 1, "dog": 0, "emu": 2}',
    "indices.json": '{"1": "cat", "0": "dog", "2": "emu"}',
    "with header.csv": "name,index\ncat,1\ndog,0\nemu,2\n",
    "other way.csv": "0,dog\n1,cat\n2,emu\n",
    "column.csv": "dog\ncat\nemu\n",
}


@pytest.mark.parametrize("name", MAPS)
def test_a_class_map_says_which_output_is_which(name, tmp_path):
    folder = folders(tmp_path / "set", ["cat", "dog"])
    path = tmp_path / name
    path.write_text(MAPS[name])
    data = open_data(folder, ModelClasses(3), DataOptions(class_map=path))
    assert data.val.labels == [1, 0]
    assert f"as {name} has them" in data.how_classes


def test_a_class_map_that_does_not_fit_or_contradicts_is_refused(tmp_path):
    folder, path = folders(tmp_path / "set", ["cat", "dog"]), tmp_path / "map.txt"
    for content, model, words in (
        ("cat\n", ModelClasses(2), "names 1 classes, but the model has 2"),
        ("cat\ncat\n", ModelClasses(2), "names 1 classes"),
        ("dog\ncat\n", ModelClasses(2, ("cat", "dog")), "name the classes differently: dog, cat, not cat, dog"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            open_data(folder, model, DataOptions(class_map=path))
    with pytest.raises(DataError, match="their order is no question"):
        open_data(folder, ModelClasses(2, ("cat", "dog")), DataOptions(class_order="timm"))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        open_data(folder, ModelClasses(2), DataOptions(class_map=tmp_path / "none"))


def test_names_come_from_train_and_val_may_lack_some_and_have_no_other(tmp_path):
    folders(tmp_path / "set" / "train", ["cat", "dog", "emu"])
    folders(tmp_path / "set" / "val", ["emu", "dog"])
    data = open_data(str(tmp_path / "set"), ModelClasses(3))
    assert sorted(data.val.labels) == [1, 2]
    (tmp_path / "set" / "val" / "fox").mkdir()
    with pytest.raises(DataError, match=r"of which it lacks fox"):
        open_data(str(tmp_path / "set"), ModelClasses(3))


CLUTTER = ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "lost+found")


def test_what_file_systems_and_we_leave_is_no_class(tmp_path):
    root = tmp_path / "set"
    folders(root, ["cat", "dog", *CLUTTER])
    (root / "cat" / "._image.png").write_bytes(b"a fork of a Mac")
    (root / "cat" / "@eaDir").mkdir()
    (root / "cat" / "@eaDir" / "thumb.png").write_bytes(png(3))
    folders(root / "runs" / "deit-keep0.7", ["drawings"])
    (root / "runs" / "deit-keep0.7" / "report.json").write_text("{}")
    data = open_data(str(root), ModelClasses(2))
    assert [path.name for path in data.val.items] == ["image.png"] * 2
    assert data.val.labels == [0, 1]


@pytest.mark.parametrize("names", [["images", "labels"], ["Images", "annotations"]])
def test_parts_of_a_layout_are_no_classes(names, tmp_path):
    with pytest.raises(DataError, match="are no classes") as caught:
        open_data(folders(tmp_path / "set", names), ModelClasses(2))
    assert names[0] in caught.value.hint or names[1] in caught.value.hint


@pytest.mark.parametrize(
    ("train", "val"), [("training", "validation"), ("train", "Val"), ("Train", "dev"), ("train", "test")]
)
def test_splits_in_usual_words_whatever_their_case(train, val, tmp_path):
    root = tmp_path / "set"
    folders(root / train, ["cat", "dog"])
    folders(root / val, ["cat", "dog"])
    data = open_data(str(root), ModelClasses(2), training=True)
    assert {path.parent.parent.name for path in data.train.items} == {train}
    assert {path.parent.parent.name for path in data.val.items} == {val}
    assert data.note is None
    folders(root / "VALID", ["cat", "dog"])
    if val != "test":
        with pytest.raises(DataError, match="either may be meant") as caught:
            open_data(str(root), ModelClasses(2))
        assert "--val-split" in str(caught.value.hint)
    data = open_data(str(root), ModelClasses(2), DataOptions(splits=(None, val)))
    assert {path.parent.parent.name for path in data.val.items} == {val}


@pytest.mark.parametrize(
    ("train", "val"),
    [("train-00", "dev-00"), ("imagenet-train-000", "imagenet-VAL-000"), ("a_training", "a_validation")],
)
def test_splits_of_shards_by_a_word_in_their_names(train, val, tmp_path):
    for name, count in ((train, 3), (val, 2)):
        parquet(tmp_path / name, [0, 1, 0][:count], datasets.Value("int64"))
        (tmp_path / name / "val.parquet").rename(tmp_path / f"{name}.parquet")
    pattern = str(tmp_path / "*.parquet")
    data = open_data(pattern, ModelClasses(2), training=True)
    assert (len(data.train), len(data.val)) == (3, 2)
    (tmp_path / f"{val}.parquet").rename(tmp_path / "rest.parquet")
    with pytest.raises(DataError, match=r"'rest\.parquet' is of no split by its name"):
        open_data(pattern, ModelClasses(2))


def test_measuring_training_images_is_said(tmp_path):
    folders(tmp_path / "set" / "train", ["cat", "dog"])
    assert open_data(str(tmp_path / "set"), ModelClasses(2)).note == "these are training images: there is no val part"


def test_the_command_asks_and_says(tmp_path, make_vit, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(make_vit(num_classes=12, img_size=64).state_dict(), "w.safetensors")
    folders(tmp_path / "set", map(str, range(1, 13)))
    command = ["eval", "test_vit", "set", "--checkpoint", "w.safetensors", "--device", "cpu", "-j", "0"]
    command += ["--img-size", "64"]
    assert run(command) == 2
    assert "--class-order timm" in capsys.readouterr().err
    assert run([*command, "--class-order", "timm", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "classes: in timm's order: 1, 2, 3, ..." in err
    assert json.loads(out)["classes"][1]["name"] == "2"
