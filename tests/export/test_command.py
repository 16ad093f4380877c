"""vitprune export, and what eval makes of its files."""

import json
import shutil
import sys

import pytest

from vitprune.cli.app import run

pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture
def place(exported, image_folder, tmp_path, monkeypatch, no_hub):
    """A copy of the model's folder with images of its two classes, as current directory."""
    monkeypatch.chdir(shutil.copytree(exported.folder, tmp_path, dirs_exist_ok=True))
    return tmp_path


def test_an_onnx_file_evaluates_as_the_file_it_was_made_from(place, capsys):
    results = {}
    for name in ("model.safetensors", "model.onnx"):
        assert run(["eval", name, "images", "-j", "0", "--json"]) == 0
        results[name] = json.loads(capsys.readouterr().out)
        assert run(["eval", name, "images", "-j", "0"]) == 0
        assert "keep 0.5: " in capsys.readouterr().out
    assert results["model.safetensors"]["num_images"] == 6
    assert results["model.onnx"] == results["model.safetensors"]
    assert results["model.onnx"]["keep"] == 0.5
    assert [row["name"] for row in results["model.onnx"]["classes"]] == ["cat", "dog"]


def test_timm_folder_beside_the_file_holds_the_backbone(place, capsys):
    assert run(["export", "model.safetensors", "--format", "timm", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["output"], result["keep"]) == ("timm", 1.0)
    assert result["agreement"]["max_difference"] == 0
    assert run(["eval", "timm", "images", "-j", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["classes"]] == ["cat", "dog"]
    assert run(["export", "model.safetensors", "--format", "timm"]) == 2
    assert "the output 'timm' exists" in capsys.readouterr().err
    (place / "timm" / "notes.txt").write_text("mine")
    assert run(["export", ".", "--format", "timm", "--overwrite", "--data", "images", "--limit", "5"]) == 0
    out, err = capsys.readouterr()
    for words in (
        "mine, dense: timm, fp32",
        "beside PyTorch in fp32 on 12 random images and 5 images, in batches of 1, 2, 5: logits differ by",
        "written to timm",
    ):
        assert words in out
    assert "exporting mine" in err
    assert (place / "timm" / "notes.txt").read_text() == "mine", "what vitprune did not write stays"
    assert {path.name for path in place.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.slow
def test_comparison_on_real_images_and_what_is_said_of_it(place, capsys):
    assert run(["export", ".", "--format", "pt2", "--precision", "fp16", "--data", "images", "--limit", "5"]) == 0
    out, err = capsys.readouterr()
    assert "mine, keep 0.5: pt2, fp16" in out
    assert "beside PyTorch in fp32 on 12 random images and 5 images, in batches of 1, 2, 5: logits differ by" in out
    assert "written to model-fp16.pt2" in out
    assert "exporting mine" in err
    assert (place / "model-fp16.pt2").exists()


def test_a_dense_model_goes_to_the_working_directory(place, weights_file, capsys):
    assert run(["export", "test_vit", "--checkpoint", str(weights_file), "--format", "timm", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["output"], result["keep"], result["num_classes"]) == ("test_vit-timm", 1.0, 2)
    assert result["input_size"] == [3, 160, 160]
    assert run(["eval", "test_vit-timm", "images", "-j", "0"]) == 0
    assert "% top-1" in capsys.readouterr().out


MISTAKES = [
    (["export", "."], 2, "the output 'model.onnx' exists"),
    (["export", ".", "-o", "model.bin"], 2, "the output 'model.bin' is not the name of a .onnx file"),
    (["export", ".", "-o", "a.onnx", "--format", "pt2"], 2, "not the name of a .pt2 file"),
    (["export", ".", "-o", "a.aoti.pt2", "--format", "pt2"], 2, "not the name of a .pt2 file"),
    (["export", ".", "-o", "a.pt2", "--format", "aoti"], 2, "not the name of a .aoti.pt2 file"),
    (["export", ".", "--format", "aoti", "--precision", "int8"], 2, "goes with --format onnx or openvino, not aoti"),
    (["export", ".", "--format", "inductor"], 2, "--format aoti"),
    (["export", ".", "--format", "mlpackage"], 2, "--format coreml"),
    (["export", ".", "-o", "dir.onnx"], 2, "the output 'dir.onnx' is a folder"),
    (["export", ".", "-o", "model.onnx", "--format", "timm"], 2, "is a file, not a folder"),
    (["export", ".", "-o", ".", "--format", "timm", "--overwrite"], 2, "would replace"),
    (["export", ".", "-o", "absent/model.onnx"], 2, "there is no folder 'absent' to write to"),
    (["export", ".", "--format", "tflite"], 2, "--format is 'tflite', expected one of"),
    (["export", ".", "--format", "timm", "--precision", "fp16"], 2, "is written in fp32"),
    (["export", ".", "--limit", "3"], 2, "there is no --data"),
    (["export", ".", "-o", "b.onnx", "--data", "nowhere"], 2, "the data 'nowhere' was not found"),
    (["export", "model.onnx"], 2, "'model.onnx' is an exported file"),
    (["sparsify", "model.onnx", "--data", "images"], 2, "is an exported file"),
    (["info", "model.onnx"], 2, "is an exported file"),
    (["eval", "model.onnx", "images", "--device", "cuda"], 2, "--device cuda does not go with"),
    (["eval", "model.onnx", "images", "--precision", "bf16"], 2, "--precision bf16 does not go"),
    (["eval", "model.onnx", "images", "--img-size", "96"], 2, "has an image size of its own"),
    (["eval", "text.onnx", "images"], 1, "'text.onnx' is damaged or no ONNX file"),
    (["eval", "model.pt2", "images"], 2, "'model.pt2' is a program of PyTorch"),
    (["bench", "model.pt2"], 2, "'model.pt2' is a program of PyTorch"),
    (["bench", "model.aoti.pt2"], 2, "torch._inductor.aoti_load_package"),
    (["bench", "model.onnx", "--device", "cuda"], 2, "exported files run on the CPU"),
    (["bench", "model.onnx", "--precision", "bf16"], 2, "--precision bf16 does not go with"),
    (["bench", "model.onnx", "--mode", "compile"], 2, "--mode compile does not go with 'model.onnx'"),
    (["bench", "model.onnx", "--keep", "0.5"], 2, "'model.onnx' has its own plan"),
    (["export", ".", "--format", "tensorrt"], 2, "--format onnx, then trtexec --onnx=model.onnx"),
    (["export", ".", "--format", "ir"], 2, "--format openvino"),
    (["bench", "test_vit", "model.onnx"], 2, "so they cannot be timed on the same ones"),
]


def test_mistakes_get_one_clear_sentence_and_write_nothing(place, capsys):
    (place / "dir.onnx").mkdir()
    (place / "text.onnx").write_text("not a model")
    before = sorted(place.rglob("*"))
    for arguments, exit_code, message in MISTAKES:
        assert run(arguments) == exit_code, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.startswith("error: ")
        assert sorted(place.rglob("*")) == before


def test_without_the_extra_the_way_out_is_said(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for arguments in (["export", ".", "--overwrite"], ["eval", "model.onnx", "images"]):
        assert run(arguments) == 1
        assert "hint: pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


QUICK = ["--seconds", "0.01", "--json"]


def test_exported_files_are_timed_beside_others_and_alone(place, capsys):
    assert run(["bench", "model.safetensors", "model.onnx", "-b", "2", *QUICK]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["label"] for row in rows] == ["dense", "keep 0.5", "model.onnx fp32"]
    assert [row["keep"] for row in rows] == [1.0, 0.5, 0.5]
    assert rows[2]["gmacs"] == rows[1]["gmacs"] < rows[0]["gmacs"]
    assert rows[2]["peak_memory_mib"] is None
    assert run(["bench", "model.safetensors", "model.onnx", "-b", "2", "--seconds", "0.01"]) == 0
    assert "exported files run in engines of their own and dense in PyTorch" in capsys.readouterr().out
    shutil.copy("model.onnx", "other.onnx")
    assert run(["bench", "model.onnx", "other.onnx", "-b", "1", *QUICK]) == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert (first["speedup"], first["kind"], first["macs_ratio"], second["macs_ratio"]) == (1.0, "sparse", 1.0, 1.0)
    assert second["speedup"] == pytest.approx(second["images_per_s"] / first["images_per_s"])
    assert run(["bench", "model.onnx", "-b", "1", "--seconds", "0.01"]) == 0
    assert "compared with 'model.onnx fp32', the first file: none is dense" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dense_file_is_what_others_are_compared_with(place, weights_file, capsys):
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
