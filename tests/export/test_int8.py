"""INT8: calibrated on images, compared on others, refused where it keeps too little, and smaller."""

import json
from pathlib import Path

import pytest
import torch

import vitprune
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.cli.app import run
from vitprune.errors import ExportError, UsageError
from vitprune.export.formats import FORMATS
from vitprune.export.int8 import Quantisation
from vitprune.loading.load import load_model
from vitprune.measure import count_params

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

COOKBOOK = (Path(__file__).parents[2] / "examples" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_demo_keeps_its_predictions_in_half_the_space(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = "vitprune export demo --precision int8 --data demo --calibrate 32 --limit 40"
    assert command in COOKBOOK
    assert run([*command.split()[1:], "--min-agreement", "95", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["precision"] == "int8"
    assert result["agreement"]["num_images"] == 40, "no noise"
    assert result["agreement"]["agreement_pct"] >= 95
    (small,) = tmp_path.glob("*.onnx")
    assert small.stat().st_size < 0.6 * 4 * count_params(load_model("demo").model)


@pytest.fixture(scope="module")
def settings(make_image_folder, tmp_path_factory):
    return {"precision": "int8", "data": make_image_folder(tmp_path_factory.mktemp("int8") / "images"), "limit": 4}


@pytest.fixture(scope="module")
def eight(exported, settings, tmp_path_factory):
    """The small model in 8 bits, whatever it keeps."""
    output = tmp_path_factory.mktemp("int8") / "m.onnx"
    return vitprune.export_model(exported.sparse, output, min_agreement=0, **settings)


def test_all_is_quantised_but_what_chooses_tokens(eight, exported):
    assert eight.precision == "int8"
    program = read_onnx(eight.output)
    assert program.precision == "int8"
    assert program.metadata.keep == exported.metadata.keep
    nodes = onnx.load(eight.output).graph.node
    products = [node for node in nodes if node.op_type in ("MatMul", "Gemm")]
    in_eight = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    quantised = {node.name for node in products if in_eight & {*node.input}}
    choosing = {node.name for node in products if node.name.startswith("predictors.")}
    assert quantised
    assert choosing
    assert not quantised & choosing


def test_what_keeps_too_few_decisions_is_not_kept(eight, exported, settings, tmp_path, monkeypatch):
    spoilt = _always_the_first_class(eight.output)
    written = FORMATS["onnx"]._replace(write=lambda model, metadata, path, target: path.write_bytes(spoilt))
    monkeypatch.setitem(FORMATS, "onnx", written)
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
    with pytest.raises(ExportError, match="there are no 4 images to calibrate 8 bits by"):
        Quantisation([torch.zeros(3, 64, 64)] * 3).batches(4)
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
