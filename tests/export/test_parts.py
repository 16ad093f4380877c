"""`vitprune export --adaptive`: a cascade as a folder of ONNX files that gives what AdaptiveViT gives."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import vitprune
from vitprune.adaptive import AdaptiveViT, read_adaptive
from vitprune.checkpoint.onnx_program import open_onnx
from vitprune.cli.app import run
from vitprune.errors import CheckpointError
from vitprune.export.agreement import random_images
from vitprune.loading.load import load_dense, load_model
from vitprune.measure import count_macs

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

SIZE = (3, 64, 64)


@pytest.fixture(scope="module")
def written(exported, tmp_path_factory):
    """A folder of a sparse and a dense model whose tails differ, the AdaptiveViT that it is of, and some images.

    Its threshold lies between what the first pass says of the images.
    """
    root = tmp_path_factory.mktemp("parts")
    weights = {name: tensor.clone() for name, tensor in exported.sparse.model.state_dict().items()}
    weights["head.weight"] *= 0.7
    save_file(weights, root / "dense.safetensors")
    images = torch.stack([*random_images(SIZE)])
    loaded = load_model(str(exported.folder / "model.safetensors"))
    adaptive = AdaptiveViT([loaded.sparse, load_dense(loaded, root / "dense.safetensors").model], 0.5)
    with torch.no_grad():
        sure = adaptive.tails()[0](adaptive.trunk()(images))[1].sort().values
    adaptive.threshold = round(sure[5:7].mean().item(), 6)
    arguments = ["export", str(exported.folder), "--adaptive", str(adaptive.threshold), "-o", str(root / "adaptive")]
    arguments += ["--checkpoint", str(root / "dense.safetensors")]
    assert run(arguments) == 0
    return SimpleNamespace(root=root, folder=root / "adaptive", adaptive=adaptive, images=images, arguments=arguments)


@pytest.fixture
def place(written, image_folder, tmp_path, monkeypatch):
    """A copy of the folder and images of its two classes, in the current directory."""
    shutil.copytree(written.root, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_gives_what_the_model_in_pytorch_gives(written):
    program, adaptive = read_adaptive(written.folder), written.adaptive
    assert program.threshold == adaptive.threshold
    assert program.label == adaptive.label == "keep 0.5, then dense"
    ways = set()
    for threshold in (adaptive.threshold, 0.0, 2.0):
        program.threshold = adaptive.threshold = threshold
        for images in (written.images, written.images[:1], written.images[5:8]):
            program.ended = []
            with torch.no_grad():
                outputs, ended = adaptive.route(images)
            torch.testing.assert_close(program(images), outputs, atol=1e-4, rtol=1e-4)
            assert program.ended == ended.tolist()
            ways.add(tuple(sorted(set(program.ended))))
    assert ways >= {(0, 1), (0,), (1,)}
    adaptive.threshold = json.loads((written.folder / "adaptive.json").read_text())["threshold"]
    assert program.costs() == adaptive.costs(SIZE)


def test_what_is_in_the_folder_can_be_run_without_vitprune(written):
    import onnxruntime

    about = json.loads((written.folder / "adaptive.json").read_text())
    assert (about["trunk"], about["passes"]) == ("trunk.onnx", ["tail-0.5.onnx", "tail-dense.onnx"])
    names = {path.name for path in written.folder.iterdir()}
    assert names == {"adaptive.json", about["trunk"], *about["passes"]}
    trunk, first, last = (
        onnxruntime.InferenceSession(written.folder / name) for name in (about["trunk"], *about["passes"])
    )
    (tokens,) = trunk.run(["tokens"], {"images": written.images.numpy()})
    logits, certainty = first.run(["logits", "certainty"], {"tokens": tokens})
    unsure = certainty < about["threshold"]
    logits[unsure] = last.run(["logits"], {"tokens": tokens[unsure]})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), written.adaptive(written.images), atol=1e-4, rtol=1e-4)
    weights = sum(tensor.nbytes for tensor in written.adaptive.models[1].model.state_dict().values())
    trunk_alone = sum(tensor.nbytes for tensor in written.adaptive.models[0].backbone.trunk(1).values())
    size = (written.folder / "trunk.onnx").stat().st_size
    assert trunk_alone < size < weights, "no file holds what it does not run"


def test_eval_and_predict_open_it_and_say_how_many_went_on(place, capsys):
    assert run(["eval", "adaptive", "images", "-j", "0", "--checkpoint", "dense.safetensors", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    program = read_adaptive(place / "adaptive")
    low, high = (each / 1e9 for each in program.costs())
    share = result["went_on_pct"] / 100
    assert result["gmacs_mean"] == pytest.approx((1 - share) * low + share * high)
    assert (result["gmacs_worst"], result["threshold"]) == (high, program.threshold)
    assert result["num_images"] == 6
    assert result["delta"]["agreement_pct"] >= 0
    assert run(["eval", "adaptive", "images", "-j", "0"]) == 0
    out = capsys.readouterr().out
    assert "mine, keep 0.5, then dense:" in out
    assert f"{result['went_on_pct']:.1f} % of the images went on" in out
    assert run(["predict", "adaptive", "images/val/cat/0.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 1


def test_bench_times_both_ends(place, written, capsys):
    assert run(["bench", "adaptive", "-b", "1,3", "--seconds", "0.01", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    labels = ["adaptive fp32, none goes on", "adaptive fp32, all go on"]
    assert [row["label"] for row in rows] == labels * 2
    macs = written.adaptive.costs(SIZE)
    assert [row["gmacs"] for row in rows[:2]] == [each / 1e9 for each in macs]
    assert macs[0] == count_macs(written.adaptive.models[0], SIZE)


def test_what_does_not_hold_together_is_refused(place):
    file = place / "adaptive" / "adaptive.json"
    about = json.loads(file.read_text())
    for change, words in (
        ({"threshold": 1.5}, "threshold"),
        ({"passes": ["tail-0.5.onnx"]}, "passes"),
        ({"passes": ["../dense.safetensors", "tail-dense.onnx"]}, "passes"),
        ({"passes": ["absent.onnx", "tail-dense.onnx"]}, "absent.onnx' not found"),
        ({"passes": ["trunk.onnx", "tail-dense.onnx"]}, "trunk.onnx' does not fit"),
        ({"trunk": "tail-0.5.onnx"}, "does not fit"),
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 3}, "schema_version"),
    ):
        file.write_text(json.dumps(about | change))
        with pytest.raises(CheckpointError, match=words):
            read_adaptive(place / "adaptive")
    file.write_text("[")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_adaptive(place / "adaptive")


def test_mistakes_get_one_clear_sentence(place, exported, written, capsys):
    model = str(exported.folder)
    dense = ["--checkpoint", "dense.safetensors"]
    (place / "no.json").write_text("{}")
    promise = {"threshold": 0.5, "keep": 0.5, "weights": "of others", "asked": {}, "calibration": {}}
    (place / "other.json").write_text(json.dumps(promise))
    for arguments, words in (
        (written.arguments, "adaptive' exists"),
        (["export", model, "--adaptive", "40", *dense], "--adaptive is 40, expected a certainty from 0 to 1"),
        (["export", model, "--adaptive", "nan", *dense], "--adaptive is nan, expected a certainty"),
        (["export", model, "--adaptive", "absent.json", *dense], "file 'absent.json' not found"),
        (["export", model, "--adaptive", "no.json", *dense], "'no.json' holds no promise"),
        (["export", model, "--adaptive", "other.json", *dense], "the promise was made of other weights"),
        (["export", model, "--adaptive", "other.json", "--keep", "0.5"], "both say the keep ratio"),
        (["export", "demo", "--adaptive", "0.4"], "'demo' is no sparse file, and --adaptive is of one"),
        (["export", model, "--adaptive", "0.4", "--precision", "fp16"], "--precision does not go with --adaptive"),
        (["export", model, "--adaptive", "0.4", "--format", "pt2"], "--format does not go with --adaptive"),
        (["export", model, "--adaptive", "0.4", "--batch", "8"], "--batch does not go with --adaptive"),
        (["eval", "adaptive/tail-0.5.onnx", "images"], "is a part of an adaptive model"),
        (["eval", "adaptive/trunk.onnx", "images"], "is a part of an adaptive model"),
        (["eval", "adaptive", "images", "--keep", "0.6"], "is an exported file, which has one keep ratio"),
        (["eval", "adaptive", "images", "--device", "cuda"], "--device cuda does not go with"),
        (["info", "adaptive"], "is an exported file"),
        (["eval", "adaptive", "images", "--fidelity", "90"], "'adaptive' is no sparse file"),
    ):
        assert run(arguments) == 2, arguments
        assert words in capsys.readouterr().err


def test_python_writes_what_the_command_writes(written, tmp_path):
    done = vitprune.export_model(written.adaptive, tmp_path / "adaptive")
    assert (done.format, done.output) == ("onnx", tmp_path / "adaptive")
    assert done.agreement.typical_difference < done.agreement.allowed_difference
    for name in ("adaptive.json", "trunk.onnx", "tail-0.5.onnx", "tail-dense.onnx"):
        mine, its = (folder / name for folder in (tmp_path / "adaptive", written.folder))
        if name == "adaptive.json":
            assert mine.read_text() == its.read_text()
        else:
            assert open_onnx(mine).metadata == open_onnx(its).metadata
    mine, its = read_adaptive(tmp_path / "adaptive"), read_adaptive(written.folder)
    torch.testing.assert_close(mine(written.images), its(written.images), atol=0, rtol=0)
    promised = AdaptiveViT(written.adaptive.models, 0.25)
    made = {"asked": {"fidelity_pct": 99}, "calibration": {"bound": 0.01}}
    promised.promise = made | {"went_on": ["/home/somebody/1.jpg"]}
    vitprune.export_model(promised, tmp_path / "promised")
    about = json.loads((tmp_path / "promised" / "adaptive.json").read_text())
    assert about["promise"] == made

    for options, words in (
        ({"format": "timm"}, "format does not go with an AdaptiveViT"),
        ({"precision": "fp16"}, "precision does not go with an AdaptiveViT"),
        ({"batch": 8}, "batch does not go with an AdaptiveViT"),
        ({"features": True}, "features does not go with an AdaptiveViT"),
        ({"task": "embedding"}, "task does not go with an AdaptiveViT"),
        ({"output": tmp_path / "adaptive"}, "adaptive' exists"),
        ({"output": tmp_path / "model.onnx"}, "model.onnx' is a file, not a folder"),
    ):
        with pytest.raises(vitprune.VitpruneError, match=words):
            vitprune.export_model(written.adaptive, **({"output": tmp_path / "other"} | options))
    with pytest.raises(vitprune.VitpruneError, match="at a threshold of 2 all images go on"):
        vitprune.export_model(AdaptiveViT(written.adaptive.models, 2.0), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_python_evaluates_and_predicts_with_the_passes(written, place, capsys):
    assert run(["eval", "adaptive", "images", "-j", "0", "--json"]) == 0
    settings = {"device": "cpu", "progress": False}
    result = vitprune.evaluate(written.adaptive, "images", num_workers=0, **settings)
    assert result["top1_pct"] == json.loads(capsys.readouterr().out)["top1_pct"]
    (said,) = vitprune.predict(written.adaptive, "images/val/cat/0.png", **settings)
    assert list(said.classes) == ["adaptive"]
    with pytest.raises(vitprune.VitpruneError, match="random images do not say"):
        vitprune.benchmark({"all": written.adaptive}, progress=False)
