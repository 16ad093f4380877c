"""Data of the user: N classes whose names travel and come back, images that cannot be read."""

import json

import pytest
from safetensors.torch import save_file

from vitprune.checkpoint.sparse_file import read_metadata
from vitprune.cli.app import run

QUICK = ["--warm-start-steps", "2", "--steps", "2", "-b", "4", "--device", "cpu", "-j", "0", "--bench-seconds", "0.1"]


@pytest.fixture
def weights(make_vit, tmp_path):
    save_file(make_vit(num_classes=2).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_names_travel_in_the_file_and_come_back(weights, image_folder, tmp_path, capsys, quick_bench):
    output = tmp_path / "out"
    command = ["sparsify", "test_vit", "--checkpoint", str(weights), "--data", str(image_folder), "-o", str(output)]
    assert run([*command, *QUICK, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["index"], row["name"], row["num_images"]) for row in report["classes"]] == [
        (0, "cat", 3),
        (1, "dog", 3),
    ]
    assert read_metadata(output / "model.safetensors").class_names == ["cat", "dog"]

    # One class alone: only the names in the file say that it is the second.
    only = tmp_path / "only"
    (only).mkdir()
    (image_folder / "val" / "dog").rename(only / "dog")
    assert run(["eval", str(output / "model.safetensors"), str(only), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["index"], row["name"]) for row in result["classes"]] == [(1, "dog")]
    assert run(["eval", str(output), str(only), "--per-class"]) == 0
    assert "dog" in capsys.readouterr().out


def test_a_folder_with_another_class_is_refused_with_both_sides(weights, image_folder, tmp_path, capsys, quick_bench):
    output = tmp_path / "out"
    command = ["sparsify", "test_vit", "--checkpoint", str(weights), "--data", str(image_folder), "-o", str(output)]
    assert run([*command, *QUICK]) == 0
    (image_folder / "val" / "dog").rename(image_folder / "val" / "wolf")
    assert run(["eval", str(output), str(image_folder)]) != 0
    error = capsys.readouterr().err
    assert "cat, dog" in error
    assert "cat, wolf" in error


def test_eval_refuses_unreadable_images_unless_told(weights, image_folder, capsys):
    victim = image_folder / "val" / "dog" / "1.png"
    victim.write_bytes(b"no image")
    command = ["eval", "test_vit", str(image_folder), "--checkpoint", str(weights), "--device", "cpu", "-j", "0"]
    assert run(command) == 1
    assert f"cannot read image '{victim}'" in capsys.readouterr().err
    assert run([*command, "--skip-unreadable", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_images"], result["num_unreadable"], result["unreadable"]) == (5, 1, [str(victim)])
    assert run([*command, "--skip-unreadable"]) == 0
    assert "1 unreadable image(s) were left out" in capsys.readouterr().out
