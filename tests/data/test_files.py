"""Which files below a folder are images; what is left out is counted."""

import os
from pathlib import Path

import pytest
from PIL import Image

from vitprune.data import ModelClasses, open_data
from vitprune.data.files import image_files, scan
from vitprune.errors import DataError


def paint(path, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(path, kind)


def names(found):
    return [path.name for path in found.images]


def test_what_is_no_image_is_counted_by_kind(tmp_path):
    paint(tmp_path / "a.jpg")
    for name in ("b.pdf", "c.h5", "d.mpg", "e.txt", "f.heic", "notes", "._a.jpg", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"anything")
    (tmp_path / "g.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "h.jpg")
    found = scan(tmp_path)
    assert names(found) == ["a.jpg"]
    assert found.left_out == {
        ".pdf": 1,
        ".h5": 1,
        ".mpg": 1,
        ".txt": 1,
        ".heic (Pillow cannot read it: convert it)": 1,
        "file without an ending": 1,
        "broken link": 1,
        "special file": 1,
    }


def test_where_the_ending_says_nothing_the_content_does(tmp_path):
    paint(tmp_path / "plain", "JPEG")
    paint(tmp_path / "photo.jpg_large", "PNG")
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    found = scan(tmp_path)
    assert names(found) == ["photo.jpg_large", "plain"]
    assert found.left_out == {".ckpt": 1}


def test_links_are_followed_and_do_not_go_in_circles(tmp_path):
    """Class folders are often links into a store; everything in them used to be left out in silence."""
    paint(tmp_path / "store" / "deep" / "a.png")
    root = tmp_path / "data"
    for name in ("cat", "dog"):
        root.mkdir(exist_ok=True)
        (root / name).symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(root)
    data = open_data(str(root), ModelClasses(2))
    assert data.val.labels.count(0) == data.val.labels.count(1)
    assert {path.parts[-3] for path in data.val.items} >= {"cat", "dog"}


def test_folders_that_cannot_be_read_or_are_our_own_are_said(tmp_path, monkeypatch):
    paint(tmp_path / "a.png")
    paint(tmp_path / "secret" / "b.png")
    paint(tmp_path / "run" / "c.png")
    (tmp_path / "run" / "report.json").write_text("{}")
    scandir = os.scandir

    def locked(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    found = scan(tmp_path)
    assert names(found) == ["a.png"]
    assert found.left_out == {"folder that cannot be read": 1, "folder that vitprune wrote": 1}


def test_data_says_what_was_left_out(image_folder):
    paint(image_folder / "val" / "loose.png")
    (image_folder / "val" / "cat" / "a.heic").write_bytes(b"x")
    (image_folder / "train" / "dog" / "a.txt").write_text("x")
    data = open_data(str(image_folder), ModelClasses(2), training=True)
    assert len(data.val) == 6
    assert data.left_out == (
        "1 x .txt, 1 x .heic (Pillow cannot read it: convert it), 1 x image beside the class folders"
    )
    assert f"left out: {data.left_out}" in data.understood
    held_out = open_data(str(image_folder / "train"), ModelClasses(2), training=True)
    assert held_out.left_out == "1 x .txt", "not once for each part"


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no images in .*, only 1 x \.heic"):
        image_files(tmp_path)
    with pytest.raises(DataError, match=r"no images in .*, only 1 x \.heic"):
        open_data(str(tmp_path), ModelClasses(2))


def test_names_that_are_not_utf_8_are_shown_and_written(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        paint(tmp_path / "data" / os.fsdecode(name) / os.fsdecode(b"\xff.png"))
    data = open_data(str(tmp_path / "data"), ModelClasses(2))
    assert len(data.val) == 2
    assert data.val.class_names == {0: "caf?", 1: "tea"}
    assert data.val.name(data.val.items[0]).endswith("caf?/?.png")
    assert data.val[0][1] == 0
