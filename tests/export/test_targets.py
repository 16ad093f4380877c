"""What a program is written for: any engine, a batch size, an opset."""

import json

import pytest
import torch

import vitprune
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.checkpoint.program import FixedBatch
from vitprune.cli.app import run
from vitprune.errors import UsageError
from vitprune.export.target import OPSETS
from vitprune.model import SparseViT

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

TINY = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 64, "num_classes": 7}
PLANS = {"merge": ("merge", 0.1, 1.0), "importance alone": ("merge", None, 0.0), "drop": ("drop", None, 0.0)}


@pytest.fixture(params=PLANS)
def sparse(make_sparse, request):
    plain = make_sparse("vit_tiny_patch16_224", keep=0.6, prune_at=(1, 2), **TINY)
    return SparseViT(plain.model, plain.schedule, plain.predictors, *PLANS[request.param]).eval()


@pytest.fixture
def images():
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_no_operator_that_an_engine_lacks(sparse, images):
    """CoreML cannot sort, take or scatter with any batch size, and onnxruntime infers no shape of a vector's norm."""
    program = torch.export.export(sparse, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    used = {str(node.target) for node in program.run_decompositions({}).graph.nodes if node.op == "call_function"}
    assert "aten.topk.default" in used
    lacking = ("sort", "take.", "scatter", "index_add", "index_put", "vector_norm", "nonzero", "one_hot", ".item")
    assert not [name for name in used for word in lacking if word in name]


@pytest.mark.parametrize("sparse", ["merge", "drop"], indirect=True)
def test_the_onnx_graph_is_plain(sparse, tmp_path):
    """One top-k a stage, of floats and of a constant count, as TensorRT takes it; no branch, loop or scatter."""
    assert all(block.attn.fused_attn for block in sparse.model.blocks)
    graph = onnx.shape_inference.infer_shapes(
        onnx.load(vitprune.export_model(sparse, tmp_path / "m.onnx").output)
    ).graph
    assert all(block.attn.fused_attn for block in sparse.model.blocks), "fused again after the export"
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("TopK") == 2
    assert not {"ScatterElements", "ScatterND", "NonZero", "If", "Loop", "OneHot", "Einsum", "Unique"} & set(kinds)
    assert kinds.count("Shape") <= 1, "sizes that are known are not computed"
    constants = {tensor.name for tensor in graph.initializer}
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for node in graph.node:
        if node.op_type == "TopK":
            assert node.input[1] in constants
            assert types[node.input[0]] == onnx.TensorProto.FLOAT


@pytest.mark.slow
@pytest.mark.parametrize("opset", [OPSETS[0], 22, OPSETS[-1]])
def test_every_opset_runs(make_sparse, images, tmp_path, opset):
    sparse = make_sparse("vit_tiny_patch16_224", keep=0.6, prune_at=(1,), **TINY | {"depth": 2})
    done = vitprune.export_model(sparse, tmp_path / "m.onnx", opset=opset)
    (version,) = [entry.version for entry in onnx.load(done.output).opset_import if not entry.domain]
    assert version == done.opset == opset
    with torch.no_grad():
        torch.testing.assert_close(read_onnx(done.output)(images), sparse(images), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_one_batch_size_and_what_it_makes_of_others(make_sparse, images, tmp_path, kind):
    sparse = make_sparse("vit_tiny_patch16_224", keep=0.6, prune_at=(1,), **TINY)
    done = vitprune.export_model(sparse, tmp_path / f"m.{kind}", batch=4)
    assert (done.batch, done.agreement.batch_sizes, done.agreement.num_images) == (4, (4,), 12)
    if kind == "onnx":
        program = read_onnx(done.output)
        shape = onnx.load(done.output).graph.input[0].type.tensor_type.shape
        assert [size.dim_value for size in shape.dim] == [4, 3, 64, 64]
        assert program.batch_size == 4
    else:
        program = FixedBatch(torch.export.load(done.output).module(), 4)
    with torch.no_grad():
        for count in (1, 4, 5):
            torch.testing.assert_close(program(images[:count]), sparse(images[:count]), rtol=0, atol=2e-5)


def test_a_fixed_batch_is_evaluated_and_timed_at_its_size(exported, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(exported.folder / "model.safetensors")
    assert run(["export", model, "--batch", "4", "--half", "-o", "four.onnx", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["batch"], result["opset"], result["precision"]) == (4, 20, "fp16")
    answers = []
    for name in (model, "four.onnx"):
        assert run(["eval", name, str(image_folder), "-j", "0", "-b", "5", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["num_images"] == answers[1]["num_images"] == 6
    assert answers[0]["top1_pct"] == pytest.approx(answers[1]["top1_pct"], abs=17), "one image of fp16"
    quick = ["--seconds", "0.01", "--json"]
    assert run(["bench", "four.onnx", "-b", "4", *quick]) == 0
    capsys.readouterr()
    assert run(["bench", "four.onnx", "-b", "1,4", *quick]) == 2
    assert "'four.onnx' takes batches of 4 only" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("output", "settings", "message"),
    [
        ("m", {"batch": 4}, "a timm folder takes any batch size"),
        ("m.onnx", {"batch": 0}, "batch must be at least 1, got 0"),
        ("m.pt2", {"opset": 20}, "opset is of ONNX files, and this is"),
        ("m.onnx", {"opset": 17}, "opset 17 is not supported"),
    ],
)
def test_what_cannot_be_asked_for(exported, tmp_path, output, settings, message):
    with pytest.raises(UsageError, match=message):
        vitprune.export_model(exported.sparse, tmp_path / output, **settings)
    assert not list(tmp_path.iterdir())


def test_half_contradicts_fp32(exported, capsys):
    assert run(["export", str(exported.folder), "--half", "--precision", "fp32"]) == 2
    assert "--half and --precision fp32 contradict each other" in capsys.readouterr().err
