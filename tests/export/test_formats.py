"""Every format against PyTorch, for a model of each kind that may trip an exporter."""

import copy
import json
import sys

import numpy as np
import pytest
import timm
import torch
from agreement import calm_attention
from torch import nn

import vitprune
from vitprune.backbones import input_size
from vitprune.checkpoint.metadata import METADATA_KEY
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.checkpoint.sparse_file import describe
from vitprune.errors import ExportError, OutputError
from vitprune.export import export, export_model, formats
from vitprune.model import SparseViT

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 7}
PLAIN = {"name": "vit_tiny_patch16_224", **TINY}
MODELS = {
    "plain": (PLAIN, "fold"),
    "two stages": ({**PLAIN, "depth": 3}, "fold"),
    "attention pool": ({"name": "vit_base_patch16_siglip_224", **TINY}, "fold"),
    "rotary, average": ({"name": "vit_small_patch16_rope_mixed_224", **TINY, "global_pool": "avg"}, "drop"),
    "bias of pairs": ({"name": "beit_base_patch16_224", **TINY}, "fold"),
    "talking heads": ({"name": "cait_xxs24_224", **TINY}, "drop"),
    "LV-ViT": ({"name": "lvvit_t", **TINY, "stem_width": 16}, "fold"),
}


@pytest.fixture(scope="module")
def build(make_sparse):
    def get(kind="plain", dropped=None) -> SparseViT:
        arguments, usual = MODELS[kind]
        plain = make_sparse(**arguments, keep=0.6, stages=range(1, arguments["depth"]))
        calm_attention(plain.model)
        return SparseViT(plain.model, plain.schedule, plain.predictors, dropped or usual).eval()

    return get


@pytest.fixture(scope="module")
def exported(build, tmp_path_factory):
    """The smallest model and what was made of it, by format."""
    folder, sparse = tmp_path_factory.mktemp("exported"), build()
    metadata = describe(sparse, name="mine", class_names=tuple("abcdefg"), origin={"license": "mit"})
    done = {kind: export(sparse, metadata, folder / f"model.{kind}", kind) for kind in ("onnx", "pt2", "timm")}
    return sparse, metadata, done


def opened(path):
    return read_onnx(path) if path.suffix == ".onnx" else torch.export.load(path).module()


def images_for(model, count, seed=1):
    size = input_size(model)
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def assert_same_answers(path, sparse, atol=2e-5):
    program = opened(path)
    for count in (1, 4):  # neither is traced, 4 is not compared by the export either
        images = images_for(sparse.model, count)
        with torch.no_grad():
            expected = sparse(images)
            assert not torch.allclose(expected, sparse.model(images), atol=1e-2), "pruning must matter"
            torch.testing.assert_close(program(images), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_file_computes_what_the_model_does_and_names_no_path_of_this_machine(exported, kind):
    sparse, _, done = exported
    assert_same_answers(done[kind].output, sparse)
    assert done[kind].agreement.batch_sizes == (1, 2, 5)
    assert done[kind].agreement.max_logit_difference < 2e-5
    for word in (b"site-packages", b"model.py", b'.py"'):
        assert word not in done[kind].output.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        *(("onnx", model) for model in ("two stages", "rotary, average", "bias of pairs")),
        *(("pt2", model) for model in ("two stages", "attention pool", "talking heads", "LV-ViT")),
    ],
)
def test_other_models(build, tmp_path, kind, model):
    sparse = build(model)
    done = export(sparse, describe(sparse), tmp_path / f"model.{kind}", kind)
    assert_same_answers(done.output, sparse, atol=2e-5 if kind == "onnx" else 1e-6)


def test_files_run_without_vitprune(exported):
    """By the names and with the facts that they themselves give."""
    sparse, metadata, done = exported
    graph = onnx.load(done["onnx"].output)
    assert {entry.key: entry.value for entry in graph.metadata_props} == {METADATA_KEY: metadata.model_dump_json()}
    about = json.loads(graph.metadata_props[0].value)
    assert about["class_names"] == list("abcdefg")
    assert about["preprocessing"]["input_size"] == [3, 64, 64]
    session = runtime.InferenceSession(done["onnx"].output)
    images = images_for(sparse.model, 3)
    (logits,) = session.run(["logits"], {"images": np.asarray(images)})
    with torch.no_grad():
        np.testing.assert_allclose(logits, sparse(images), rtol=0, atol=2e-5)
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    assert read_onnx(done["onnx"].output).metadata == metadata
    extra = {"vitprune.json": ""}
    torch.export.load(done["pt2"].output, extra_files=extra)
    assert extra == {"vitprune.json": metadata.model_dump_json()}


def test_timm_opens_the_folder_by_itself(exported):
    sparse, _, done = exported
    model = timm.create_model(f"local-dir:{done['timm'].output}", pretrained=True).eval()
    images = images_for(sparse.model, 3)
    with torch.no_grad():
        assert torch.equal(model(images), sparse.model(images))
    assert model.pretrained_cfg["label_names"] == list("abcdefg")
    assert model.pretrained_cfg["license"] == "mit", "not what timm says of the architecture's default weights"
    assert model.pretrained_cfg.keys().isdisjoint({"tag", "origin_url"})
    assert done["timm"].agreement.max_logit_difference == 0
    assert sorted(path.name for path in done["timm"].output.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_fp16_halves_the_weights_and_leaves_the_scores_alone(build, tmp_path):
    sparse = build()
    before = copy.deepcopy(sparse.state_dict())
    done = export(sparse, describe(sparse), tmp_path / "model.onnx", "onnx", "fp16")
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(done.output).graph.initializer}
    weights = {name: kind for name, kind in kinds.items() if name.endswith(".weight") or "proj" in name}
    halved = {name: kind == onnx.TensorProto.FLOAT16 for name, kind in weights.items()}
    assert any("predictors" in name for name in halved)
    assert all(half != ("predictors" in name) for name, half in halved.items())
    assert read_onnx(done.output).precision == "fp16"
    assert 0 < done.agreement.typical_difference < 0.25
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())


