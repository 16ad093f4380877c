"""Several labels an image, and numbers, from tables, files and Datasets; what does not fit is refused by name."""

import json
import re

import datasets
import pytest
import torch
from datasets import ClassLabel, List, Value
from PIL import Image
from shards import png, write_tar
from timm.data import ImageNetInfo
from torch.utils.data import Dataset

from vitprune.data import (
    UNLABELLED,
    DataOptions,
    Faults,
    ModelClasses,
    OtherTask,
    Unlabelled,
    batches,
    make_loader,
    open_data,
    open_torch,
    training_loader,
)
from vitprune.data.images import ImageSet
from vitprune.data.tables import read_table
from vitprune.errors import DataError

NAMES = ("bird", "cat", "dog")
LABELS = ModelClasses(3, NAMES, kind="labels")
NUMBERED = ModelClasses(3, kind="labels")
ONE = ModelClasses(1, kind="values")
TWO = ModelClasses(2, kind="values")
HOT = [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
"""What the three images show."""
INDICES = [[1, 2], [], [0]]
WORDS = [["cat", "dog"], [], ["bird"]]
VALUES = [[1.5, -2], [0, 3e3], [7, 0.25]]
IMAGE = datasets.Image()


def table(columns, **kinds):
    """Rows with an image and these columns."""
    length = len(next(iter(columns.values())))
    features = datasets.Features({"image": IMAGE, **kinds}) if kinds else None
    cells = {"image": [{"bytes": png(), "path": None}] * length, **columns}
    found = datasets.Dataset.from_dict(cells, features=features)
    return found if features else found.cast_column("image", IMAGE)


def read(images):
    """The targets of all images as a loader gives them."""
    images.transform = lambda image: torch.zeros(3, 2, 2)
    found = [targets for _, targets in batches(make_loader(images, 2))]
    assert all(each.dtype == torch.float32 and each.ndim == 2 for each in found)
    return torch.cat(found).tolist()


@pytest.fixture
def loose(tmp_path):
    """Three loose images, a.png to c.png."""
    root = tmp_path / "data"
    root.mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(root / f"{name}.png")
    return root


# Labels


COLUMNS = {
    "lists of numbered names": (List(ClassLabel(names=["dog", "cat", "bird"])), [[1, 0], [], [2]], LABELS),
    "lists of names": (List(Value("string")), WORDS, LABELS),
    "lists of indices": (List(Value("int64")), INDICES, NUMBERED),
    "several of one, as of objects": (List(Value("int64")), [[1, 1, 2, 2], [], [0]], NUMBERED),
    "a vector": (List(Value("int64"), length=3), HOT, LABELS),
    "a vector of any length": (List(Value("int64")), HOT, LABELS),
    "a vector of floats": (List(Value("float32")), HOT, NUMBERED),
    "truth values": (List(Value("bool")), [[bool(each) for each in row] for row in HOT], NUMBERED),
    "text": (Value("string"), ["cat dog", "", "bird"], LABELS),
    "numbers in text": (Value("string"), ["1;2", "", "0"], NUMBERED),
}


@pytest.mark.parametrize("form", COLUMNS)
@pytest.mark.parametrize("streamed", [False, True])
def test_labels_from_a_column(form, streamed):
    kind, cells, classes = COLUMNS[form]
    rows = table({"tags": cells}, tags=kind)
    images = read_table(rows.to_iterable_dataset() if streamed else rows, classes, "x/y")
    assert images.labelled
    assert images.kind == "labels"
    assert read(images) == HOT
    assert images.how_classes.startswith("3 ")
    assert "column 'tags'" in images.how_classes


@pytest.mark.parametrize("classes", [LABELS, NUMBERED])
def test_labels_from_several_columns_by_name_or_in_order(classes):
    columns = {"dog": [1, 0, 0], "bird": [0, 0, 1], "cat": [True, False, False], "weight": [1, 2, 3]}
    images = read_table(table(columns), classes, "x/y", DataOptions(columns=(None, "bird, cat,dog")))
    assert read(images) == HOT
    if classes is LABELS:
        images = read_table(table(columns), classes, "x/y", DataOptions(columns=(None, "dog,cat,bird")))
        assert read(images) == HOT
        assert images.how_classes == "3 by name from columns 'dog', 'cat', 'bird'"
    assert images.class_names == dict(enumerate(NAMES))


def test_a_column_whose_name_has_a_comma_wins():
    columns = {"bird,cat,dog": WORDS, "bird": [1, 1, 1], "cat": [1, 1, 1], "dog": [1, 1, 1]}
    images = read_table(table(columns), LABELS, "x/y", DataOptions(columns=(None, "bird,cat,dog")))
    assert read(images) == HOT


def test_labels_are_found_among_columns_or_asked_for():
    tagged = {"width": [1, 2, 3], "tags": INDICES, "caption": ["a", "b", "c"]}
    assert read(read_table(table(tagged), NUMBERED, "x/y")) == HOT
    for more, choices in (({"labels": INDICES}, "tags, labels"), ({"labels": ["0", "1", "2"]}, "tags, labels")):
        with pytest.raises(DataError, match=r"which column of 'x/y' holds the labels\? .*") as caught:
            read_table(table(tagged | more), NUMBERED, "x/y")
        assert caught.value.message.endswith(choices)
        assert caught.value.hint is not None
        assert "name it: --target-key COLUMN; or those with a 0 or 1 for each" in caught.value.hint
    boxes = {"boxes": [[1], [2], [3]], "ids": [[1], [2], [3]]}
    with pytest.raises(DataError, match="boxes, ids"):
        read_table(table(boxes), NUMBERED, "x/y")
    with pytest.raises(DataError, match="no column of labels, only image"):
        read_table(table({"image2": [1]}).remove_columns("image2"), NUMBERED, "x/y")


@pytest.mark.parametrize(
    ("cells", "classes", "words"),
    [
        (
            [["cat", "wolf"], [], []],
            LABELS,
            r"3 classes \(bird, cat, dog\), but 'x/y' has 2 \(cat, wolf\), .*lacks wolf",
        ),
        ([[0, 3], [], []], NUMBERED, "has label 3, and the model's outputs are 0 to 2"),
        ([[0, -1], [], []], NUMBERED, "outputs are 0 to 2"),
        (["0 3", "", ""], NUMBERED, "numbers up to 3, and the model's outputs are 0 to 2"),
        ([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], NUMBERED, "row 0 of 'x/y' has 2 labels of 0 or 1, and the model has 3"),
        ([[0.0, 0.5, 1.0]], NUMBERED, "row 0 of 'x/y' has 0.5 for a label, expected 0 or 1"),
        ([[0, 1], [1, 0]], ModelClasses(2, kind="labels"), r"lists such as \[0, 1\], which may be labels or a 0 or 1"),
        ([[0, 1], None], NUMBERED, "row 1 of 'x/y' has None where its labels are expected"),
        (["cat|dog", "wolf"], LABELS, "lacks wolf"),
        ([1, 2, 3], NUMBERED, "has 1, expected all labels of an image"),
        (["0 1 1", "1 1 1"], NUMBERED, "has 0 1 1, which may be labels or a 0 or 1 for each label"),
        ([["0", "1", "1"]], NUMBERED, "has 0 1 1, which may be labels"),
        ([[[0], [1]]], NUMBERED, r"has \[0\] for a label"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_labels_that_do_not_fit_are_refused(cells, classes, words, streamed):
    rows = table({"tags": cells})
    with pytest.raises(DataError, match=re.sub(r"row \d of 'x/y'", "it", words) if streamed else words):
        read(read_table(rows.to_iterable_dataset() if streamed else rows, classes, "x/y"))


def test_wrong_labels_in_a_stream_stop_it_whatever_may_be_skipped():
    rows = table({"tags": [["cat"]] * 120 + [["wolf"]]})
    images = read_table(rows.to_iterable_dataset(), LABELS, "x/y")
    images.transform = lambda image: torch.zeros(3, 2, 2)
    with pytest.raises(DataError, match=r"x/y row 120': it has label 'wolf', which is none of the model's \(bird"):
        list(batches(make_loader(images, 8), Faults(allowed_share=1.0)))


def test_two_numbers_are_a_vector_where_they_cannot_be_labels():
    two = ModelClasses(2, kind="labels")
    assert read(read_table(table({"tags": [[0, 1], [1, 1]]}), two, "x/y")) == [[0, 1], [1, 1]]
    assert read(read_table(table({"tags": [[0, 1], [1]]}), two, "x/y")) == [[1, 1], [0, 1]]


def test_a_single_label_is_0_or_1_in_a_column():
    one = ModelClasses(1, kind="labels")
    for cells in ([0, 1, 1], ["0", "1", "1"], [False, True, True]):
        images = read_table(table({"smiling": cells}), one, "x/y", DataOptions(columns=(None, "smiling")))
        assert read(images) == [[0], [1], [1]]


@pytest.mark.parametrize(
    ("cells", "names", "expected"),
    [
        (["cat|dog", "", "bird"], NAMES, HOT),
        (["cat ; dog;", "", "bird"], NAMES, HOT),
        (["cat, dog", "", "bird"], NAMES, HOT),
        (["cat dog", "", "bird"], NAMES, HOT),
        (["black cat|hot dog", "", "bird"], ("bird", "black cat", "hot dog"), HOT),
        (["Felis, a cat|dog, hot", "", "bird"], ("bird", "Felis, a cat", "dog, hot"), HOT),
        (["black cat", "", "bird"], ("bird", "black cat", "dog"), [[0, 1, 0], [0, 0, 0], [1, 0, 0]]),
    ],
)
def test_text_is_split_where_every_piece_is_a_label(cells, names, expected):
    classes = ModelClasses(3, names, kind="labels")
    assert read(read_table(table({"tags": cells}), classes, "x/y")) == expected


def test_text_that_can_be_split_in_two_ways_is_refused():
    classes = ModelClasses(3, ("black", "cat", "black cat"), kind="labels")
    with pytest.raises(DataError, match=r"may be split at nothing or blanks, and either gives labels"):
        read_table(table({"tags": ["black cat"]}), classes, "x/y")


FILES = {
    "metadata.csv": 'file_name,tags\na.png,"cat,dog"\nb.png,\nc.png,bird\n',
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"{name}.png", "tags": tags, "boxes": [[1, 2]]}) + "\n"
        for name, tags in zip("abc", WORDS, strict=True)
    ),
    "labels.json": json.dumps(dict(zip("abc", WORDS, strict=True))),
    "labels.csv": "a.png,cat|dog\nb.png,\nc.png,bird\n",
    "labels.tsv": "image\ttags\tlicence\nc\tbird\tfree\na\tcat;dog\tfree\nb\t\tfree\n",
    "labels.txt": "a.png cat dog\nb.png\nc.png bird\n",
    "annotations.csv": "a.png;cat,dog\nb.png;\nc.png;bird\n",
    "label.csv": 'file,labels\na.png,"[\'cat\', \'dog\']"\nb.png,\nc.png,"[""bird""]"\n',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("given", [False, True])
def test_labels_from_a_file(loose, tmp_path, name, given):
    file = (tmp_path if given else loose) / (f"any{name[name.rindex('.') :]}" if given else name)
    file.write_text(FILES[name])
    data = open_data(str(loose), LABELS, DataOptions(labels=file if given else None))
    assert read(data.val) == HOT
    assert not data.left_out
    (line,) = [line for line in data.understood if line.startswith("labels: 3 by name")]
    assert f"'{file.name}'" in line


def test_labels_from_columns_of_a_file(loose):
    (loose / "metadata.csv").write_text(
        "file_name,dog,cat,bird\na.png,1,True,0\nb.png,0,False,0.0\nc.png,0,False,1.0\n"
    )
    data = open_data(str(loose), LABELS, DataOptions(columns=(None, "cat,dog,bird")))
    assert read(data.val) == HOT
    assert data.understood == ["labels: 3 by name from columns 'cat', 'dog', 'bird' of 'metadata.csv'"]
    for key, words in (
        ("cat,dog", "the model has 3 labels, and target_key names 2 columns: cat, dog"),
        ("cat,dog,fox", "has no column 'fox'"),
        ("cat,dog,dog", "names column 'dog' twice"),
        ("cat,dog,file_name", r"3 classes \(bird, cat, dog\), but .*lacks file_name"),
        ("cat", r"column 'cat' of 'metadata.csv'|3 classes"),
    ):
        with pytest.raises(DataError, match=words):
            open_data(str(loose), LABELS, DataOptions(columns=(None, key)))
    (loose / "metadata.csv").write_text("file_name,dog,cat,bird\na.png,1,1,\nb.png,0,0,0\nc.png,0,0,2\n")
    with pytest.raises(DataError, match=r"'a.png' in 'metadata.csv' has '' for a label, expected 0 or 1"):
        open_data(str(loose), LABELS, DataOptions(columns=(None, "bird,cat,dog")))


def test_files_are_read_for_images_in_folders_and_two_rows_of_one_are_refused(loose):
    for part in ("train", "val"):
        (loose / part / "sub").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(loose / part / "sub" / "a.png")
    file = loose / "all.csv"
    file.write_text("path,tags\ntrain/sub/a.png,cat dog\nval/sub/a.png,bird\n")
    data = open_data(str(loose), LABELS, DataOptions(labels=file), training=True)
    assert (read(data.train), read(data.val)) == ([[0, 1, 1]], [[1, 0, 0]])
    file.write_text("path,tags\nval/sub/a.png,cat\nval/sub/a.png,dog\n")
    with pytest.raises(DataError, match=r"gives 'val/sub/a.png' two labels: cat and dog"):
        open_data(str(loose), LABELS, DataOptions(labels=file))


def test_images_that_a_file_does_not_name_are_left_out_aloud(loose):
    (loose / "labels.csv").write_text("a.png,cat|dog\nc.png,bird\n")
    data = open_data(str(loose), LABELS)
    assert read(data.val) == [HOT[0], HOT[2]]
    assert data.left_out == "1 x image that 'labels.csv' does not name"


def test_columns_named_by_wordnet_ids_are_matched_however_they_are_sorted():
    ids = ImageNetInfo().label_names()
    rows = table({name: [int(name == ids[7])] for name in reversed(ids)})
    images = read_table(
        rows, ModelClasses(1000, kind="labels"), "x/y", DataOptions(columns=(None, ",".join(ids[::-1])))
    )
    assert images.labels.nonzero().tolist() == [[0, 7]]


def test_a_class_map_names_the_labels_and_an_order_is_refused_where_it_is_given(loose, tmp_path):
    (loose / "labels.csv").write_text("a.png,cat|dog\nb.png,\nc.png,bird\n")
    (tmp_path / "names.txt").write_text("bird\ncat\ndog\n")
    assert read(open_data(str(loose), NUMBERED, DataOptions(class_map=tmp_path / "names.txt")).val) == HOT
    assert read(open_data(str(loose), NUMBERED).val) == HOT, "there is one order only"
    for cells in (HOT, INDICES):
        with pytest.raises(DataError, match="need no order"):
            read_table(table({"tags": cells}), ModelClasses(3, order="timm", kind="labels"), "x/y")


# Values


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "string"])
def test_a_value_from_a_column(kind, streamed):
    cells = ["3", "-1", "2"] if kind == "string" else [3, -1, 2]
    rows = table({"age": cells}, age=Value(kind))
    images = read_table(rows.to_iterable_dataset() if streamed else rows, ONE, "x/y")
    assert read(images) == [[3], [-1], [2]]
    assert images.how_classes == "column 'age'"
    assert images.class_names == {}


