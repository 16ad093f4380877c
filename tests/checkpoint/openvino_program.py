"""OpenVINO's files: the model's answers from both files, and clear words for any others.

test_openvino_program runs these in a process of their own.
"""

import json
import shutil

import pytest
import torch

import vitprune
from vitprune.checkpoint.openvino_program import read_openvino
from vitprune.cli.app import run
from vitprune.errors import CheckpointError, ExportError

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")


@pytest.fixture(scope="module")
def written(make_sparse, tmp_path_factory):
    """A sparse model of two classes, exported: `model.xml` and `model.bin` in a folder, and the model."""
    folder = tmp_path_factory.mktemp("openvino")
    size = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 2}
    sparse = make_sparse("vit_tiny_patch16_224", keep=0.5, prune_at=(1,), **size)
    done = vitprune.export_model(sparse, folder / "model.xml", class_names=("cat", "dog"))
    return sparse, done


def test_it_answers_as_the_model(written):
    sparse, done = written
    assert (done.format, done.precision, done.opset) == ("openvino", "fp32", 20)
    assert sorted(path.name for path in done.output.parent.iterdir()) == ["model.bin", "model.xml"]
    assert done.size_mib == pytest.approx(sum(path.stat().st_size for path in done.output.parent.iterdir()) / 2**20)
    program = read_openvino(done.output)
    assert (program.num_classes, program.batch_size, program.metadata.class_names) == (2, None, ["cat", "dog"])
    for count in (1, 4):
        images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            torch.testing.assert_close(program(images), sparse(images), rtol=0, atol=1e-4)
            assert not torch.allclose(program(images), sparse.model(images), atol=1e-2), "pruning must matter"


def test_the_commands_take_it(written, image_folder, monkeypatch, tmp_path, capsys):
    sparse, done = written
    monkeypatch.chdir(tmp_path)
    vitprune.save(sparse, "sparse.safetensors", class_names=("cat", "dog"))
    answers = []
    for name in ("sparse.safetensors", str(done.output)):
        assert run(["eval", name, str(image_folder), "-j", "0", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["top1_pct"])
    assert answers[0] == answers[1]
    assert run(["bench", str(done.output), "-b", "1", "--seconds", "0.01", "--json"]) == 0
    assert run(["export", "sparse.safetensors", "--format", "openvino", "-o", str(done.output)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"batch": 3}])
def test_other_precisions_and_one_batch_size(written, tmp_path, settings):
    sparse, _ = written
    done = vitprune.export_model(sparse, tmp_path / "m.xml", **settings)
    program = read_openvino(done.output)
    assert program.precision == settings.get("precision", "fp32")
    assert program.batch_size == settings.get("batch")
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(program(images), sparse(images), rtol=0, atol=0.05)


def test_what_is_not_ours_or_not_whole(written, tmp_path):
    _, done = written
    copy = shutil.copytree(done.output.parent, tmp_path / "copy")
    (copy / "model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        read_openvino(copy / "model.xml")
    (copy / "model.bin").write_bytes(b"")
    (copy / "model.xml").write_text("<net")
    with pytest.raises(CheckpointError, match=r"OpenVINO cannot open .*model\.xml"):
        read_openvino(copy / "model.xml")
    parameter = openvino.opset13.parameter([1, 3, 64, 64])
    foreign = openvino.Model([openvino.opset13.relu(parameter)], [parameter])
    openvino.save_model(foreign, tmp_path / "foreign.xml")
    with pytest.raises(CheckpointError, match="was not written by vitprune"):
        read_openvino(tmp_path / "foreign.xml")


def test_without_the_package_it_is_named(written, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ExportError, match="package 'openvino'") as caught:
        vitprune.export_model(written[0], tmp_path / "m.xml")
    assert caught.value.hint == "pip install openvino"
    assert not list(tmp_path.iterdir())