def test_from_python_a_dense_model_by_the_name_of_the_output(make_vit, tmp_path):
    model = make_vit(**PLAIN).train()
    done = vitprune.export_model(model, tmp_path / "dense.pt2", class_names=list("abcdefg"))
    assert done.format == "pt2"
    assert model.training, "the model is not changed"
    images = images_for(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(opened(done.output)(images), model.eval()(images), rtol=0, atol=1e-6)
    with pytest.raises(OutputError, match="exists"):
        export_model(model, tmp_path / "dense.pt2")
    assert export_model(model, tmp_path / "folder").format == "timm"
    with pytest.raises(OutputError, match=r"does not say its format: its ending is '\.tflite'"):
        export_model(model, tmp_path / "dense.tflite")


class _Wrong(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(images, self.model(images))


def _another_class(images, logits):
    return logits if len(images) < 5 else torch.cat((logits[:-1], logits[-1:].roll(1, dims=1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, logits: logits * 1.02, "typical image"),
        (lambda images, logits: logits + 0.1 * (len(images) == 1), "typical image"),
        (lambda images, logits: logits.log(), "not finite"),
        (_another_class, "clear answers are another class"),
    ],
)
@pytest.mark.parametrize("kind", ["onnx", "timm"])
def test_a_file_that_computes_something_else_is_not_kept(build, tmp_path, monkeypatch, kind, change, message):
    sparse = build()
    model = sparse.model if kind == "timm" else sparse
    functions = formats.FormatFunctions(lambda *arguments: None, lambda path: _Wrong(model, change))
    monkeypatch.setitem(formats.FORMATS, kind, functions)
    with pytest.raises(ExportError, match=message):
        export(sparse, describe(sparse), tmp_path / f"model.{kind}", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_open_again_is_not_kept(build, tmp_path, monkeypatch):
    sparse = build()
    functions = formats.FORMATS["onnx"]._replace(write=lambda model, metadata, path: path.write_bytes(b"\xff" * 100))
    monkeypatch.setitem(formats.FORMATS, "onnx", functions)
    with pytest.raises(ExportError, match=r"cannot be opened again: .* is damaged or no ONNX file"):
        export(sparse, describe(sparse), tmp_path / "model.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_and_leaves_nothing(build, tmp_path):
    class Branching(nn.Module):
        def forward(self, patches, kept=None):
            share = 0.5 if patches.sum() > 0 else 0.2
            return torch.stack((patches[..., 0] * share, patches[..., 1]), dim=-1)

    plain = build()
    sparse = SparseViT(plain.model, plain.schedule, [Branching()], "fold").eval()
    for kind in ("onnx", "pt2"):
        with pytest.raises(ExportError, match=r"torch.*cannot export the model.*data-dependent"):
            export(sparse, describe(plain), tmp_path / f"model.{kind}", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_the_limit_of_the_format_is_refused(build, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_MAX_ONNX_BYTES", 1000)
    sparse = build()
    with pytest.raises(ExportError, match="one ONNX file holds 2") as caught:
        export(sparse, describe(sparse), tmp_path / "model.onnx", "onnx")
    assert "--format pt2" in caught.value.hint


@pytest.mark.slow
def test_bounds_that_the_optimiser_loses_are_found_again(exported, tmp_path):
    """As in Gemma: one tensor clamped twice, by buffers."""

    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in (("low", -0.5), ("lower", -1.0), ("high", 0.25), ("higher", 2.0)):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, images):
            x = images.mean(dim=(2, 3)) * 2
            return torch.cat((x.clamp(self.low, self.high), x.clamp(self.lower, self.higher), x[:, :1]), dim=1)

    model = Clamped().eval()
    formats.write_onnx(model, exported[1], tmp_path / "clamped.onnx")
    images = 3 * torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(2, 3, 64, 64)
    torch.testing.assert_close(read_onnx(tmp_path / "clamped.onnx")(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(build, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    sparse = build()
    with pytest.raises(ExportError, match=f"'{missing}'") as caught:
        export(sparse, describe(sparse), tmp_path / "model.onnx", "onnx")
    assert caught.value.hint == 'pip install "vitprune[onnx]"'
    with pytest.raises(ExportError, match=f"'{missing}'"):
        read_onnx(tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("dropped", ["fold", "drop"])
def test_the_model_compiles_whole(build, dropped):
    """Without a graph break, and for other batch sizes than the first."""
    sparse = build("plain", dropped)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    with torch.no_grad():
        for count in (2, 3):
            images = images_for(sparse.model, count)
            assert torch.equal(compiled(images), sparse(images))


def test_the_graph_holds_plain_operators_only(exported):
    """No switch of autocast, no assertion on data: what runtimes would stumble over. Only sizes are reckoned with."""
    graph = torch.export.load(exported[2]["pt2"].output).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    of_sizes = {f"<built-in function {name}>" for name in ("getitem", "add", "mul")}
    assert {name for name in called if not name.startswith("aten.")} <= of_sizes
