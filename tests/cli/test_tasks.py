"""Every task through the commands: sparsify, report, eval, compare, predict, export, visualize, info."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.cli.app import run
from vitprune.tasks import TASKS, task_named

QUICK = ("--pretraining-steps", "1", "--steps", "2", "-b", "4", "-j", "0", "--device", "cpu", "--bench-seconds", "0.01")
OUTPUTS = {"multilabel": 3, "regression": 2, "embedding": 0, "dense": 0}
TARGETS = {
    "multilabel": lambda i: {"labels": [i % 3, (i + 1) % 3][: 1 + i % 2]},
    "regression": lambda i: {"x": i / 7, "y": 1 - i},
    "embedding": lambda i: {},
    "dense": lambda i: {},
}
OF_TASK = {"multilabel": (), "regression": ("--target-key", "x,y"), "embedding": (), "dense": ()}


@pytest.fixture(scope="module", params=OUTPUTS)
def made(request, make_vit, make_image_folder, tmp_path_factory):
    """A run of each task on 18 images."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    images = folder / "images"
    make_image_folder(images)
    save_file(make_vit(num_classes=OUTPUTS[name], depth=4).state_dict(), folder / "weights.safetensors")
    options = [str(images), "--task", name]
    if name in ("multilabel", "regression"):
        files = sorted(path for path in images.glob("*/*/*") if path.is_file())
        lines = [
            json.dumps({"file_name": str(path.relative_to(images))} | TARGETS[name](i)) for i, path in enumerate(files)
        ]
        (folder / "labels.jsonl").write_text("\n".join(lines))
        options += ["--labels", str(folder / "labels.jsonl"), *OF_TASK[name]]
    weights = ["--checkpoint", str(folder / "weights.safetensors")]
    shallow = ["--model-kwargs", "depth=4"]
    quick = QUICK[2:] if name == "dense" else QUICK  # nothing there has to be pretrained
    arguments = ["sparsify", "test_vit", *options, *weights, *shallow, "-o", str(folder / "run"), *quick]
    assert run(arguments) == 0
    return task_named(name), folder / "run", options, weights


def test_report_page_and_card_speak_of_the_task(made):
    task, folder, *_ = made
    report = json.loads((folder / "report.json").read_text())
    assert report["task"] == task.name
    for figure in task.fidelity:
        assert isinstance(report["delta"][figure.key], float), figure
        assert isinstance(report["random"][figure.key], float)
    for figure in task.accuracy:
        assert isinstance(report["sparse"][figure.key], float), figure
    page, card = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    for text in (page, card):
        assert "top-1" not in text.lower().replace("k-nn top-1", "").replace("k-nn-top-1", "")
        assert "predicts the dense one" not in text
    assert task.noun in card
    assert f"pipeline_tag: {task.pipeline}" in card
    shown = json.loads((folder / "keepmaps.json").read_text())
    assert {row["group"] for row in shown["images"]} == {"evaluated images"}
    if task.name == "embedding":
        assert len(shown["thumbnails"]) > 1
        for row in shown["images"]:
            assert len(row["neighbours"]["dense"]) == len(row["neighbours"]["sparse"]) == 5
        assert page.count("Nearest to it, dense") == len(shown["images"])


def test_eval_info_and_compare_by_the_task(made, unsearched, capsys):
    task, folder, options, weights = made
    common = [*options, *weights, "-j", "0", "--device", "cpu"]
    capsys.readouterr()
    unreachable = ["--min-fidelity", "100.5" if task.fidelity[0].in_percent else "1"]
    assert run(["eval", str(folder), *common, "--json", *unreachable]) == 3
    result = json.loads(capsys.readouterr().out)
    report = json.loads((folder / "report.json").read_text())
    assert result["task"] == task.name
    for figure in task.fidelity:
        assert result["delta"][figure.key] == pytest.approx(report["delta"][figure.key], abs=2e-3, rel=1e-3)
    assert run(["eval", str(folder), *common]) == 0
    out = capsys.readouterr().out
    assert task.fidelity[0].text.removesuffix(" (%)") in out
    assert "top-1" not in out.replace("k-NN top-1", "")
    assert run(["eval", str(folder), *common, "--min-fidelity", "0.9" if task.fidelity[0].in_percent else "90"]) == 2
    assert task.fidelity[0].text in capsys.readouterr().err
    assert run(["eval", str(folder), *common, "--min-top1", "50"]) == 2
    assert f"--min-top1 is of classifiers, and the task is {task.name}" in capsys.readouterr().err
    assert run(["eval", str(folder), *common, "--per-class"]) == 2
    assert f"--per-class is of classifiers, and the task is {task.name}" in capsys.readouterr().err
    assert run(["info", str(folder)]) == 0
    assert task.name in capsys.readouterr().out
    assert run(["compare", str(folder), *common, "--methods", "random,tome,ours"]) == 0
    assert task.fidelity[-1].short in capsys.readouterr().out


