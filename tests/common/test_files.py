"""Files are whole or not there, and a full disk is said so."""

import errno
import os
import subprocess

import pytest

from vitprune.common.files import replacing, write_json
from vitprune.common.run_folder import RunFolder
from vitprune.errors import OutputError


def _names(folder):
    return [entry.name for entry in folder.iterdir()]


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})

    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert _names(tmp_path) == ["report.json"]


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "report.json", {"loss": float("nan")})
    assert _names(tmp_path) == []


def test_written_files_have_the_usual_permissions(tmp_path):
    write_json(tmp_path / "a.json", {})
    (tmp_path / "b.json").write_text("{}")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


def test_full_disk_is_said(tmp_path):
    with pytest.raises(OutputError, match="the disk is full"), replacing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert _names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("a small file system needs the right to mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_really_full_disk_leaves_nothing_half_written(small_disk, make_sparse):
    from vitprune.checkpoint.sparse_file import describe, save

    sparse = make_sparse(embed_dim=192, num_heads=3)
    with pytest.raises(OutputError, match="the disk is full"):
        save(sparse, small_disk / "model.safetensors", describe(sparse))
    assert _names(small_disk) == []


def test_too_little_space_and_an_unwritable_folder_are_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, needed, message in (("run", 2**60, "MiB of free space"), ("file/run", 1, "cannot write")):
        with pytest.raises(OutputError, match=message):
            RunFolder(tmp_path / folder).create(needed_bytes=needed)
