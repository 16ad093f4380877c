"""Labels of loose images from a file, in the forms in which people have them."""

import json

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from vitprune.data import DataOptions, ModelClasses, Unlabelled, open_data
from vitprune.errors import DataError

IDS = ImageNetInfo().label_names()
IMAGENET = ModelClasses(1000)
FIVE = ModelClasses(5)
EXPECTED = {"a": 7, "b": 993, "c": 7}
"""Output index of each image."""


@pytest.fixture
def flat(tmp_path):
    """Three loose images in val/."""
    for name in EXPECTED:
        path = tmp_path / "data" / "val" / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    return tmp_path / "data"


def labels(data):
    return {path.stem: label for path, label in zip(data.val.items, data.val.labels, strict=True)}


BOXES = {"a": "", "b": " 1 2 3 4", "c": f" 1 2 3 4 {IDS[7]} 5 6 7 8"}
FORMS = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"{name},{IDS[index]}{BOXES[name]}\n" for name, index in EXPECTED.items()),
    "val.txt": "".join(f"{name}.JPEG {index}\n" for name, index in EXPECTED.items()),
    "val_paths.txt": "".join(f"val/{name}.JPEG {IDS[index]}\n" for name, index in EXPECTED.items()),
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{IDS[index]}\n" for index in EXPECTED.values()),
    "val_annotations.txt": "".join(f"{name}.JPEG\t{IDS[index]}\t0\t0\t9\t9\n" for name, index in EXPECTED.items()),
    "val/metadata.csv": "file_name,label\n" + "".join(f"{n}.JPEG,{IDS[index]}\n" for n, index in EXPECTED.items()),
    "val/metadata.jsonl": "".join(
        json.dumps({"file_name": f"{n}.JPEG", "label": index, "width": 32}) + "\n" for n, index in EXPECTED.items()
    ),
    "val/labels.json": json.dumps({f"{name}.JPEG": IDS[index] for name, index in EXPECTED.items()}),
    "val.csv": "id;breed\n" + "".join(f"{name};{IDS[index]}\n" for name, index in EXPECTED.items()),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_in_or_beside_the_folder_is_found(flat, name):
    (flat / name).write_text(FORMS[name])
    data = open_data(str(flat), IMAGENET)
    assert labels(data) == EXPECTED
    assert data.how_classes.startswith(f"labels of 3 images from '{name.rpartition('/')[2]}'")
    assert labels(open_data(str(flat / "val"), IMAGENET)) == EXPECTED, "the folder of the split itself"


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_any_name_can_be_given(flat, tmp_path, name):
    file = tmp_path / f"elsewhere{name[name.rindex('.') :]}"
    file.write_text(FORMS[name])
    assert labels(open_data(str(flat), IMAGENET, DataOptions(labels=file))) == EXPECTED


def test_the_split_of_another_part_is_not_taken(flat):
    (flat / "train.txt").write_text(FORMS["val.txt"])
    with pytest.raises(Unlabelled, match="not in class folders") as caught:
        open_data(str(flat), IMAGENET)
    assert "--labels FILE" in caught.value.hint


def test_images_in_a_folder_of_their_own_are_labelled_too(flat):
    """Tiny ImageNet: val/images/ and val/val_annotations.txt."""
    (flat / "val").rename(flat / "images")
    (flat / "val").mkdir()
    (flat / "images").rename(flat / "val" / "images")
    (flat / "val" / "val_annotations.txt").write_text(FORMS["val_annotations.txt"])
    assert labels(open_data(str(flat), IMAGENET)) == EXPECTED


def test_kaggle_names_columns_and_images_without_a_row_are_left_out_aloud(flat):
    (flat / "val.csv").write_text("id,breed,colour\na,pug,red\nc,chow,red\n")
    with pytest.raises(DataError, match=r"which column of .* is the class\? breed, colour") as caught:
        open_data(str(flat), ModelClasses(2), DataOptions(labels=flat / "val.csv"))
    assert caught.value.hint == "name it: --target-key COLUMN"
    data = open_data(str(flat), ModelClasses(2), DataOptions(columns=(None, "breed"), labels=flat / "val.csv"))
    assert labels(data) == {"a": 1, "c": 0}
    assert data.left_out == "1 x image that 'val.csv' does not name"
    assert data.val.class_names == {0: "chow", 1: "pug"}


