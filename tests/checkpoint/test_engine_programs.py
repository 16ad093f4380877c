"""Files for engines of others: the model's answers from each, and clear words for any other file."""

import json
import shutil
import sys

import pytest
import torch

import vitprune
from vitprune.cli.app import run
from vitprune.errors import CheckpointError, ExportError
from vitprune.export.formats import FORMATS

ENGINES = {"openvino": "openvino", "executorch": "executorch", "litert": "ai_edge_litert"}
"""Formats that vitprune runs, and the package that has to be there."""
FIXED = {kind for kind in ENGINES if FORMATS[kind].batch}
READ = {kind: FORMATS[kind].read for kind in ENGINES}


@pytest.fixture(scope="module")
def sparse(make_sparse):
    size = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 2}
    return make_sparse("vit_tiny_patch16_224", keep=0.5, prune_at=(1,), **size)


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


@pytest.mark.parametrize("kind", ENGINES)
def test_without_the_package_it_is_named_with_its_extra(kind, sparse, tmp_path, monkeypatch):
    for name in {ENGINES[kind], *(name for name in sys.modules if name.startswith(f"{ENGINES[kind]}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=rf"package '{ENGINES[kind]}' \(extra '{kind}'\)") as caught:
        vitprune.export_model(sparse, tmp_path / f"m{FORMATS[kind].ending}")
    assert caught.value.hint.startswith("pip install ")
    assert not list(tmp_path.iterdir())