def test_values_from_columns_and_lists():
    columns = {"y": [row[1] for row in VALUES], "x": [row[0] for row in VALUES]}
    images = read_table(table(columns), TWO, "x/y", DataOptions(columns=(None, "x,y")))
    assert read(images) == VALUES
    assert images.how_classes == "columns 'x', 'y'"
    assert read(read_table(table({"pose": VALUES, "size": [1, 2, 3]}), TWO, "x/y")) == VALUES


def tar(path, values):
    """A tar file with an entry in JSON for each image."""
    write_tar(path, [{"png": png(), "json": json.dumps({"age": each, "id": "z"}).encode()} for each in values])
    return str(path)


@pytest.mark.parametrize("values", [[1, 1, 1, 1, 1, 1, 0.25], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3]])
def test_values_in_json_of_tar_files_are_not_rounded(tmp_path, values):
    """datasets takes the first rows for the kind of all, and would make 0.25 a 0."""
    for options in (DataOptions(), DataOptions(columns=(None, "age"))):
        data = open_data(tar(tmp_path / "val-0.tar", values), ONE, options)
        assert read(data.val) == [[value] for value in values]
        assert data.understood == ["values: column 'age'"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, 0.5], "the rows of .* differ in kind"),
        ([1.0] * 6 + ["x"], "first rows of .* cannot be read: could not convert string to float: 'x'"),
        ([1.0] * 6 + [None], "it has nothing in column 'age'"),
    ],
)
def test_json_in_tar_files_that_does_not_fit_is_refused(tmp_path, values, words):
    with pytest.raises(DataError, match=words):
        read(open_data(tar(tmp_path / "val-0.tar", values), ONE).val)


