"""Every format against PyTorch, for a model of each kind that may trip an exporter."""

import copy
import json
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

import vitprune
from vitprune.backbones import input_size
from vitprune.checkpoint.metadata import METADATA_KEY
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.checkpoint.sparse_file import describe
from vitprune.errors import ExportError, OutputError
from vitprune.export import export, formats, onnx_file
from vitprune.export.target import Target
from vitprune.model import SparseViT

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 7}
PLAIN = {"name": "vit_tiny_patch16_224", **TINY}
MODELS = {
    "two stages": ({**PLAIN, "depth": 3}, "merge"),
    "attention pool": ({"name": "vit_base_patch16_siglip_224", **TINY}, "merge"),
    "rotary, average": ({"name": "vit_small_patch16_rope_mixed_224", **TINY, "global_pool": "avg"}, "drop"),
    "bias of pairs": ({"name": "beit_base_patch16_224", **TINY}, "merge"),
    "talking heads": ({"name": "cait_xxs24_224", **TINY}, "drop"),
    "LV-ViT": ({"name": "lvvit_t", **TINY, "stem_width": 16}, "merge"),
}


@pytest.fixture
def other(make_sparse):
    def get(kind) -> SparseViT:
        arguments, pruned = MODELS[kind]
        plain = make_sparse(**arguments, keep=0.6, prune_at=range(1, arguments["depth"]))
        return SparseViT(plain.model, plain.schedule, plain.predictors, pruned).eval()

    return get


def opened(path):
    return formats.FORMATS[formats.format_of(path)].read(path)


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