def test_numbers_are_outputs_and_those_that_count_from_1_are_refused(flat):
    numbers = flat / "val.txt"
    numbers.write_text("a.JPEG 0\nb.JPEG 4\nc.JPEG 2\n")
    assert labels(open_data(str(flat), FIVE)) == {"a": 0, "b": 4, "c": 2}
    assert open_data(str(flat), FIVE).val.class_names == {}
    numbers.write_text("a.JPEG 1\nb.JPEG 5\nc.JPEG 2\n")
    with pytest.raises(DataError, match="numbers up to 5, and the model's outputs are 0 to 4"):
        open_data(str(flat), FIVE)
    devkit = flat / "ILSVRC2012_validation_ground_truth.txt"
    devkit.write_text("490\n1000\n171\n")
    numbers.unlink()
    with pytest.raises(DataError, match="numbers up to 1000") as caught:
        open_data(str(flat), IMAGENET)
    assert "development kit have an order of their own" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a.JPEG 0\na.JPEG 1\n", "two classes: 0 and 1"),
        ("x.JPEG 0\ny.JPEG 1\n", r"no column of .* names the images in .*, such as 'y.JPEG'"),
        ("0\n1\n", "2 lines of one class each, and .* has 3 images"),
        ("a.JPEG\nb.JPEG\nc.JPEG\n", "one class each"),
        ("\n", "cannot be read: it is empty"),
        ('{"a.JPEG": [0, 1]}', "here is a list"),
        ("{", "cannot be read"),
        (f"a.JPEG,{IDS[3]} 1 2 3 4 {IDS[4]} 1 2 3 4\n", "several classes"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(flat, content, words):
    file = flat / ("file.json" if content.startswith("{") else "file.csv" if "," in content else "file.txt")
    file.write_text(content)
    with pytest.raises(DataError, match=words):
        open_data(str(flat), FIVE, DataOptions(labels=file))


def test_lines_without_names_need_images_of_one_order(flat):
    for number, name in enumerate(EXPECTED):
        (flat / "val" / f"{name}.JPEG").rename(flat / "val" / f"{9 + number}.JPEG")  # 10 before 9, or after it
    (flat / "labels.txt").write_text("0\n1\n2\n")
    with pytest.raises(DataError, match=r"order is not known: is '9.JPEG' or '10.JPEG' number 1\?"):
        open_data(str(flat), FIVE, DataOptions(labels=flat / "labels.txt"))


def test_two_files_that_differ_are_refused_with_the_choices(flat):
    (flat / "val.txt").write_text(FORMS["val.txt"])
    (flat / "val.csv").write_text(FORMS["val.csv"])
    assert labels(open_data(str(flat), IMAGENET, DataOptions(labels=flat / "val.txt"))) == EXPECTED
    with pytest.raises(DataError, match=r"'.*val.csv' and '.*val.txt' label .* differently") as caught:
        open_data(str(flat), IMAGENET)
    assert caught.value.hint.startswith("name one: --labels")


def test_a_name_that_several_images_have_labels_none(flat):
    for folder in ("one", "two"):
        (flat / "val" / folder).mkdir()
        Image.new("RGB", (32, 32)).save(flat / "val" / folder / "a.JPEG")
    (flat / "val" / "a.JPEG").unlink()
    file = flat / "any.txt"
    file.write_text(FORMS["val.txt"])
    with pytest.raises(DataError, match=r"names 'a.JPEG', and 2 images"):
        open_data(str(flat), IMAGENET, DataOptions(labels=file))


def test_train_in_class_folders_and_val_by_file(image_folder):
    for path in sorted((image_folder / "val").glob("*/*.png")):
        path.rename(image_folder / "val" / f"{path.parent.name}{path.name}")
    (image_folder / "labels").write_text("not of any use")
    file = image_folder / "val.csv"
    file.write_text("".join(f"{path.name},{path.name[:3]}\n" for path in (image_folder / "val").glob("*.png")))
    for options in (DataOptions(), DataOptions(labels=file)):
        data = open_data(str(image_folder), ModelClasses(2), options, training=True)
        assert len(data.train) == 12
        assert sorted(data.val.labels) == [0, 0, 0, 1, 1, 1]
        assert {name[:3]: label for name, label in labels(data).items()} == {"cat": 0, "dog": 1}


def test_options_that_do_nothing_are_refused(flat, image_folder):
    for options, words in (
        (DataOptions(labels=flat / "x.csv"), "x.csv' cannot be read: No such file"),
        (DataOptions(class_order="timm", labels=flat / "val.txt"), "numbers, which need no order"),
    ):
        (flat / "val.txt").write_text("a.JPEG 0\nb.JPEG 4\nc.JPEG 2\n")
        with pytest.raises(DataError, match=words):
            open_data(str(flat), FIVE, options)
    with pytest.raises(DataError, match="'demo' has its own"):
        open_data("demo", FIVE, DataOptions(labels=flat / "val.txt"))
