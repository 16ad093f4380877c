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
from vitprune.checkpoint.sparse_file import describe
from vitprune.errors import CheckpointError, ExportError, OutputError, UsageError
from vitprune.export import Program, export, export_model, open_program
from vitprune.export.onnx_file import write_onnx
from vitprune.model import SparseViT

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 7}
PLAIN = {"name": "vit_tiny_patch16_224", **TINY, "depth": 3}
MODELS = {
    "plain": (PLAIN, "fold"),
    "small": ({**PLAIN, "depth": 2}, "fold"),
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
    """A plain model and what was made of it, by format."""
    folder, sparse = tmp_path_factory.mktemp("exported"), build()
    names = tuple("abcdefg")
    metadata = describe(sparse, name="mine", class_names=names, origin={"license": "mit"})
    done = {kind: export(sparse, metadata, folder / f"model.{kind}", kind) for kind in ("onnx", "pt2")}
    done["timm"] = export(sparse, metadata, folder / "timm", "timm")
    return sparse, metadata, done


def images_for(model, count, seed=1):
    size = input_size(model)
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def assert_same_answers(program, sparse, atol=2e-5):
    for count in (1, 4):  # neither is traced, 4 is not compared by the export either
        images = images_for(sparse.model, count)
        with torch.no_grad():
            expected = sparse(images)
            assert not torch.allclose(expected, sparse.model(images), atol=1e-2), "dropping must matter"
            torch.testing.assert_close(program(images), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_file_computes_what_the_model_does(exported, kind):
    sparse, metadata, done = exported
    program = open_program(done[kind].output)
    assert_same_answers(program, sparse)
    assert program.metadata == metadata
    assert (program.num_classes, program.precision) == (7, "fp32")
    agreement = done[kind].agreement
    assert agreement.batch_sizes == (1, 2, 5)
    assert agreement.max_logit_difference < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rotary, average", "bias of pairs"])
def test_other_families_in_onnx(build, tmp_path, kind):
    sparse = build(kind)
    done = export(sparse, describe(sparse), tmp_path / "model.onnx", "onnx")
    assert_same_answers(open_program(done.output), sparse)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention pool", "talking heads", "LV-ViT"])
def test_other_families_in_pt2(build, tmp_path, kind):
    sparse = build(kind)
    done = export(sparse, describe(sparse), tmp_path / "model.pt2", "pt2")
    assert done.agreement.max_logit_difference < 1e-6
    assert_same_answers(open_program(done.output), sparse, atol=1e-6)


def test_onnx_runs_without_vitprune(exported):
    """In onnxruntime alone, by the names and with the facts that the file itself gives."""
    sparse, metadata, done = exported
    graph = onnx.load(done["onnx"].output)
    assert {entry.key: entry.value for entry in graph.metadata_props} == {METADATA_KEY: metadata.model_dump_json()}
    about = json.loads(graph.metadata_props[0].value)
    assert about["class_names"] == list("abcdefg")
    assert about["preprocessing"]["input_size"] == [3, 64, 64]
    session = runtime.InferenceSession(done["onnx"].output)
    images = np.asarray(images_for(sparse.model, 3))
    (logits,) = session.run(["logits"], {"images": images})
    with torch.no_grad():
        np.testing.assert_allclose(logits, sparse(torch.from_numpy(images)), rtol=0, atol=2e-5)
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_file_does_not_tell_paths_of_this_machine(exported, kind):
    content = exported[2][kind].output.read_bytes()
    for word in (b"site-packages", b"model.py", b'.py"'):
        assert word not in content


def test_timm_opens_the_folder_by_itself(exported):
    sparse, _, done = exported
    model = timm.create_model(f"local-dir:{done['timm'].output}", pretrained=True).eval()
    images = images_for(sparse.model, 3)
    with torch.no_grad():
        assert torch.equal(model(images), sparse.model(images))
    assert model.pretrained_cfg["label_names"] == list("abcdefg")
    assert done["timm"].agreement.max_logit_difference == 0
    assert sorted(path.name for path in done["timm"].output.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_fp16_halves_the_weights_and_leaves_the_scores_alone(build, tmp_path):
    sparse = build("small")
    before = copy.deepcopy(sparse.state_dict())
    done = export(sparse, describe(sparse), tmp_path / "model.onnx", "onnx", "fp16")
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(done.output).graph.initializer}
    weights = {name: kind for name, kind in kinds.items() if name.endswith(".weight") or "proj" in name}
    halved = {name: kind == onnx.TensorProto.FLOAT16 for name, kind in weights.items()}
    assert any("predictors" in name for name in halved)
    assert all(half != ("predictors" in name) for name, half in halved.items())
    assert open_program(done.output).precision == "fp16"
    assert 0 < done.agreement.typical_difference < 0.25
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())


def test_from_python_a_dense_model_by_the_name_of_the_output(make_vit, tmp_path):
    model = make_vit(**PLAIN).train()
    done = vitprune.export_model(model, tmp_path / "dense.pt2", class_names=list("abcdefg"))
    assert done.format == "pt2"
    assert model.training, "the model is left as it is"
    program = open_program(tmp_path / "dense.pt2")
    assert program.metadata.label == "dense"
    assert program.metadata.class_names == list("abcdefg")
    images = images_for(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model.eval()(images), rtol=0, atol=1e-6)
    with pytest.raises(OutputError, match="exists"):
        export_model(model, tmp_path / "dense.pt2")


class _Wrong(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(images, self.model(images))


def _only_alone(images, logits):
    return logits + 0.1 * (len(images) == 1)


def _not_a_number(images, logits):
    return logits.log()


def _another_class(images, logits):
    return logits if len(images) < 5 else torch.cat((logits[:-1], logits[-1:].roll(1, dims=1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, logits: logits * 1.02, "typical image"),
        (_only_alone, "typical image"),
        (_not_a_number, "not finite"),
        (_another_class, "clear answers are another class"),
    ],
)
@pytest.mark.parametrize("kind", ["onnx", "timm"])
def test_a_file_that_computes_something_else_is_not_kept(build, tmp_path, monkeypatch, kind, change, message):
    sparse = build()
    model = sparse.model if kind == "timm" else sparse
    monkeypatch.setattr("vitprune.export.job.write_onnx", lambda *arguments: None)
    monkeypatch.setattr(f"vitprune.export.job.read_{kind}", lambda path: _Wrong(model, change))
    with pytest.raises(ExportError, match=message):
        export(sparse, describe(sparse), tmp_path / f"model.{kind}", kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_and_leaves_nothing(build, tmp_path):
    class Branching(nn.Module):
        def forward(self, patches, kept=None):
            share = 0.5 if patches.sum() > 0 else 0.2
            return torch.stack((patches[..., 0] * share, patches[..., 1]), dim=-1)

    plain = build("small")
    sparse = SparseViT(plain.model, plain.schedule, [Branching()], "fold").eval()
    for kind in ("onnx", "pt2"):
        with pytest.raises(ExportError, match=r"torch.*cannot export the model.*data-dependent"):
            export(sparse, describe(plain), tmp_path / f"model.{kind}", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_the_limit_of_the_format_is_refused(build, tmp_path, monkeypatch):
    monkeypatch.setattr("vitprune.export.onnx_file._MAX_BYTES", 1000)
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

    metadata, model = exported[1], Clamped().eval()
    write_onnx(model, torch.zeros(3, 3, 64, 64), metadata, tmp_path / "clamped.onnx")
    images = 3 * torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(2, 3, 64, 64)
    torch.testing.assert_close(open_program(tmp_path / "clamped.onnx")(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_program_is_a_module_like_any_other(exported):
    sparse, _, done = exported
    program = open_program(done["onnx"].output)
    assert isinstance(program, Program)
    assert copy.deepcopy(program).to(torch.bfloat16).eval() is program
    images = images_for(sparse.model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = program(images)
    assert torch.equal(mixed, program(images)), "it knows one precision"
    assert program(images.bfloat16()).dtype == torch.float32
    with pytest.raises(UsageError, match=r"takes images of \(batch, 3, 64, 64\), got \(2, 3, 32, 32\)"):
        program(images[..., :32, :32])


def test_a_run_that_fails_is_an_error_of_ours(exported):
    program = open_program(exported[2]["onnx"].output)

    def broken(images):
        raise RuntimeError("bad allocation")

    program.run = (broken,)
    with pytest.raises(vitprune.VitpruneError, match="stopped at a batch of 2: bad allocation"):
        program(images_for(exported[0].model, 2))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(build, exported, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    sparse = build()
    with pytest.raises(ExportError, match=f"'{missing}'") as caught:
        export(sparse, describe(sparse), tmp_path / "model.onnx", "onnx")
    assert caught.value.hint == 'pip install "vitprune[onnx]"'
    with pytest.raises(ExportError, match=f"'{missing}'"):
        open_program(exported[2]["onnx"].output)


@pytest.mark.slow
@pytest.mark.parametrize("dropped", ["fold", "drop"])
def test_the_model_compiles_whole(build, make_images, dropped):
    """Without a graph break, and for other batch sizes than the first."""
    sparse = build("small", dropped)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    with torch.no_grad():
        for count in (2, 3):
            images = images_for(sparse.model, count)
            assert torch.equal(compiled(images), sparse(images))


@pytest.mark.slow
def test_the_graph_holds_plain_operators_only(build):
    """No switch of autocast, no assertion on data: what runtimes would stumble over. Only sizes are reckoned with."""
    sparse = build("small")
    program = torch.export.export(
        sparse, (images_for(sparse.model, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    of_sizes = {f"<built-in function {name}>" for name in ("getitem", "add", "mul")}
    assert {name for name in called if not name.startswith("aten.")} <= of_sizes


def test_what_is_no_program_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        open_program(tmp_path / "absent.onnx")
    with pytest.raises(CheckpointError, match="there is no file"):
        open_program(tmp_path / "absent.pt2")
