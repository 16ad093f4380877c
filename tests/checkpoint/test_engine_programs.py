"""Files for engines of others: the model's answers from each, and clear words for any other file."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import vitprune
from vitprune.backbones import input_size
from vitprune.checkpoint.program import FixedBatch
from vitprune.cli.app import run
from vitprune.errors import CheckpointError, ExportError, UsageError
from vitprune.export.engines import runs_coreml
from vitprune.export.formats import FORMATS
from vitprune.measure import count_params
from vitprune.model import SparseViT

ENGINES = {"openvino": "openvino", "executorch": "executorch", "litert": "ai_edge_litert"}
"""Formats that vitprune runs, and the package that has to be there."""
PACKAGES = ENGINES | {"coreml": "coremltools"}
READ = {kind: FORMATS[kind].read for kind in ENGINES}
TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 2}
FAMILIES = {
    "registers and layer scale": {"name": "vit_small_patch14_reg4_dinov2", "img_size": 56},
    "rotary positions": {"name": "eva02_tiny_patch14_224", "img_size": 56},
    "attention pool": {"name": "vit_base_patch16_siglip_224", "img_size": 64},
    "bias of pairs": {"name": "beit_base_patch16_224", "img_size": 64},
}


@pytest.fixture(scope="module")
def sparse(make_sparse):
    return _merging(make_sparse, name="vit_tiny_patch16_224", img_size=64)


def _merging(make_sparse, **arguments):
    plain = make_sparse(**TINY, **arguments, keep=0.5, prune_at=(1,))
    return SparseViT(plain.model, plain.schedule, plain.predictors, "merge", balance=0.1, beta=1.0).eval()


def _recomputed(path):
    """A Core ML package, which runs on macOS only, by PyTorch."""
    from core_ml import run_package

    return FixedBatch(partial(run_package, path), 1)


@pytest.fixture(scope="module", params=ENGINES)
def kind(request):
    pytest.importorskip(ENGINES[request.param], reason=f"needs the extra {request.param}")
    return request.param


@pytest.fixture(scope="module")
def written(sparse, kind, tmp_path_factory):
    """A sparse model of two classes, exported, alone in a folder."""
    output = tmp_path_factory.mktemp(kind) / f"model{FORMATS[kind].ending}"
    return vitprune.export_model(sparse, output, class_names=("cat", "dog"))


def test_it_answers_as_the_model(sparse, kind, written):
    assert (written.format, written.precision, written.opset) == (kind, "fp32", 20 if FORMATS[kind].of_onnx else None)
    files = list(written.output.parent.iterdir())
    assert {path.stem for path in files} == {"model"}
    assert written.size_mib == pytest.approx(sum(path.stat().st_size for path in files) / 2**20)
    program = READ[kind](written.output)
    assert (program.num_classes, program.metadata.class_names) == (2, ["cat", "dog"])
    assert program.batch_size == written.batch == FORMATS[kind].batch
    for count in (1, 4):
        images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            torch.testing.assert_close(program(images), sparse(images), rtol=0, atol=1e-4)
            assert not torch.allclose(program(images), sparse.model(images), atol=1e-2), "pruning must matter"


def test_the_commands_take_it(sparse, kind, written, image_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    vitprune.save(sparse, "sparse.safetensors", class_names=("cat", "dog"))
    answers = []
    for name in ("sparse.safetensors", str(written.output)):
        assert run(["eval", name, str(image_folder), "-j", "0", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["top1_pct"])
    assert answers[0] == answers[1]
    assert run(["bench", str(written.output), "-b", "1", "--seconds", "0.01", "--json"]) == 0
    assert run(["export", "sparse.safetensors", "--format", kind, "-o", str(written.output)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"batch": 3}])
def test_other_precisions_and_one_batch_size(sparse, kind, tmp_path, settings):
    if settings.get("precision", "fp32") not in FORMATS[kind].precisions:
        pytest.skip(f"{kind} is not written in {settings['precision']}")
    done = vitprune.export_model(sparse, tmp_path / f"m{FORMATS[kind].ending}", **settings)
    program = READ[kind](done.output)
    assert program.precision == settings.get("precision", "fp32")
    assert program.batch_size == settings.get("batch", FORMATS[kind].batch)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(program(images), sparse(images), rtol=0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PACKAGES)
def test_other_families_answer_as_their_models(make_sparse, kind, family, tmp_path):
    pytest.importorskip(PACKAGES[kind], reason=f"needs the extra {kind}")
    sparse = _merging(make_sparse, **FAMILIES[family])
    done = vitprune.export_model(sparse, tmp_path / f"m{FORMATS[kind].ending}", precision="fp32")
    program = _recomputed(done.output) if kind == "coreml" else READ[kind](done.output)
    images = torch.randn(3, *input_size(sparse.model), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(program(images), sparse(images), rtol=0, atol=1e-4)
        assert not torch.allclose(sparse(images), sparse.model(images), atol=1e-2), "pruning must matter"


@pytest.mark.slow
@pytest.mark.skipif(runs_coreml(), reason="macOS compares")
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_core_ml_is_converted_and_what_was_not_checked_is_said(sparse, tmp_path, monkeypatch, capsys, precision):
    coreml = pytest.importorskip("coremltools", reason="needs the extra coreml")
    monkeypatch.chdir(tmp_path)
    vitprune.save(sparse, "s.safetensors", class_names=("cat", "dog"))
    options = [] if precision == "fp16" else ["--precision", precision]
    command = ["export", "s.safetensors", "--format", "coreml", *options]
    assert run(command) == 0
    output = "s.mlpackage" if precision == "fp16" else "s-fp32.mlpackage"
    said = capsys.readouterr().out
    assert f"converted to {output}, and not compared with PyTorch: coreml runs on macOS only" in said
    assert f"coreml, {precision}, " in said
    package = coreml.models.MLModel(output, skip_model_load=True)
    assert json.loads(package.user_defined_metadata["vitprune"])["class_names"] == ["cat", "dog"]
    about = package.get_spec().description
    assert ([each.name for each in about.input], [each.name for each in about.output]) == (["images"], ["logits"])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        off = (_recomputed(output)(images) - sparse(images)).abs().max()
    assert off < (0.05 if precision == "fp16" else 1e-4)
    size = sum(file.stat().st_size for file in Path(output).rglob("weight.bin"))
    assert size == pytest.approx(count_params(sparse) * (2 if precision == "fp16" else 4), rel=0.1)
    assert run(command) == 2
    assert "exists" in capsys.readouterr().err
    assert run([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"] is None
    assert run(["eval", output, "images"]) == 2
    assert f"'{output}' is a program of Core ML, which vitprune writes and does not run" in capsys.readouterr().err


@pytest.mark.skipif(runs_coreml(), reason="macOS compares")
def test_core_ml_compares_with_no_data_elsewhere(sparse, tmp_path):
    with pytest.raises(UsageError, match=r"data is for comparing, and format=\"coreml\" runs on macOS only"):
        vitprune.export_model(sparse, tmp_path / "m.mlpackage", data="demo")


def test_what_is_not_ours_or_not_whole(kind, written, tmp_path):
    copy = shutil.copytree(written.output.parent, tmp_path / "copy")
    file = copy / written.output.name
    file.write_bytes(b"<net")
    with pytest.raises(CheckpointError, match=f"cannot open .*{file.name}|'.*{file.name}' was not written by vitprune"):
        READ[kind](file)
    file.unlink()
    with pytest.raises(CheckpointError, match="not found"):
        READ[kind](file)


def test_openvino_files_are_two_and_may_be_foreign(tmp_path):
    openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
    parameter = openvino.opset13.parameter([1, 3, 64, 64])
    foreign = openvino.Model([openvino.opset13.relu(parameter)], [parameter])
    openvino.save_model(foreign, tmp_path / "foreign.xml")
    with pytest.raises(CheckpointError, match="was not written by vitprune"):
        READ["openvino"](tmp_path / "foreign.xml")
    (tmp_path / "foreign.bin").unlink()
    with pytest.raises(CheckpointError, match=r"foreign\.bin' not found"):
        READ["openvino"](tmp_path / "foreign.xml")


@pytest.mark.parametrize(("kind", "package"), PACKAGES.items())
def test_without_the_package_it_is_named_with_its_extra(kind, package, sparse, tmp_path, monkeypatch):
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=rf"package '{package}' \(extra '{kind}'\)") as caught:
        vitprune.export_model(sparse, tmp_path / f"m{FORMATS[kind].ending}")
    assert caught.value.hint.startswith("pip install ")
    assert not list(tmp_path.iterdir())
