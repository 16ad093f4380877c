"""Parquet and tar shards, data sets of the Hub, streams, and what their columns and labels mean."""

import errno
import gzip
import io
import json
import os

import datasets
import numpy as np
import pytest
import shards
import torch
from PIL import Image
from shards import make_table, png
from timm.data import ImageNetInfo

from vitprune.cli.app import run
from vitprune.data import (
    UNLABELLED,
    DataOptions,
    Faults,
    ImageStream,
    ModelClasses,
    batches,
    make_loader,
    open_data,
    training_loader,
)
from vitprune.data.hub import hub_name
from vitprune.data.tables import decode, read_table
from vitprune.errors import DataError, HubError, UsageError
from vitprune.training.recipe import Recipe

TWO = ModelClasses(2)
NAMED = ModelClasses(2, ("cat", "dog"))


def table(rows, label="class", names=("cat", "dog"), columns=("image", "label")):
    """Rows whose labels are a "class" with a name, an "int" or a "str"."""
    kinds = {"class": datasets.ClassLabel(names=list(names)), "int": datasets.Value("int64")}
    labels = [names[row % 2] if label == "str" else row % 2 for row in rows]
    kind = kinds.get(label, datasets.Value("string"))
    return make_table(map(png, rows), labels, kind, columns)


def write_parquet(path, count, start=0, **of_table):
    path.parent.mkdir(parents=True, exist_ok=True)
    table(range(start, start + count), **of_table).to_parquet(path)


def write_tar(path, count, start=0, broken=()):
    rows = range(start, start + count)
    images = [b"no image" if row in broken else png(row) for row in rows]
    shards.write_tar(
        path, [{"png": image, "cls": str(row % 2).encode()} for row, image in zip(rows, images, strict=True)]
    )


def shade(image):
    return torch.tensor([image.getpixel((0, 0))[0]])


def read(dataset, batch_size=4, num_workers=0, faults=None):
    """(shade, label) of every image."""
    dataset.transform = shade
    loader = make_loader(dataset, batch_size, num_workers=num_workers)
    return [(int(s), int(y)) for images, labels in batches(loader, faults) for s, y in zip(images, labels, strict=True)]


