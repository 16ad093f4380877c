"""Data of the user: N classes whose names travel and come back, images that cannot be read."""

import json
import shutil

from vitprune.checkpoint.sparse_file import read_metadata
from vitprune.cli.app import run


def test_names_travel_in_the_file_and_come_back(finished, images, capsys):
    report = json.loads((finished.folder / "report.json").read_text())
    assert [(row["index"], row["name"], row["num_images"]) for row in report["classes"]] == [
        (0, "cat", 3),
        (1, "dog", 3),
    ]
    assert read_metadata(finished.folder / "model.safetensors").class_names == ["cat", "dog"]

    # One class alone: only the names in the file say that it is the second.
    shutil.rmtree(images / "val" / "cat")
    command = ["eval", str(finished.folder), str(images / "val"), "-j", "0"]
    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["index"], row["name"]) for row in result["classes"]] == [(1, "dog")]
    assert run([*command, "--per-class"]) == 0
    assert "dog" in capsys.readouterr().out


def test_a_folder_with_another_class_is_refused_with_both_sides(finished, images, capsys):
    (images / "val" / "dog").rename(images / "val" / "wolf")
    assert run(["eval", str(finished.folder), str(images), "-j", "0"]) != 0
    error = capsys.readouterr().err
    assert "cat, dog" in error
    assert "cat, wolf" in error


def test_eval_refuses_unreadable_images_unless_told(finished, images, capsys):
    victim = images / "val" / "dog" / "1.png"
    victim.write_bytes(b"no image")
    weights = ["--checkpoint", str(finished.root / "weights.safetensors")]
    command = ["eval", "test_vit", str(images), *weights, "--device", "cpu", "-j", "0"]
    assert run(command) == 1
    assert f"cannot read image '{victim}'" in capsys.readouterr().err
    assert run([*command, "--skip-unreadable", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_images"], result["num_unreadable"], result["unreadable"]) == (5, 1, [str(victim)])
    assert run([*command, "--skip-unreadable"]) == 0
    assert "1 unreadable image(s) were left out" in capsys.readouterr().out
