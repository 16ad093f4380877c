"""vitprune visualize: files, JSON, and what users get wrong."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run
from vitprune.data import demo, eval_transform, open_image
from vitprune.loading.load import load_model
from vitprune.model import attach
from vitprune.tasks import task_named


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sparse_file(make_sparse, tmp_path):
    sparse = make_sparse(num_classes=2, keep=0.5)
    save(sparse, tmp_path / "model.safetensors", describe(sparse, class_names=("cat", "dog")))
    return "model.safetensors"


@pytest.fixture
def visualize(capsys):
    """`visualize(*arguments)`: what `vitprune visualize ... --json` prints."""

    def result(*arguments):
        assert run(["visualize", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return result


def test_a_png_per_image_and_json_that_agrees_with_the_model(sparse_file, image_folder, tmp_path, visualize):
    images = [image_folder / "val" / name / "0.png" for name in ("cat", "dog")]
    result = visualize(sparse_file, *images, "-o", "maps")
    files = [tmp_path / name for name in result["files"]]
    assert [path.name for path in files] == ["0.png", "0-2.png"], "two folders have a 0.png"
    for path in files:
        with Image.open(path) as drawn:
            assert drawn.format == "PNG"
    assert [each["name"] for each in result["images"]] == list(map(str, images))
    assert result["dense"] == "fine-tuned backbone with all tokens"
    loaded = load_model(sparse_file)
    with torch.no_grad():
        selection = loaded.sparse.select(eval_transform(loaded.model)(open_image(images[0]))[None])
    entry = result["images"][0]
    assert entry["kept"] == [indices[0].tolist() for indices in selection.indices]
    assert entry["kept_pct"] == [100 * stage["num_tokens"] / 100 for stage in result["stages"]]
    best = selection.logits.softmax(-1)[0].max(-1)
    assert entry["sparse"][0]["index"] == int(best.indices)
    assert entry["sparse"][0]["name"] == ("cat", "dog")[int(best.indices)]
    assert entry["sparse"][0]["probability_pct"] == pytest.approx(100 * best.values.item(), rel=1e-5)
    assert "scores" not in entry


def test_run_folder_heat_maps_and_labels_of_a_data_set(sparse_file, image_folder, tmp_path, capsys):
    command = ["visualize", str(tmp_path), "--data", str(image_folder), "--heatmap", "--limit"]
    assert run([*command, "2", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["output"] == "runs/test_vit-keep0.5-keepmaps"
    assert "2 of 6 images" in err
    for entry, file in zip(result["images"], result["files"], strict=True):
        assert entry["label"]["name"] == entry["name"].split("/")[-2]
        reached = [100, *map(len, entry["kept"][:-1])]
        assert [len(scores) for scores in entry["scores"]] == reached
        assert entry["file"] == file
    assert run([*command, "1"]) == 0
    out, err = capsys.readouterr()
    assert "1 file(s) written to runs/test_vit-keep0.5-keepmaps-2" in out, "numbered, nothing is written over"
    assert "all tokens" in out
    assert "--checkpoint" in err, "how to compare with the dense model"


def test_mean_map_is_the_mean_of_the_kept_patches(sparse_file, image_folder, visualize, capsys):
    Path("m").mkdir()
    Path("m/note.txt").write_text("mine")
    result = visualize(sparse_file, "--data", image_folder, "--mean", "-o", "m", "--overwrite")
    assert Path("m/note.txt").read_text() == "mine"
    assert result["files"] == ["m/mean.png"]
    assert result["mean"]["num_images"] == len(result["images"]) == 6
    for stage, shares in enumerate(result["mean"]["kept_pct"]):
        counts = [0] * 100
        for entry in result["images"]:
            for patch in entry["kept"][stage]:
                counts[patch] += 1
        assert shares == pytest.approx([100 * count / 6 for count in counts])
    assert run(["visualize", sparse_file, "--data", str(image_folder), "--mean"]) == 0
    assert "of 6 images" in capsys.readouterr().out


def test_dense_answers_are_the_dense_models_where_its_weights_are_given(sparse_file, image_folder, visualize):
    dense, image = load_model(str(sparse_file)).model, image_folder / "val/cat/0.png"
    with torch.no_grad():
        for parameter in dense.parameters():  # as far as a long training moves them
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
    save_file(dense.state_dict(), "dense.safetensors")
    result = visualize(sparse_file, image, "--checkpoint", "dense.safetensors", "-o", "d")
    with torch.no_grad():
        answer = dense(eval_transform(dense)(open_image(image))[None]).softmax(-1)[0]
    assert result["dense"] == "dense"
    assert result["images"][0]["dense"][0]["probability_pct"] == pytest.approx(100 * answer.max().item(), rel=1e-4)


@pytest.mark.parametrize("command", ["visualize", "predict", "eval", "compare"])
def test_weights_of_another_model_are_not_taken_for_the_dense_model(
    command, make_vit, sparse_file, image_folder, capsys
):
    save_file(make_vit(num_classes=2, seed=5).state_dict(), "other.safetensors")
    images = image_folder / "val/cat/0.png" if command in ("visualize", "predict") else image_folder
    assert run([command, str(sparse_file), str(images), "--checkpoint", "other.safetensors", "--device", "cpu"]) == 2
    assert "'other.safetensors' does not hold the weights that" in capsys.readouterr().err


def test_the_demo_needs_no_images_and_no_weights(tmp_path, visualize, no_hub):
    sparse = attach(load_model("demo").model, 0.5, [3]).eval()
    save(sparse, tmp_path / "model.safetensors", describe(sparse, name="demo", class_names=demo.CLASS_NAMES))
    result = visualize(tmp_path, "--limit", 1)
    assert result["dense"] == "dense"
    assert result["grid_size"] == [14, 14]
    assert all(entry["dense"][0]["name"] in demo.CLASS_NAMES for entry in result["images"])


def test_images_that_are_not_square_and_imagenets_names(make_vit, image_folder, tmp_path, visualize):
    sparse = attach(make_vit(num_classes=1000, img_size=(96, 160)), 0.5, [2]).eval()
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    result = visualize(tmp_path, image_folder, "--limit", 1)
    assert result["grid_size"] == [6, 10]
    with Image.open(result["files"][0]) as drawn:
        assert drawn.width > drawn.height
    answer = result["images"][0]["dense"][0]
    assert answer["name"] == timm.data.ImageNetInfo().index_to_description(answer["index"])


def test_mistakes_are_one_sentence_with_a_way_out(make_vit, sparse_file, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "note.txt").write_text("mine")
    whole = attach(make_vit(num_classes=2), 1.0).eval()
    save(whole, tmp_path / "whole.safetensors", describe(whole))
    for arguments, code, message in (
        ([sparse_file], 2, "no images are named"),
        ([sparse_file, "absent.jpg"], 2, "image or folder 'absent.jpg' not found"),
        ([sparse_file, "bad.jpg"], 1, "cannot read image 'bad.jpg'"),
        ([sparse_file, "empty"], 1, "there are no images in 'empty'"),
        ([sparse_file, "bad.jpg", "--data", "demo"], 2, "IMAGE and --data"),
        (["demo"], 2, "'demo' is a dense model"),
        (["whole.safetensors", "--data", "demo"], 2, "keeps all its tokens"),
        ([sparse_file, "bad.jpg", "--limit", "0"], 2, "--limit"),
        ([sparse_file, "bad.jpg", "-o", "maps"], 2, "the output folder 'maps' exists"),
    ):
        assert run(["visualize", *arguments]) == code, arguments
        err = capsys.readouterr().err
        assert message in err, arguments
        assert "hint:" in err or "whole.safetensors" in arguments
    assert not list(tmp_path.rglob("*.png")), "nothing is written"
    assert not list(tmp_path.glob("runs/*"))


def test_an_image_of_more_pixels_than_allowed_is_refused_by_name(sparse_file, image_folder, capsys):
    image = str(image_folder / "val" / "cat" / "0.png")
    assert run(["visualize", sparse_file, image, "--max-pixels", "100"]) == 1
    assert f"cannot read image '{image}': it has more than 100 pixels" in capsys.readouterr().err


@pytest.fixture
def file_of(make_vit, tmp_path):
    """`file_of(task)`: a sparse model for it."""

    def make(name, num_classes):
        sparse = attach(make_vit(num_classes=num_classes), 0.5, [2]).eval()
        sparse.task = name
        save(sparse, tmp_path / "model.safetensors", describe(sparse))
        return "model.safetensors"

    return make


def test_nearest_images_of_an_encoder_are_named_and_distances_are_as_among_all(
    file_of, image_folder, visualize, capsys
):
    file = file_of("embedding", 0)
    result = visualize(file, image_folder, "--limit", 18)
    loaded, entries = load_model(file), result["images"]
    assert len(entries) == 18, "more than one batch"
    task, transform = task_named("embedding"), eval_transform(loaded.model)
    images = torch.stack([transform(open_image(entry["name"])) for entry in entries])
    with torch.inference_mode():
        vectors = {"dense": loaded.model(images), "sparse": loaded.sparse(images)}
    found = {side: task.results(task.record(each), torch.full((18,), -1)) for side, each in vectors.items()}
    expected = found["sparse"].distances(found["dense"])
    assert [entry["distance"] for entry in entries] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
    for side, results in found.items():
        nearest = results.nearest()[:, :5].tolist()
        assert [entry["neighbours"][side] for entry in entries] == [
            [entries[row]["name"] for row in rows] for rows in nearest
        ]
    assert entries[0]["dense"] == entries[0]["sparse"] == []
    assert run(["visualize", file, str(image_folder), "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert "1 - cosine" in out
    assert "nearest by the model's vectors" in out


def test_values_are_shown_and_of_one_image_there_is_no_distance(file_of, image_folder, visualize):
    file, image = file_of("regression", 2), image_folder / "val/cat/0.png"
    (entry,) = visualize(file, image)["images"]
    loaded = load_model(file)
    with torch.inference_mode():
        values = loaded.sparse(eval_transform(loaded.model)(open_image(image))[None])[0].tolist()
    assert [float(value) for value in entry["sparse"].split(", ")] == pytest.approx(values, rel=1e-3)
    assert entry["distance"] is None, "no spread to measure it by"
    assert "neighbours" not in entry
