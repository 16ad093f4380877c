"""Parquet and tar shards, streams, and what their columns and labels mean."""

import io
import json
import tarfile

import datasets
import pytest
import torch
from PIL import Image

from vitprune.cli.app import run
from vitprune.data import (
    DataOptions,
    Faults,
    ImageStream,
    ModelClasses,
    batches,
    make_loader,
    open_data,
    training_loader,
)
from vitprune.data.tables import decode, read_table
from vitprune.errors import DataError
from vitprune.training import Recipe

TWO = ModelClasses(2)
NAMED = ModelClasses(2, ("cat", "dog"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(shade, size=(40, 40)):
    """An image that says which one it is."""
    content = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(content, "PNG")
    return content.getvalue()


def write_parquet(path, count, start=0, label="class", names=("cat", "dog")):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = range(start, start + count)
    kinds = {
        "class": datasets.ClassLabel(names=list(names)),
        "int": datasets.Value("int64"),
        "str": datasets.Value("string"),
    }
    labels = [names[row % 2] if label == "str" else row % 2 for row in rows]
    features = datasets.Features({"image": datasets.Image(), "label": kinds[label]})
    cells = [{"bytes": png(row), "path": None} for row in rows]
    datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(path)


def write_tar(path, count, start=0, broken=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for row in range(start, start + count):
            content = b"no image" if row in broken else png(row)
            for suffix, data in (("png", content), ("cls", str(row % 2).encode())):
                member = tarfile.TarInfo(f"{row:05d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


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


def test_a_pattern_and_a_single_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", 2)
    write_parquet(tmp_path / "b.parquet", 2, start=2)
    assert len(open_data(str(tmp_path / "a.parquet"), TWO).val) == 2
    assert len(open_data(str(tmp_path / "*.parquet"), TWO).val) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tar_shards_are_read_once_each_whatever_the_workers(tmp_path, num_workers):
    for shard in range(3):
        write_tar(tmp_path / "set" / f"train-{shard:03d}.tar", 5, start=5 * shard)
    write_tar(tmp_path / "set" / "val-000.tar", 3, start=20)
    data = open_data(str(tmp_path / "set"), TWO, training=True)
    assert sorted(read(data.train, num_workers=num_workers)) == [(row, row % 2) for row in range(15)]
    assert sorted(read(data.val, num_workers=num_workers)) == [(20, 0), (21, 1), (22, 0)]


def test_a_training_stream_is_shuffled_each_pass_another_way_and_the_same_for_a_seed(tmp_path):
    write_tar(tmp_path / "set" / "train-000.tar", 20)
    write_tar(tmp_path / "set" / "val-000.tar", 2)
    orders = []
    for _ in range(2):
        train = open_data(str(tmp_path / "set"), TWO, training=True).train
        train.transform = shade
        loader = training_loader(train, 5, seed=3)
        orders.append([[int(s) for images, _ in batches(loader) for s in images] for _ in range(2)])
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]
    assert sorted(orders[0][0]) == sorted(orders[0][1]) == list(range(20))


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_processes_share_a_stream_without_overlap(tmp_path, shards, seed):
    for shard in range(shards):
        write_tar(tmp_path / "set" / f"val-{shard:03d}.tar", 4, start=4 * shard)
    parts = []
    for rank in range(2):
        val = open_data(str(tmp_path / "set"), TWO).val
        val = val if seed is None else val.shuffled(seed)
        parts.append([s for s, _ in read(val.shard(rank, 2))])
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == list(range(4 * shards))


def test_a_stream_that_is_begun_later_has_another_order(tmp_path):
    write_tar(tmp_path / "set" / "val-000.tar", 20)
    orders = []
    for first_step in (0, 7):
        val = open_data(str(tmp_path / "set"), TWO).val
        val.transform = shade
        loader = training_loader(val, 5, seed=3, first_step=first_step)
        orders.append([int(s) for images, _ in batches(loader) for s in images])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


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


def test_names_that_do_not_fit_show_both_sides(tmp_path):
    write_parquet(tmp_path / "a.parquet", 4, label="str", names=("cat", "wolf"))
    with pytest.raises(DataError, match=r"cat, dog.*cat, wolf"):
        open_data(str(tmp_path / "a.parquet"), NAMED)


def test_columns_and_splits_by_name(tmp_path):
    write_parquet(tmp_path / "left-0.parquet", 2, label="int")
    write_parquet(tmp_path / "right-0.parquet", 3, start=5, label="int")
    pattern = str(tmp_path / "*.parquet")
    data = open_data(pattern, TWO, DataOptions(splits=("left", "right"), columns=("image", "label")), training=True)
    assert (len(data.train), len(data.val)) == (2, 3)
    with pytest.raises(DataError, match="no column 'photo'") as caught:
        open_data(pattern, TWO, DataOptions(columns=("photo", None)))
    assert "image, label" in caught.value.hint
    with pytest.raises(DataError, match="no split 'middle'"):
        open_data(pattern, TWO, DataOptions(splits=("middle", None)))


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match=name):
        open_data(str(tmp_path / name), TWO)


@pytest.mark.parametrize("cut", [100, 512 * 20])
def test_a_tar_file_that_was_cut_off_is_refused(tmp_path, cut):
    """`datasets` would read what is left of it and say nothing."""
    write_tar(tmp_path / "set" / "val-000.tar", 30)
    content = (tmp_path / "set" / "val-000.tar").read_bytes()
    (tmp_path / "set" / "val-000.tar").write_bytes(content[: len(content) - cut])
    with pytest.raises(DataError, match=r"val-000\.tar' is damaged"):
        open_data(str(tmp_path / "set"), TWO)


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
    assert open_data(str(tmp_path / "train-*.parquet"), NAMED).note is None


def test_two_kinds_of_shards_are_refused(tmp_path):
    write_parquet(tmp_path / "set" / "a.parquet", 1)
    write_tar(tmp_path / "set" / "b.tar", 1)
    with pytest.raises(DataError, match=r"both \.parquet and \.tar"):
        open_data(str(tmp_path / "set"), TWO)


def test_a_stream_without_a_val_part_cannot_be_trained_on(tmp_path):
    write_tar(tmp_path / "train-000.tar", 4)
    with pytest.raises(DataError, match="none can be held out of a stream"):
        open_data(str(tmp_path / "train-000.tar"), TWO, training=True)


def test_a_path_in_a_table_is_not_followed(tmp_path):
    """A data set must not choose which file of this machine is opened."""
    (tmp_path / "secret.png").write_bytes(png(7))
    with pytest.raises(ValueError, match="no image"):
        decode({"bytes": None, "path": str(tmp_path / "secret.png")})


def test_map_and_stream_agree():
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": png(row), "path": None} for row in range(6)]
    table = datasets.Dataset.from_dict({"img": cells, "fine_label": [0, 1] * 3}, features=features)
    swapped = ModelClasses(2, ("dog", "cat"))
    stream = read_table(table.to_iterable_dataset(), swapped, "x")
    assert read(stream) == read(read_table(table, swapped, "x")) == [(row, 1 - row % 2) for row in range(6)]
    assert stream.class_names == {1: "cat", 0: "dog"}


def test_a_stream_is_trained_on_and_evaluated(weights_file, tmp_path, capsys, quick_bench):
    for name, count in (("train-000", 12), ("train-001", 12), ("val-000", 5)):
        write_tar(tmp_path / "set" / f"{name}.tar", count)
    arguments = ["sparsify", "test_vit", "--checkpoint", str(weights_file), "--data", str(tmp_path / "set")]
    quick = ["--warm-start-steps", "2", "--steps", "6", "-b", "4", "--device", "cpu", "-o", str(tmp_path / "out")]
    assert run([*arguments, *quick, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"]["num_train_images"] is None
    assert report["data"]["num_val_images"] == report["sparse"]["num_images"] == 5
    assert report["training"]["num_images"] == 32, "more than a pass"


def test_passes_over_a_stream_are_not_a_length():
    from vitprune.errors import UsageError

    with pytest.raises(UsageError, match="stream"):
        Recipe(epochs=1).num_steps(None)
    assert Recipe(steps=7).num_steps(None) == 7