@pytest.mark.parametrize(
    ("columns", "classes", "words"),
    [
        ({"age": [1.0, None]}, ONE, "row 1 of 'x/y' has nothing in column 'age', expected a number"),
        ({"age": [1.0, float("nan")]}, ONE, "row 1 of 'x/y' has nan in column 'age'"),
        ({"age": [1.0, float("inf")]}, ONE, "has inf in column 'age'"),
        ({"age": [1.0, 1e300]}, ONE, r"has 1e\+300 in column 'age'"),
        ({"age": ["1", "x"]}, ONE, "row 1 of 'x/y' has 'x' in column 'age'"),
        ({"age": ["1", "1_0"]}, ONE, "has '1_0' in column 'age'"),
        ({"age": [True, False]}, ONE, "has True in column 'age'"),
        ({"pose": [[1.0, 2.0], [1.0]]}, TWO, r"row 1 of 'x/y' has 1 value\(s\), and the model gives 2"),
        ({"age": [1.0, 2.0]}, TWO, r"row 0 of 'x/y' has 1 value\(s\), and the model gives 2"),
        ({"age": [1.0], "name": ["a"], "size": [2.0]}, ONE, r"which column of 'x/y' holds the values\? age, size"),
        ({"x": [1.0], "y": [2.0]}, TWO, r"holds the values\? x, y"),
        ({"age": ["1", ""], "name": ["a", "b"]}, ONE, "row 1 of 'x/y' has nothing in column 'age'"),
        ({"name": ["a"], "size": ["b"]}, ONE, r"holds the values\? name, size"),
    ],
)
def test_values_that_do_not_fit_are_refused(columns, classes, words):
    with pytest.raises(DataError, match=words):
        read_table(table(columns), classes, "x/y")


