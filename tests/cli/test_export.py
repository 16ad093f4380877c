"""vitprune export, and what eval makes of its files."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 2}


@pytest.fixture(scope="module")
def made(make_sparse, tmp_path_factory):
    """A run folder with a file of ours, its exports, and images of its two classes."""
    folder = tmp_path_factory.mktemp("run")
    sparse = make_sparse("vit_tiny_patch16_224", keep=0.5, stages=(1,), **TINY)
    save(sparse, folder / "model.safetensors", describe(sparse, name="mine", class_names=("cat", "dog")))
    for kind in ("onnx", "pt2"):
        assert run(["export", str(folder / "model.safetensors"), "--format", kind, "--json"]) == 0
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(4):
            pixels = torch.randint(0, 256, (80, 96, 3), generator=generator).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch, no_hub):
    """A copy of that folder, as current directory."""
    shutil.copytree(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def test_exported_files_evaluate_as_the_file_they_were_made_from(place, capsys):
    results = {}
    for name in ("model.safetensors", "model.onnx", "model.pt2"):
        assert run(["eval", name, "images", "-j", "0", "--json"]) == 0
        results[name] = json.loads(capsys.readouterr().out)
    assert results["model.safetensors"]["num_images"] == 8
    assert results["model.onnx"] == results["model.pt2"] == results["model.safetensors"]
    assert results["model.onnx"]["keep"] == 0.5
    assert [row["name"] for row in results["model.onnx"]["classes"]] == ["cat", "dog"]


def test_timm_folder_beside_the_file_holds_the_backbone(place, capsys):
    assert run(["export", "model.safetensors", "--format", "timm", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["output"], result["keep"]) == ("timm", 1.0)
    assert result["agreement"]["max_logit_difference"] == 0
    assert run(["eval", "timm", "images", "-j", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["classes"]] == ["cat", "dog"]
    assert run(["export", "model.safetensors", "--format", "timm"]) == 1
    assert "the output 'timm' exists" in capsys.readouterr().err
    (place / "timm" / "notes.txt").write_text("mine")
    assert run(["export", "model.safetensors", "--format", "timm", "--overwrite"]) == 0
    assert (place / "timm" / "notes.txt").read_text() == "mine", "what vitprune did not write stays"
    assert {path.name for path in place.iterdir() if path.name.startswith(".")} == set()


def test_comparison_on_real_images_and_what_is_said_of_it(place, capsys):
    options = ["--precision", "fp16", "--data", "images", "--limit", "7"]
    assert run(["export", ".", "--format", "pt2", *options]) == 0
    out, err = capsys.readouterr()
    assert "mine, keep 0.5: pt2, fp16" in out
    assert "beside PyTorch on 12 random images and 7 images, in batches of 1, 2, 5: logits differ by" in out
    assert "written to model-fp16.pt2" in out
    assert "exporting mine" in err
    assert run(["eval", "model-fp16.pt2", "images", "-j", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "fp16"


def test_a_dense_model_goes_to_the_working_directory(place, weights_file, capsys):
    assert run(["export", "test_vit", "--checkpoint", str(weights_file), "--format", "timm", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["output"], result["keep"], result["num_classes"]) == ("test_vit-timm", 1.0, 2)
    assert result["input_size"] == [3, 160, 160]
    assert run(["eval", "test_vit-timm", "images", "-j", "0"]) == 0
    assert "dense: top-1" in capsys.readouterr().out


MISTAKES = {
    "exists": (["export", "."], 1, "the output 'model.onnx' exists"),
    "wrong suffix": (["export", ".", "-o", "model.bin"], 1, "the output 'model.bin' is not the name of a .onnx file"),
    "suffix of another format": (["export", ".", "-o", "a.onnx", "--format", "pt2"], 1, "not the name of a .pt2 file"),
    "a folder": (["export", ".", "-o", "dir.onnx"], 1, "the output 'dir.onnx' is a folder"),
    "a file": (["export", ".", "-o", "model.onnx", "--format", "timm"], 1, "is a file, not a folder"),
    "over the sparse model": (["export", ".", "-o", ".", "--format", "timm", "--overwrite"], 1, "would replace"),
    "no such folder": (["export", ".", "-o", "absent/model.onnx"], 1, "there is no folder 'absent' to write to"),
    "no such format": (["export", ".", "--format", "tflite"], 2, "--format is 'tflite', expected one of"),
    "fp16 of a timm folder": (["export", ".", "--format", "timm", "--precision", "fp16"], 2, "is written in fp32"),
    "limit without data": (["export", ".", "--limit", "3"], 2, "there is no --data"),
    "no such data": (["export", ".", "-o", "b.onnx", "--data", "nowhere"], 1, "the data 'nowhere' is not there"),
    "no such model": (["export", "xyzzy"], 2, "there is no model or file 'xyzzy'"),
    "unsupported family": (["export", "swin_tiny"], 1, "hierarchical"),
    "of an exported file": (["export", "model.onnx"], 2, "'model.onnx' is an exported file"),
    "sparsify an exported file": (["sparsify", "model.pt2", "--data", "images"], 2, "is an exported file"),
    "info of an exported file": (["info", "model.onnx"], 2, "is an exported file"),
    "on a GPU": (["eval", "model.onnx", "images", "--device", "cuda"], 2, "--device cuda does not go with"),
    "another precision": (["eval", "model.onnx", "images", "--precision", "bf16"], 2, "--precision bf16 does not go"),
    "another size": (["eval", "model.pt2", "images", "--img-size", "96"], 2, "is a file of its own"),
    "no such file": (["eval", "absent.onnx", "images"], 1, "there is no file 'absent.onnx'"),
    "no ONNX": (["eval", "text.onnx", "images"], 1, "'text.onnx' is damaged or no ONNX file"),
    "no pt2": (["eval", "text.pt2", "images"], 1, "'text.pt2' is damaged or no .pt2 file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_clear_sentence_and_writes_nothing(mistake, place, capsys):
    arguments, exit_code, message = MISTAKES[mistake]
    (place / "dir.onnx").mkdir()
    for name in ("text.onnx", "text.pt2"):
        (place / name).write_text("not a model")
    before = sorted(place.rglob("*"))
    assert run(arguments) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert sorted(place.rglob("*")) == before


def test_without_the_extra_the_way_out_is_said(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for arguments in (["export", ".", "--overwrite"], ["eval", "model.onnx", "images"]):
        assert run(arguments) == 1
        assert 'hint: pip install "vitprune[onnx]"' in capsys.readouterr().err


QUICK = ["--seconds", "0.01", "--json"]


def test_exported_files_are_timed_beside_others_and_alone(place, monkeypatch, capsys):
    monkeypatch.setattr("vitprune.measure.runner.MIN_WARM_UP_S", 0.0)
    assert run(["bench", "model.safetensors", "model.onnx", "model.pt2", "-b", "2", *QUICK]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["label"] for row in rows] == ["dense", "keep 0.5", "model.onnx fp32", "model.pt2 fp32"]
    assert [row["keep"] for row in rows] == [1.0, 0.5, 0.5, 0.5]
    assert rows[2]["gmacs"] == rows[3]["gmacs"] == rows[1]["gmacs"] < rows[0]["gmacs"]
    assert rows[2]["peak_memory_mib"] is None
    assert run(["bench", "model.onnx", "model.pt2", "-b", "1", *QUICK]) == 0
    onnx, pt2 = json.loads(capsys.readouterr().out)["rows"]
    assert run(["bench", "model.onnx", "-b", "1", "--seconds", "0.01"]) == 0
    assert "compared with 'model.onnx fp32', the first file: none of them is dense" in capsys.readouterr().out
    assert (onnx["speedup"], onnx["kind"], onnx["macs_ratio"], pt2["macs_ratio"]) == (1.0, "sparse", 1.0, 1.0)
    assert pt2["speedup"] == pytest.approx(pt2["images_per_s"] / onnx["images_per_s"])


def test_a_dense_file_is_what_others_are_compared_with(place, weights_file, monkeypatch, capsys):
    monkeypatch.setattr("vitprune.measure.runner.MIN_WARM_UP_S", 0.0)
    size = ["--img-size", "64", "-o", "dense.onnx"]
    assert run(["export", "test_vit", "--checkpoint", str(weights_file), *size]) == 0
    capsys.readouterr()
    assert run(["bench", "model.onnx", "dense.onnx", "-b", "1", *QUICK]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["kind"], row["label"]) for row in rows] == [
        ("sparse", "model.onnx fp32"),
        ("dense", "dense.onnx fp32"),
    ]
    assert rows[1]["speedup"] == 1.0
    assert rows[0]["macs_ratio"] == pytest.approx(rows[1]["gmacs"] / rows[0]["gmacs"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.onnx", "--device", "cuda"], "exported files run on the CPU"),
        (["model.onnx", "--precision", "bf16"], "--precision bf16 does not go with"),
        (["model.onnx", "--mode", "compile"], "--mode compile does not go with 'model.onnx'"),
        (["test_vit", "model.onnx"], "so they cannot be timed on the same ones"),
        (["model.onnx", "--img-size", "96"], "is a file of its own"),
    ],
)
def test_what_cannot_be_timed_is_said(place, arguments, said, capsys):
    assert run(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err
