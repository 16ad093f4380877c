"""INT8: calibrated on images, compared on others, refused where it keeps too little, and smaller."""

import json

import pytest
import torch

import vitprune
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.cli.app import run
from vitprune.errors import ExportError, UsageError
from vitprune.export.int8 import quantise

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.mark.slow
def test_the_demo_keeps_its_predictions_in_half_the_space(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["export", "demo", "-o", "demo.onnx"]) == 0
    capsys.readouterr()
    command = ["export", "demo", "--precision", "int8", "--data", "demo", "--calibrate", "32", "--limit", "40"]
    assert run([*command, "-o", "demo8.onnx", "--min-agreement", "95", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["precision"] == "int8"
    assert result["agreement"]["num_images"] == 40, "no noise"
    assert result["agreement"]["agreement_pct"] >= 95
    whole, small = (tmp_path / name for name in ("demo.onnx", "demo8.onnx"))
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    program = read_onnx(small)
    assert program.precision == "int8"
    assert program.metadata == read_onnx(whole).metadata
    eight = {node.input[0] for node in onnx.load(small).graph.node if node.op_type == "DequantizeLinear"}
    assert eight, "something is quantised"
    assert not [name for name in eight if "predictors" in name], "what chooses tokens is not"


def test_what_keeps_too_few_decisions_is_not_kept(exported, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"precision": "int8", "data": image_folder, "limit": 4}
    done = vitprune.export_model(exported.sparse, tmp_path / "m.onnx", min_agreement=0, **settings)
    assert done.precision == "int8"
    spoilt = lambda path, images, batch: path.write_bytes(_always_the_first_class(path))  # noqa: E731
    monkeypatch.setattr("vitprune.export.onnx_file.quantise", spoilt)
    with pytest.raises(ExportError, match=r"\d.\d % of class decisions are the same, and at least 100 % must be|off"):
        vitprune.export_model(exported.sparse, tmp_path / "bad.onnx", min_agreement=100, **settings)
    assert not (tmp_path / "bad.onnx").exists()


def _always_the_first_class(path):
    model = onnx.load(path)
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["inside" if name == output.name else name for name in node.output]
    bias = onnx.helper.make_tensor("bias", onnx.TensorProto.FLOAT, [1, 2], [1e4, 0.0])
    model.graph.initializer.append(bias)
    model.graph.node.append(onnx.helper.make_node("Add", ["inside", "bias"], [output.name]))
    return model.SerializeToString()


def test_calibration_needs_images(exported, tmp_path):
    path = vitprune.export_model(exported.sparse, tmp_path / "m.onnx", batch=4).output
    with pytest.raises(ExportError, match="there are no 4 images to calibrate 8 bits by"):
        quantise(path, [torch.zeros(3, 64, 64)] * 3, 4)
    with pytest.raises(UsageError, match="calibrated on images, and there is no data"):
        vitprune.export_model(exported.sparse, tmp_path / "n.onnx", precision="int8")
    with pytest.raises(UsageError, match=r"int8.* goes with .*onnx"):
        vitprune.export_model(exported.sparse, tmp_path / "n.pt2", precision="int8", data="demo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "there is no --data"),
        (["--calibrate", "8"], "are of --precision int8"),
        (["--half", "--precision", "int8", "--data", "demo"], "--half and --precision int8 contradict"),
        (["--precision", "int8", "--data", "demo", "-f", "pt2"], "goes with --format onnx"),
    ],
)
def test_options_that_do_not_go_together(exported, capsys, options, message):
    assert run(["export", str(exported.folder), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