def test_a_missing_value_in_a_stream_stops_it_whatever_may_be_skipped():
    images = read_table(table({"age": [1.0, None]}).to_iterable_dataset(), ONE, "x/y")
    images.transform = lambda image: torch.zeros(3, 2, 2)
    with pytest.raises(DataError, match="x/y row 1': it has nothing in column 'age'"):
        list(batches(make_loader(images, 2), Faults(allowed_share=1.0)))


def test_the_number_of_columns_is_that_of_the_outputs():
    columns = {"x": [1.0], "y": [2.0], "target": [3.0]}
    assert read(read_table(table(columns), ONE, "x/y")) == [[3]], "the one that is called so"
    for key, classes, words in (
        ("x,y", ONE, r"the model gives 1 value\(s\), and target_key names 2 columns: x, y"),
        ("x,z", TWO, "no column 'z'"),
    ):
        with pytest.raises(DataError, match=words):
            read_table(table(columns), classes, "x/y", DataOptions(columns=(None, key)))


VALUE_FILES = {
    "metadata.csv": "file_name,age,name\na.png,1.5,x\nb.png,-2,y\nc.png,3e2,z\n",
    "metadata.jsonl": '{"file_name": "a.png", "age": 1.5}\n{"file_name": "b.png", "age": -2}\n'
    '{"file_name": "c.png", "age": "300"}\n',
    "labels.csv": "a.png;1.5\nb.png;-2\nc.png;300\n",
    "labels.txt": "a.png 1.5\nb.png -2\nc.png 300\n",
    "label.txt": "1.5\n-2\n300\n",
    "labels.json": '{"a.png": 1.5, "b": -2, "c.png": [300]}',
}