def assert_good(done, sparse, atol=2e-5):
    assert_same_answers(done.output, sparse, atol)
    assert done.agreement.batch_sizes == (1, 2, 5)
    assert done.agreement.max_difference < atol
    for word in (b"site-packages", b"model.py", b'.py"'):
        assert word not in done.output.read_bytes(), "no path of this machine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        *(("onnx", model) for model in ("two stages", "rotary, average", "bias of pairs")),
        *(("pt2", model) for model in ("two stages", "attention pool", "talking heads", "LV-ViT")),
    ],
)
def test_other_models(other, tmp_path, kind, model):
    sparse = other(model)
    done = export(sparse, describe(sparse), tmp_path / f"model.{kind}", kind)
    assert_good(done, sparse, atol=2e-5 if kind == "onnx" else 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a C++ compiler at work
def test_compiled_code_answers_and_says_what_it_is(other, tmp_path):
    sparse = other("attention pool")
    metadata = describe(sparse)
    done = export(sparse, metadata, tmp_path / "model.aoti.pt2", "aoti")
    assert (done.format, done.batch, done.agreement.batch_sizes) == ("aoti", None, (1, 2, 5))
    assert_same_answers(done.output, sparse, 1e-6)
    about = torch._inductor.aoti_load_package(str(done.output)).get_metadata()[METADATA_KEY]
    assert about == metadata.model_dump_json()


def test_without_a_compiler_that_is_what_is_said(exported, tmp_path, monkeypatch):
    def missing(*arguments, **settings):
        raise InvalidCxxCompiler("g++")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", missing)
    with pytest.raises(ExportError, match=r"AOTInductor cannot convert the model: .*not found") as caught:
        vitprune.export_model(exported.sparse, tmp_path / "model.aoti.pt2")
    assert caught.value.hint == "install a C++ compiler: g++ or clang++"
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_runs_without_vitprune(exported):
    """By the names and with the facts that it itself gives."""
    assert_good(exported.onnx, exported.sparse)
    path, metadata = exported.onnx.output, exported.metadata
    graph = onnx.load(path)
    assert {entry.key: entry.value for entry in graph.metadata_props} == {METADATA_KEY: metadata.model_dump_json()}
    about = json.loads(graph.metadata_props[0].value)
    assert about["class_names"] == ["cat", "dog"]
    assert about["preprocessing"]["input_size"] == [3, 64, 64]
    session = runtime.InferenceSession(path)
    images = images_for(exported.sparse.model, 3)
    (logits,) = session.run(["logits"], {"images": np.asarray(images)})
    with torch.no_grad():
        np.testing.assert_allclose(logits, exported.sparse(images), rtol=0, atol=2e-5)
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    assert read_onnx(path).metadata == metadata


def test_timm_opens_the_folder_by_itself(exported, tmp_path):
    done = export(exported.sparse, exported.metadata, tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{done.output}", pretrained=True).eval()
    images = images_for(model, 3)
    with torch.no_grad():
        assert torch.equal(model(images), exported.sparse.model(images))
    assert model.pretrained_cfg["label_names"] == ["cat", "dog"]
    assert model.pretrained_cfg["license"] == "mit", "not what timm says of the architecture's default weights"
    assert model.pretrained_cfg.keys().isdisjoint({"tag", "origin_url"})
    assert done.agreement.max_difference == 0
    assert sorted(path.name for path in done.output.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_fp16_halves_the_weights_and_leaves_the_scores_alone(exported, tmp_path):
    sparse = exported.sparse
    before = copy.deepcopy(sparse.state_dict())
    done = export(sparse, describe(sparse), tmp_path / "model.onnx", "onnx", Target("fp16"))
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(done.output).graph.initializer}
    weights = {name: kind for name, kind in kinds.items() if name.endswith(".weight") or "proj" in name}
    halved = {name: kind == onnx.TensorProto.FLOAT16 for name, kind in weights.items()}
    assert any("predictors" in name for name in halved)
    assert all(half != ("predictors" in name) for name, half in halved.items())
    assert read_onnx(done.output).precision == "fp16"
    assert 0 < done.agreement.typical_difference < 0.25
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())


def test_from_python_by_the_name_of_the_output(exported, tmp_path):
    model = copy.deepcopy(exported.sparse).train()
    modes = [module.training for module in model.modules()]
    done = vitprune.export_model(model, tmp_path / "model.pt2", class_names=["cat", "dog"])
    assert done.format == "pt2"
    assert [module.training for module in model.modules()] == modes, "the model is not changed"
    assert_good(done, exported.sparse, atol=1e-6)
    extra = {"vitprune.json": ""}
    program = torch.export.load(done.output, extra_files=extra)
    assert json.loads(extra["vitprune.json"])["class_names"] == ["cat", "dog"]
    # No switch of autocast, no assertion on data: what runtimes would stumble over. Only sizes are reckoned with.
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    of_sizes = {f"<built-in function {name}>" for name in ("getitem", "add", "mul")}
    assert {name for name in called if not name.startswith("aten.")} <= of_sizes
    with pytest.raises(OutputError, match="exists"):
        vitprune.export_model(model, tmp_path / "model.pt2")
    assert vitprune.export_model(model.model, tmp_path / "folder").format == "timm", "dense"
    with pytest.raises(OutputError, match=r"does not say its format: its ending is '\.trt'"):
        vitprune.export_model(model, tmp_path / "model.trt")


class _Wrong(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(images, self.model(images))


def _another_class(images, logits):
    return logits if len(images) < 5 else torch.cat((logits[:-1], logits[-1:].roll(1, dims=1)))


def test_a_file_that_computes_something_else_or_does_not_open_is_not_kept(exported, tmp_path, monkeypatch):
    sparse, real = exported.sparse, dict(formats.FORMATS)

    def refused(kind, message, **functions):
        monkeypatch.setitem(formats.FORMATS, kind, real[kind]._replace(**functions))
        with pytest.raises(ExportError, match=message):
            export(sparse, exported.metadata, tmp_path / f"model.{kind}", kind)
        assert list(tmp_path.iterdir()) == []

    for kind, model in (("onnx", sparse), ("timm", sparse.model)):
        for change, message in (
            (lambda images, logits: logits * 1.02, "typical image"),
            (lambda images, logits: logits + 0.1 * (len(images) == 1), "typical image"),
            (lambda images, logits: logits.log(), "not finite"),
            (_another_class, "clear class decisions change"),
        ):
            wrong = _Wrong(model, change)
            refused(kind, message, write=lambda *arguments: None, read=lambda path, wrong=wrong: wrong)
    damaged = r"cannot be opened again: .* is damaged or no ONNX file"
    refused(
        "onnx",
        damaged,
        write=lambda model, metadata, path, target: path.write_bytes(b"\xff" * 100),
        read=real["onnx"].read,
    )


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_and_leaves_nothing(exported, tmp_path):
    class Branching(nn.Module):
        def forward(self, patches, kept=None):
            share = 0.5 if patches.sum() > 0 else 0.2
            return torch.stack((patches[..., 0] * share, patches[..., 1]), dim=-1)

    plain = exported.sparse
    sparse = SparseViT(plain.model, plain.schedule, [Branching()], "merge", balance=0.1, beta=1.0).eval()
    for kind in ("onnx", "pt2"):
        with pytest.raises(ExportError, match=r"torch.*cannot export the model.*data-dependent"):
            export(sparse, describe(plain), tmp_path / f"model.{kind}", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_the_limit_of_the_format_is_refused(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_MAX_ONNX_BYTES", 1000)
    with pytest.raises(ExportError, match="one ONNX file holds 2") as caught:
        export(exported.sparse, exported.metadata, tmp_path / "model.onnx", "onnx")
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
    onnx_file.write_onnx(model, exported.metadata.model_copy(update={"class_names": None}), tmp_path / "clamped.onnx")
    images = 3 * torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(2, 3, 64, 64)
    torch.testing.assert_close(read_onnx(tmp_path / "clamped.onnx")(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_missing_package_is_named_with_the_extra(exported, tmp_path, monkeypatch):
    for missing in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            with pytest.raises(ExportError, match=f"'{missing}'") as caught:
                export(exported.sparse, exported.metadata, tmp_path / "model.onnx", "onnx")
            assert caught.value.hint == "pip install onnx onnxscript onnxruntime"
            with pytest.raises(ExportError, match=f"'{missing}'"):
                read_onnx(tmp_path / "model.onnx")