@pytest.mark.parametrize("label", ["class", "int", "str"])
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_shards_by_their_names(tmp_path, label, streaming):
    for shard in range(2):
        write_parquet(tmp_path / "set" / f"train-0000{shard}-of-00002.parquet", 3, start=3 * shard, label=label)
    write_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet", 2, start=10, label=label)
    data = open_data(str(tmp_path / "set"), NAMED, DataOptions(streaming=streaming), training=True)
    assert isinstance(data.train, ImageStream) == streaming
    assert read(data.train) == [(row, row % 2) for row in range(6)]
    assert read(data.val) == [(10, 0), (11, 1)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tar_shards_are_read_once_each_whatever_the_workers(tmp_path, num_workers):
    for shard in range(3):
        write_tar(tmp_path / "set" / f"train-{shard:03d}.tar", 5, start=5 * shard)
    write_tar(tmp_path / "set" / "val-000.tar", 3, start=20)
    data = open_data(str(tmp_path / "set"), TWO, training=True)
    assert sorted(read(data.train, num_workers=num_workers)) == [(row, row % 2) for row in range(15)]
    assert sorted(read(data.val, num_workers=num_workers)) == [(20, 0), (21, 1), (22, 0)]


def test_a_training_stream_is_shuffled_anew_each_pass_by_seed_and_first_step(tmp_path):
    write_tar(tmp_path / "set" / "val-000.tar", 20)

    def order(first_step):
        stream = open_data(str(tmp_path / "set"), TWO).val
        stream.transform = shade
        loader = training_loader(stream, 5, seed=3, first_step=first_step)
        return [[int(s) for images, _ in batches(loader) for s in images] for _ in range(2)]

    first, second = order(0)
    assert order(0) == [first, second]
    assert first != second
    later = order(7)[0]
    assert later != first
    assert sorted(first) == sorted(second) == sorted(later) == list(range(20))


@pytest.mark.parametrize("num_files", [2, 3])
def test_processes_share_a_stream_without_overlap(tmp_path, num_files):
    for number in range(num_files):
        write_tar(tmp_path / "set" / f"val-{number:03d}.tar", 4, start=4 * number)
    in_order = open_data(str(tmp_path / "set"), TWO).val
    for stream in (in_order, in_order.shuffled(5)):
        shares = [[s for s, _ in read(stream.shard(rank, 2))] for rank in range(2)]
        assert all(shares)
        assert sorted(shares[0] + shares[1]) == list(range(4 * num_files))


def test_broken_images_in_shards_are_left_out_and_named(tmp_path):
    write_tar(tmp_path / "set" / "val-000.tar", 4, broken=(1,))
    faults = Faults(allowed_share=1.0)
    data = open_data(str(tmp_path / "set"), TWO)
    assert [s for s, _ in read(data.val, faults=faults)] == [0, 2, 3]
    assert faults.count == 1
    assert "00001" in faults.names[0]


def test_a_class_that_the_model_does_not_have_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", 4, label="int")
    with pytest.raises(DataError, match=r"class 1, which is none of the model's \(0\)"):
        open_data(str(tmp_path / "a.parquet"), ModelClasses(1))
    data = open_data(str(tmp_path / "a.parquet"), ModelClasses(1), DataOptions(streaming=True))
    with pytest.raises(DataError, match="class 1"):
        read(data.val)


def test_columns_and_splits_by_name(tmp_path):
    write_parquet(tmp_path / "left-0.parquet", 2, label="int")
    write_parquet(tmp_path / "right-0.parquet", 3, start=5, label="int")
    pattern = str(tmp_path / "*.parquet")
    data = open_data(pattern, TWO, DataOptions(splits=("left", "right"), columns=("image", "label")), training=True)
    assert (len(data.train), len(data.val)) == (2, 3)
    with pytest.raises(DataError, match="no column 'photo'") as caught:
        open_data(pattern, TWO, DataOptions(columns=("photo", None)))
    assert "image, label" in caught.value.hint
    with pytest.raises(DataError, match="no file's name begins with 'middle'"):
        open_data(pattern, TWO, DataOptions(splits=("middle", None)))


@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_found_in_files_that_do_not_name_their_kind(tmp_path, streaming):
    """As pyarrow, Spark or pandas write them: bytes, alone or beside a path, and no note of `datasets`."""
    import pyarrow
    import pyarrow.parquet

    bytes_alone = [png(row) for row in range(4)]
    for name, cells in (("alone", bytes_alone), ("path", [{"bytes": each, "path": "x.png"} for each in bytes_alone])):
        folder = tmp_path / name
        folder.mkdir()
        rows = pyarrow.table({"picture": cells, "label": [0, 1, 0, 1], "note": ["a"] * 4})
        pyarrow.parquet.write_table(rows, folder / "val-00000-of-00001.parquet")
        data = open_data(str(folder), TWO, DataOptions(streaming=streaming))
        assert read(data.val) == [(row, row % 2) for row in range(4)]


def test_a_damaged_shard_is_refused_by_name(tmp_path):
    for name in ("a.parquet", "a.tar"):
        (tmp_path / name).write_bytes(b"PAR1 and nothing")
        with pytest.raises(DataError, match=name):
            open_data(str(tmp_path / name), TWO)
    write_tar(tmp_path / "whole.tar", 30)
    content = (tmp_path / "whole.tar").read_bytes()
    for cut in (100, 512 * 20):  # `datasets` would read what is there and say nothing
        (tmp_path / "cut.tar").write_bytes(content[:-cut])
        with pytest.raises(DataError, match=r"cut\.tar' is damaged"):
            open_data(str(tmp_path / "cut.tar"), TWO)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_vanishes_stops_the_reading_with_its_name(tmp_path, num_workers):
    for shard in range(2):
        write_tar(tmp_path / "set" / f"val-{shard:03d}.tar", 3)
    data = open_data(str(tmp_path / "set"), TWO)
    (tmp_path / "set" / "val-001.tar").unlink()
    with pytest.raises(DataError, match=r"set': reading stopped after \d+ rows"):
        read(data.val, num_workers=num_workers, faults=Faults(allowed_share=1.0))


def test_shards_of_a_numbered_series_that_are_not_there_are_told(tmp_path, weights_file, capsys):
    for number in (0, 2):
        write_parquet(tmp_path / f"val-{number:05d}-of-00004.parquet", 2)
    write_parquet(tmp_path / "train-00000-of-00001.parquet", 2)
    data = open_data(str(tmp_path / "*.parquet"), NAMED)
    assert data.note == "2 of 5 shards are missing, val-00001-of-00004.parquet first"
    command = ["eval", "test_vit", str(tmp_path / "*.parquet"), "--checkpoint", str(weights_file), "--device", "cpu"]
    assert run([*command, "-j", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "2 of 5 shards are missing" in err
    assert json.loads(out)["note"] == data.note
    assert open_data(str(tmp_path / "train-*.parquet"), NAMED).note == "these are training images: there is no val part"


def test_shards_that_make_no_data_set_are_refused_and_a_pattern_chooses(tmp_path):
    write_parquet(tmp_path / "set" / "a.parquet", 4, label="str", names=("cat", "wolf"))
    write_parquet(tmp_path / "set" / "b.parquet", 2, label="str", names=("cat", "wolf"))
    write_tar(tmp_path / "set" / "train-000.tar", 4)
    assert len(open_data(str(tmp_path / "set" / "a.parquet"), TWO).val) == 4
    assert len(open_data(str(tmp_path / "set" / "*.parquet"), TWO).val) == 6
    for name, classes, words in (
        ("", TWO, r"both \.parquet and \.tar"),
        ("train-000.tar", TWO, "none can be held out of a stream"),
        ("a.parquet", NAMED, "cat, dog.*cat, wolf"),
    ):
        with pytest.raises(DataError, match=words):
            open_data(str(tmp_path / "set" / name), classes, training=True)


def test_a_path_in_a_table_is_not_followed(tmp_path):
    """A data set must not choose which file of this machine is opened."""
    (tmp_path / "secret.png").write_bytes(png(7))
    with pytest.raises(ValueError, match="no image"):
        decode({"bytes": None, "path": str(tmp_path / "secret.png")})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_columns_are_found_by_their_kind_and_classes_matched_by_name(num_workers):
    swapped = ModelClasses(2, ("dog", "cat"))
    whole = table(range(6), columns=("img", "fine_label"))
    for kind in (whole, whole.to_iterable_dataset()):
        images = read_table(kind, TWO, "x/y")
        assert read(images, num_workers=num_workers) == [(row, row % 2) for row in range(6)]
        images = read_table(kind, swapped, "x/y")
        assert read(images, num_workers=num_workers) == [(row, 1 - row % 2) for row in range(6)]
        assert images.class_names == {1: "cat", 0: "dog"}
        assert {label for _, label in read(read_table(kind, None, "x/y"))} == {UNLABELLED}
    image, _ = read_table(whole, TWO, "x/y")[1]
    assert image.mode == "RGB"


def test_named_classes_of_imagenet_get_its_indices_also_where_they_are_numbered():
    ids = ImageNetInfo().label_names()
    numbered = table(range(2), names=(ids[993], ids[7]))
    assert read_table(numbered, ModelClasses(1000), "x/y").labels == [993, 7]


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="the model has 3 classes, but 'x/y' has 2"):
        read_table(table(range(6)), ModelClasses(3), "x/y")
    with pytest.raises(DataError, match="no column of images, only text"):
        read_table(datasets.Dataset.from_dict({"text": ["a"]}), None, "x/y")


@pytest.mark.parametrize(
    ("spec", "error", "message", "hint"),
    [
        *((spec, ConnectionError("no route"), "Hugging Face Hub", "folder") for spec in ("imagenet", "hf:no/body")),
        ("imagenette", datasets.exceptions.DatasetNotFoundError("absent"), "there is no data set", "folder"),
        (
            "imagenet",
            datasets.exceptions.DatasetNotFoundError("'ILSVRC/imagenet-1k' is a gated dataset on the Hub."),
            "'ILSVRC/imagenet-1k' is gated",
            "hf auth login",
        ),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence_with_a_way_out(spec, error, message, hint, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("VITPRUNE_IMAGENET", raising=False)
    with pytest.raises(HubError, match=message) as caught:
        open_data(spec, ModelClasses(1000))
    assert hint in caught.value.hint


def test_a_stream_is_trained_on_and_evaluated(weights_file, tmp_path, capsys, quick_bench):
    for name, count in (("train-000", 12), ("train-001", 12), ("val-000", 5)):
        write_tar(tmp_path / "set" / f"{name}.tar", count)
    arguments = ["sparsify", "test_vit", "--checkpoint", str(weights_file), "--data", str(tmp_path / "set")]
    quick = ["--pretraining-steps", "2", "--steps", "6", "-b", "4", "-j", "0", "--device", "cpu", "--img-size", "32"]
    assert run([*arguments, *quick, "-o", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"]["num_train_images"] is None
    assert report["data"]["num_val_images"] == report["sparse"]["num_images"] == 5
    assert report["training"]["num_images"] == 32, "more than a pass"
    assert Recipe(steps=7).num_steps(None) == 7
    with pytest.raises(UsageError, match="stream"):
        Recipe(epochs=1).num_steps(None)


def test_data_sets_of_the_hub_may_be_named_as_elsewhere():
    for spec in ("hf:owner/name:config", "hf-hub:owner/name:config", "hfds/owner/name:config"):
        assert hub_name(spec) == "owner/name"
    assert hub_name("owner/name") is None, "a path"


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "who?", "[!x]"])
def test_a_path_is_no_pattern(tmp_path, name):
    """datasets reads `exp[1]/` as the rows of `exp1/`."""
    write_parquet(tmp_path / "exp1" / "val-0.parquet", 5)
    write_parquet(tmp_path / name / "val-0.parquet", 2)
    write_tar(tmp_path / "tars" / name / "val-0.tar", 3)
    assert len(open_data(str(tmp_path / name), TWO).val) == 2
    assert len(open_data(str(tmp_path / name / "*.parquet"), TWO).val) == 2
    assert len(read(open_data(str(tmp_path / "tars" / name), TWO).val)) == 3


def test_a_path_that_datasets_cannot_open_is_refused(tmp_path):
    write_parquet(tmp_path / "set" / "val-0.parquet", 2)
    (tmp_path / "set").rename(tmp_path / "a::b")
    with pytest.raises(DataError, match="holds '::'"):
        open_data(str(tmp_path / "a::b"), TWO)


def test_a_folder_is_not_read_in_place_of_a_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "owner" / "name" / "val-0.parquet", 2)
    with pytest.raises(DataError, match=r"a data set of the Hub, and there is a folder 'owner/name' here") as caught:
        open_data("hf:owner/name", TWO)
    assert "./owner/name is the folder" in caught.value.hint


def test_several_columns_of_images_are_a_question(tmp_path):
    both = table(range(4)).add_column("mask", [{"bytes": png(200), "path": None}] * 4)
    both = both.cast_column("mask", datasets.Image())
    with pytest.raises(DataError, match="has several columns of images: image, mask") as caught:
        read_table(both, TWO, "x/y")
    assert caught.value.hint == "name it: --input-key COLUMN"
    assert read(read_table(both, TWO, "x/y", DataOptions(columns=("mask", None))))[0] == (200, 0)


def test_a_column_that_holds_no_images_is_refused_before_it_is_read():
    named = datasets.Dataset.from_dict({"text": ["a"], "label": [0], "bytes": [png(7)]})
    for kind in (named, named.to_iterable_dataset()):
        for column, what in (("text", "string"), ("label", "int64")):
            with pytest.raises(DataError, match=f"column '{column}' of 'x/y' holds {what}, no images"):
                read_table(kind, TWO, "x/y", DataOptions(columns=(column, None)))
        assert read(read_table(kind, TWO, "x/y", DataOptions(columns=("bytes", None)))) == [(7, 0)]


@pytest.mark.parametrize("ending", ["tar.gz", "tgz"])
def test_compressed_tar_files_are_read_and_a_cut_one_is_told(tmp_path, ending):
    write_tar(tmp_path / "plain" / "val-0.tar", 6)
    content = gzip.compress((tmp_path / "plain" / "val-0.tar").read_bytes())
    path = tmp_path / "set" / f"val-0.{ending}"
    path.parent.mkdir()
    path.write_bytes(content)
    assert [label for _, label in read(open_data(str(path.parent), TWO).val)] == [0, 1, 0, 1, 0, 1]
    path.write_bytes(content[:-200])
    with pytest.raises(DataError, match=r"cannot be read|reading stopped after"):
        read(open_data(str(path.parent), TWO).val)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied")]
)
def test_trouble_with_the_cache_is_not_blamed_on_the_data(tmp_path, monkeypatch, number, words):
    write_parquet(tmp_path / "set" / "val-0.parquet", 2)

    def load(*args, **kwargs):
        raise OSError(number, os.strerror(number), str(tmp_path / "cache" / "x.arrow"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=f"the cache of datasets cannot be written: {words}") as caught:
        open_data(str(tmp_path / "set"), TWO)
    assert "HF_DATASETS_CACHE" in caught.value.hint
    path = tmp_path / "set" / "val-0.parquet"
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path))
    )
    with pytest.raises(DataError, match=r"val-0.parquet' cannot be read: Permission denied") as caught:
        open_data(str(tmp_path / "set"), TWO)
    assert caught.value.hint == "check its permissions"


def test_a_folder_of_images_and_shards_is_a_question(tmp_path):
    write_tar(tmp_path / "set" / "val-0.tar", 2)
    (tmp_path / "set" / "README.md").write_text("# about")
    assert len(read(open_data(str(tmp_path / "set"), TWO).val)) == 2
    (tmp_path / "set" / "a.png").write_bytes(png(3))
    with pytest.raises(DataError, match=r"holds images, such as 'a.png', and 'val-0.tar'"):
        open_data(str(tmp_path / "set"), TWO)


def test_a_limit_on_a_stream_is_told_to_be_its_beginning(tmp_path):
    write_tar(tmp_path / "set" / "val-0.tar", 6)
    data = open_data(str(tmp_path / "set"), TWO, DataOptions(limit=2))
    assert [shade for shade, _ in read(data.val)] == [0, 1]
    assert data.note == "the first 2 images of the stream, in its order"


def test_an_order_of_classes_is_refused_where_they_are_numbers(tmp_path):
    write_parquet(tmp_path / "set" / "val-0.parquet", 2, label="int")
    with pytest.raises(DataError, match=r"column 'label' .* numbers the classes, which need no order"):
        open_data(str(tmp_path / "set"), TWO, DataOptions(class_order="timm"))


def test_large_and_deep_images_in_tables(tmp_path):
    write_tar(tmp_path / "set" / "val-0.tar", 2)
    faults = Faults(allowed_share=1.0)
    assert read(open_data(str(tmp_path / "set"), TWO, DataOptions(max_pixels=50)).val, faults=faults) == []
    assert faults.count == 2
    assert faults.reason == "it has more than 50 pixels"
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), 257 * 99, np.uint16)).save(content, "PNG")
    assert decode({"bytes": content.getvalue()}).getpixel((0, 0)) == (99, 99, 99)