@pytest.mark.parametrize("name", VALUE_FILES)
def test_a_value_from_a_file(loose, name):
    (loose / name).write_text(VALUE_FILES[name])
    data = open_data(str(loose), ONE)
    assert read(data.val) == [[1.5], [-2], [300]]
    (line,) = [line for line in data.understood if line.startswith("values: ")]
    assert name in line


def test_values_from_columns_of_a_file(loose):
    file = loose / "poses.csv"
    file.write_text("id,x,y,z\n" + "".join(f"{n},{x},{y},9\n" for n, (x, y) in zip("abc", VALUES, strict=True)))
    data = open_data(str(loose), TWO, DataOptions(labels=file, columns=("id", "x,y")))
    assert read(data.val) == VALUES
    assert "values: columns 'x', 'y' of 'poses.csv'" in data.understood
    with pytest.raises(DataError, match=r"holds the values\? x, y, z") as caught:
        open_data(str(loose), TWO, DataOptions(labels=file))
    assert "--target-key COLUMN,COLUMN" in caught.value.hint
    file.write_text("".join(f"{n}.png,{x},{y}\n" for n, (x, y) in zip("abc", VALUES, strict=True)))
    assert read(open_data(str(loose), TWO, DataOptions(labels=file)).val) == VALUES, "as many as there are outputs"
    with pytest.raises(DataError, match="2 columns without names"):
        open_data(str(loose), ONE, DataOptions(labels=file))