def test_a_file_of_another_task_is_refused(made, capsys):
    task, folder, options, _ = made
    other = next(name for name in TASKS if name != task.name)
    assert run(["eval", str(folder), *options[:1], "--task", other]) == 2
    err = capsys.readouterr().err
    assert task.name in err
    assert other in err


def test_predict_gives_what_the_model_gives(made, capsys, tmp_path):
    task, folder, _, weights = made
    images = sorted(str(path) for path in (folder.parent / "images" / "val").glob("*/*.*"))[:2]
    both = ["predict", str(folder), *images, *weights, "--device", "cpu"]
    capsys.readouterr()
    assert run([*both, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result[task.fidelity[0].key] is not None
    model = vitprune.load(folder / "model.safetensors")
    found = vitprune.predict(model, images, device="cpu", progress=False)
    if task.name == "multilabel":
        for row in found:
            assert all(each.probability_pct > 50 for each in row.classes["sparse"] if not isinstance(each, str))
        assert run([*both, "-o", str(tmp_path / "a.npz")]) == 2
        assert "would hold vectors, and the task is multilabel" in capsys.readouterr().err
        return
    path = tmp_path / "vectors.safetensors"
    assert run([*both, "-o", str(path)]) == 0
    stored = load_file(path)["sparse"]
    torch.testing.assert_close(stored, torch.stack([row.vectors["sparse"] for row in found]), rtol=1e-4, atol=1e-4)
    assert stored.shape[0] == 2
    assert run([*both, "-o", str(tmp_path / "vectors.npz")]) == 0
    with np.load(tmp_path / "vectors.npz") as arrays:
        assert list(arrays["images"]) == images
        np.testing.assert_allclose(arrays["sparse"], stored, rtol=1e-5)
    table = tmp_path / "vectors.csv"
    assert run([*both, "-o", str(table)]) == (2 if task.name == "dense" else 0)
    if task.name != "dense":
        rows = list(csv.reader(table.read_text().splitlines()))
        assert [row[1] for row in rows[1:]] == ["dense", "sparse"] * 2
        assert [float(value) for value in rows[2][2:]] == pytest.approx(stored[0].tolist(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("made", ["embedding", "regression"], indirect=True)
def test_onnx_gives_and_says_the_same(made, capsys, tmp_path):
    """test_predict_by_task exports the others."""
    pytest.importorskip("onnxruntime")
    task, folder, options, weights = made
    path = tmp_path / "model.onnx"
    assert run(["export", str(folder), "--format", "onnx", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    assert "same class" not in out
    assert task.outputs in out
    import onnx

    assert [each.name for each in onnx.load(path).graph.output] == [task.output]
    assert run(["eval", str(folder), *options, "-j", "0", "--device", "cpu", *weights, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert run(["eval", str(path), *options, "-j", "0", *weights, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["task"] == task.name
    for figure in task.accuracy:
        assert result[figure.key] == pytest.approx(expected[figure.key], abs=1e-3)
    for figure in task.fidelity[:2]:
        assert result["delta"][figure.key] == pytest.approx(expected["delta"][figure.key], abs=1e-3)


def test_visualize_draws_and_says_how_far(made, capsys, tmp_path):
    _, folder, *_ = made
    images = sorted(str(path) for path in (folder.parent / "images" / "val").glob("*/*.*"))[:2]
    assert run(["visualize", str(folder), *images, "-o", str(tmp_path / "maps"), "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert len(drawn["files"]) == 2
    assert all(isinstance(entry["distance"], float) for entry in drawn["images"])


def test_features_of_a_classifier_are_exported_on_the_full_grid(make_sparse, make_images, tmp_path):
    sparse = make_sparse(num_classes=2, keep=0.5, depth=3, prune_at=[1, 2])
    done = vitprune.export_model(sparse, tmp_path / "model.pt2", features=True)
    assert done.agreement.agreement_pct is None
    images = make_images(sparse, 3)
    with torch.no_grad():
        found = torch.export.load(done.output).module()(images)
        torch.testing.assert_close(found, sparse.forward_features(images), rtol=0, atol=1e-5)
    with pytest.raises(vitprune.VitpruneError, match="a timm folder holds weights"):
        vitprune.export_model(sparse, tmp_path / "folder", features=True)


@pytest.mark.parametrize("made", ["embedding"], indirect=True)
def test_zero_shot_figures_come_first(made, capsys, tmp_path):
    _, folder, options, weights = made
    path = tmp_path / "text.safetensors"
    width = vitprune.load(folder / "model.safetensors").num_features
    save_file({"text": torch.randn(2, width)}, path, metadata={"class_names": json.dumps(["cat", "dog"])})
    arguments = [*options, *weights, "-j", "0", "--device", "cpu", "--class-embeddings", str(path)]
    assert run(["eval", str(folder), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["zero_shot_top5_pct"] == 100, "of two classes"
    assert isinstance(result["delta"]["zero_shot_top1_points"], float)
    assert run(["eval", str(folder), *arguments]) == 0
    assert "zero-shot top-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "classify"], "classification"),
        (["--class-embeddings", "nowhere.safetensors"], "goes with --task embedding"),
        (["--task", "embedding", "--class-embeddings", "nowhere.safetensors"], "cannot be read"),
    ],
)
def test_what_does_not_go_with_a_model_is_refused(arguments, said, weights_file, image_folder, capsys):
    command = ["eval", "test_vit", str(image_folder), "--checkpoint", str(weights_file), *arguments]
    assert run(command) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def encoders(make_vit, make_image_folder, tmp_path_factory):
    """Images, and weights of two encoders of different widths."""
    folder = tmp_path_factory.mktemp("encoders")
    make_image_folder(folder / "images")
    save_file(make_vit(num_classes=0).state_dict(), folder / "weights.safetensors")
    save_file(make_vit("test_vit3", num_classes=0).state_dict(), folder / "other.safetensors")
    return folder


def test_where_nothing_can_be_measured_that_is_said(encoders, capsys):
    options = ["--checkpoint", str(encoders / "weights.safetensors"), "-j", "0", "--device", "cpu"]
    for images, task, said in (
        ("images/val/cat", "embedding", "k-NN needs classes of the evaluated and of training images"),
        ("images/val", "embedding", "k-NN needs classes of the evaluated and of training images"),
        ("images", "dense", "features of patches are neither right nor wrong"),
    ):
        assert run(["eval", "test_vit", str(encoders / images), "--task", task, *options]) == 1
        assert f"nothing to measure a dense model by: {said}" in capsys.readouterr().err


def test_a_sweep_of_encoders_compares_with_others_by_labels_alone(encoders, tmp_path, capsys):
    weights, other = (str(encoders / f"{name}.safetensors") for name in ("weights", "other"))
    common = ["--task", "embedding", "--checkpoint", weights, "--keep", ".5", "--also", f"test_vit3={other}", *QUICK]
    arguments = ["sweep", "test_vit", str(encoders / "images"), *common, "-o", str(tmp_path / "a")]
    assert run([*arguments, "--bench-batch-sizes", "1"]) == 0
    result = json.loads((tmp_path / "a" / "sweep.json").read_text())
    assert result["accuracy"] == "knn_top1_pct"
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["keep 0.5"]["num_gallery_images"] == 12
    assert rows["test_vit3"]["delta"]["cosine"] is None, "of another width"
    assert rows["test_vit3"]["delta"]["neighbour_overlap_pct"] > 0
    page = (tmp_path / "a" / "sweep.html").read_text(encoding="utf-8")
    assert "k-NN top-1 (%)" in page
    capsys.readouterr()
    for images, task in (("images/val/cat", "embedding"), ("images", "dense")):
        arguments = ["sweep", "test_vit", str(encoders / images), *common, "-o", str(tmp_path / "b")]
        arguments[arguments.index("embedding")] = task
        if task == "dense":  # its recipe has no pretraining
            place = arguments.index("--pretraining-steps")
            del arguments[place : place + 2]
        assert run(arguments) == 2
        assert task_named(task).no_accuracy in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_an_encoder_from_python_has_a_report_of_its_task(make_vit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = [(torch.rand(3, 160, 160, generator=generator), index % 3) for index in range(24)]
    sparse = vitprune.sparsify(
        make_vit(num_classes=0),
        images[:16],
        val_data=images[16:],
        keep=0.5,
        output=tmp_path / "run",
        device="cpu",
        bench_seconds=0.01,
        progress=False,
        **{"steps": 2, "pretraining_steps": 1, "batch_size": 4, "num_workers": 0},
    )
    assert (sparse.task, sparse.report.task) == ("embedding", "embedding")
    assert 0 < sparse.report.delta.cosine < 1
    assert sparse.report.sparse.num_gallery_images == 16
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "16 nearest of 16 training images vote for" in page
    assert "Nearest to it, sparse:" in page