@pytest.mark.parametrize(
    ("cell", "words"),
    [("", "has nothing in column 'age'"), ("NaN", "has 'NaN' in column 'age'"), ("old", "has 'old' in column 'age'")],
)
def test_a_row_without_a_number_is_named(loose, cell, words):
    (loose / "metadata.csv").write_text(f"file_name,age\na.png,1\nb.png,{cell}\nc.png,3\n")
    with pytest.raises(DataError, match=f"'b.png' in 'metadata.csv' {words}"):
        open_data(str(loose), ONE)
    assert not open_data(str(loose), ONE, labels=False).val.labelled


# What fits another task


@pytest.mark.parametrize("classes", [LABELS, ONE])
def test_class_folders_say_no_labels_and_no_values(image_folder, classes):
    with pytest.raises(OtherTask, match=f"are in class folders, which do not say their {classes.kind}") as caught:
        open_data(str(image_folder), classes)
    assert "--task classification" in caught.value.hint
    assert "--labels FILE" in caught.value.hint
    data = open_data(str(image_folder), classes, training=True, labels=False)
    assert (len(data.train), len(data.val)) == (12, 6)
    assert set(data.val.labels) == {UNLABELLED}


@pytest.mark.parametrize("classes", [LABELS, ONE])
def test_images_without_a_file_are_unlabelled(loose, classes):
    with pytest.raises(Unlabelled, match=f"no file says the {classes.kind}") as caught:
        open_data(str(loose), classes)
    assert "metadata.csv" in caught.value.hint
    assert not open_data(str(loose), classes, labels=False).val.labelled


@pytest.mark.parametrize("classes", [LABELS, ONE])
def test_the_demo_and_columns_of_classes_are_refused(classes):
    with pytest.raises(OtherTask, match="have a class each"):
        open_data("demo", classes)
    assert not open_data("demo", classes, labels=False).val.labelled
    rows = table({"label": [0, 1]}, label=ClassLabel(names=["cat", "dog"]))
    with pytest.raises(OtherTask, match="column 'label' of 'x/y' has one class an image") as caught:
        read_table(rows, classes, "x/y")
    assert "--task classification" in caught.value.hint


@pytest.mark.parametrize(
    ("column", "task"),
    [
        (WORDS, "multilabel"),
        (INDICES, "multilabel"),
        (["cat|dog", "bird", "bird"], "multilabel"),
        ([0.5, 1.0, 2.0], "regression"),
        (["0.5", "1", "2"], "regression"),
    ],
)
def test_labels_and_numbers_where_classes_are_expected_name_the_task(column, task):
    with pytest.raises(OtherTask) as caught:
        read_table(table({"label": column}), ModelClasses(3, NAMES), "x/y")
    assert f"--task {task}" in caught.value.hint


def test_labels_and_numbers_in_a_stream_of_classes():
    with pytest.raises(OtherTask, match="has several labels an image"):
        read_table(table({"label": WORDS}).to_iterable_dataset(), ModelClasses(3, NAMES), "x/y")
    images = read_table(table({"label": [1.0, 0.5]}).to_iterable_dataset(), ModelClasses(3), "x/y")
    with pytest.raises(DataError, match=r"the number 0\.5 where a class is expected"):
        read(images)


@pytest.mark.parametrize(
    ("content", "task"),
    [
        ("a.png,cat|dog\nb.png,bird\nc.png,bird\n", "multilabel"),
        ("a.png,0.5\nb.png,1\nc.png,2\n", "regression"),
        ('{"a.png": ["cat"], "b.png": []}', "multilabel"),
    ],
)
def test_files_for_another_task_are_found_out(loose, content, task):
    (loose / ("labels.json" if content.startswith("{") else "labels.csv")).write_text(content)
    with pytest.raises(OtherTask) as caught:
        open_data(str(loose), ModelClasses(3, NAMES))
    assert f"--task {task}" in caught.value.hint


def test_several_columns_of_classes_are_refused(loose):
    (loose / "x.csv").write_text("file_name,cat,dog\na.png,1,0\n")
    with pytest.raises(OtherTask, match=r"the class is in one column .*, and target_key names 2"):
        open_data(str(loose), ModelClasses(2), DataOptions(labels=loose / "x.csv", columns=(None, "cat,dog")))
    with pytest.raises(OtherTask, match="names 2"):
        read_table(table({"cat": [1], "dog": [0]}), ModelClasses(2), "x/y", DataOptions(columns=(None, "cat,dog")))


@pytest.mark.parametrize("kind", ["values", "group"])
def test_what_is_said_of_classes_is_refused_where_there_are_none(loose, kind):
    for options in (DataOptions(class_order="timm"), DataOptions(class_map=loose / "x.txt")):
        with pytest.raises(DataError, match="not classes"):
            open_data(str(loose), ModelClasses(3, kind=kind), options)


# Image sets and Datasets


@pytest.mark.parametrize("as_list", [False, True])
def test_image_sets_hold_vectors(as_list):
    labels = torch.arange(20.0).reshape(10, 2)
    images = ImageSet(range(10), list(labels) if as_list else labels, lambda item: Image.new("RGB", (4, 4)))
    assert images.labelled
    for part in (images.subset([7, 2]), images.sample(4), *images.split(0.3), images.shard(1, 3)):
        assert [float(part.labels[i][0]) / 2 for i in range(len(part))] == list(part.items)
    images.transform = lambda image: torch.zeros(1)
    for workers in (0, 1):
        _, targets = next(batches(training_loader(images, 4, seed=0, num_workers=workers)))
        assert targets.shape == (4, 2)
        assert targets.dtype == torch.float32


class Given(Dataset):
    """A Dataset of these targets; None for images alone."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image, target = torch.zeros(3, 4, 4), self.targets[index]
        return image if target is None else (image, target)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("targets", "classes", "expected"),
    [
        ([torch.tensor([0, 1, 1])] * 4, LABELS, [0, 1, 1]),
        ([(True, False, False)] * 4, LABELS, [1, 0, 0]),
        ([0.5] * 4, ONE, [0.5]),
        ([-1] * 4, ONE, [-1]),
        ([torch.tensor([0.5, 2.0], dtype=torch.float64).numpy()] * 4, TWO, [0.5, 2]),
    ],
)
def test_datasets_give_vectors_and_numbers(targets, classes, expected, training):
    data = open_torch(Given(targets), None, classes, training=training)
    assert data.val.labelled
    assert read(data.val) == [expected] * (1 if training else 4)


@pytest.mark.parametrize(
    ("targets", "classes", "words"),
    [
        ([[0, 1]], LABELS, "has 2 labels of 0 or 1, and the model has 3"),
        ([[0, 1, 0.5]], LABELS, "has 0.5 for a label"),
        ([float("nan")], ONE, "has nan, expected a number"),
        ([[1, 2]], ONE, r"has 2 value\(s\), and the model gives 1"),
        ([[0, 1, 0]], ModelClasses(3), "a target of 3 numbers, and an image has one class"),
        ([0.5], ModelClasses(3), "0.5 where a class is expected"),
        (["cat"], ModelClasses(3), "'cat' where the number of a class is expected"),
        ([3], ModelClasses(3), "its label is 3, but the model has 3 classes"),
    ],
)
def test_targets_of_datasets_that_do_not_fit_are_refused(targets, classes, words):
    with pytest.raises(DataError, match=words):
        open_torch(Given(targets), None, classes)
    good = {"labels": [0, 1, 0], "values": 1.0, "class": 1}[classes.kind]
    data = open_torch(Given([good, *targets]), None, classes)
    with pytest.raises(DataError, match=f"cannot read 'image 1': .*{words.removeprefix('has ')}"):
        list(batches(make_loader(data.val, 2), Faults(allowed_share=1.0)))
    data = open_torch(Given(targets), None, classes, labels=False)
    assert [targets.tolist() for _, targets in batches(make_loader(data.val, 2))] == [[UNLABELLED]]
    assert not data.val.labelled


def test_a_dataset_without_targets_is_unlabelled_and_one_that_lacks_some_is_refused():
    for classes in (LABELS, ONE, ModelClasses(3), ModelClasses(3, kind="group"), None):
        data = open_torch(Given([None, None]), None, classes)
        assert [targets.tolist() for _, targets in batches(make_loader(data.val, 2))] == [[UNLABELLED] * 2]
    data = open_torch(Given([1.0, None]), None, ONE)
    with pytest.raises(DataError, match="it has nothing, expected a number"):
        list(batches(make_loader(data.val, 2)))
