"""vitprune visualize: files, JSON, and what users get wrong."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run
from vitprune.data import demo
from vitprune.loading.load import load_model
from vitprune.model import attach


@pytest.fixture
def sparse_file(make_sparse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sparse = make_sparse(num_classes=2, keep=0.5)
    save(sparse, tmp_path / "model.safetensors", describe(sparse, class_names=("cat", "dog")))
    return tmp_path / "model.safetensors"


@pytest.fixture
def images(image_folder):
    return sorted((image_folder / "val").rglob("*.png"))


def test_a_png_per_image_and_json_that_agrees_with_the_model(sparse_file, images, tmp_path, capsys):
    assert run(["visualize", str(sparse_file), str(images[0]), str(images[3]), "-o", "maps", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    files = [tmp_path / name for name in result["files"]]
    assert [path.name for path in files] == ["0.png", "0-2.png"], "two folders have a 0.png"
    for path in files:
        with Image.open(path) as drawn:
            assert drawn.format == "PNG"
    assert [each["name"] for each in result["pictures"]] == [str(images[0]), str(images[3])]
    assert result["dense"] == "fine-tuned backbone with all tokens"
    loaded = load_model(str(sparse_file))
    from vitprune.data import eval_transform, open_image

    image = eval_transform(loaded.model)(open_image(images[0]))[None]
    with torch.no_grad():
        selection = loaded.sparse.select(image)
    entry = result["pictures"][0]
    assert entry["kept"] == [indices[0].tolist() for indices in selection.indices]
    assert entry["kept_pct"] == [100 * stage["num_tokens"] / 100 for stage in result["stages"]]
    best = selection.logits.softmax(-1)[0].max(-1)
    assert entry["sparse"][0]["index"] == int(best.indices)
    assert entry["sparse"][0]["name"] == ("cat", "dog")[int(best.indices)]
    assert entry["sparse"][0]["probability_pct"] == pytest.approx(100 * best.values.item(), rel=1e-5)
    assert "scores" not in entry


def test_run_folder_sheet_heat_map_and_labels_of_a_data_set(sparse_file, image_folder, tmp_path, capsys):
    command = ["visualize", str(tmp_path), "--data", str(image_folder), "--limit", "3", "--sheet", "--heatmap"]
    assert run([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [name.rpartition("/")[2] for name in result["files"]] == ["sheet.png"]
    assert result["output"] == "runs/test_vit-keep0.5-keepmaps"
    assert "3 of 6 images" in err
    for entry in result["pictures"]:
        assert entry["label"]["name"] == entry["name"].split("/")[-2]
        reached = [100, *map(len, entry["kept"][:-1])]
        assert [len(scores) for scores in entry["scores"]] == reached
        assert entry["file"] is None
    assert run(command) == 0
    assert "runs/test_vit-keep0.5-keepmaps-2" in capsys.readouterr().out, "numbered, nothing is written over"


def test_mean_map_is_the_mean_of_the_kept_patches(sparse_file, image_folder, capsys):
    assert run(["visualize", str(sparse_file), "--data", str(image_folder), "--mean", "-o", "m", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == ["m/mean.png"]
    assert result["mean"]["num_images"] == len(result["pictures"]) == 6
    for stage, shares in enumerate(result["mean"]["kept_pct"]):
        counts = [0] * 100
        for entry in result["pictures"]:
            for patch in entry["kept"][stage]:
                counts[patch] += 1
        assert shares == pytest.approx([100 * count / 6 for count in counts])
    assert run(["visualize", str(sparse_file), "--data", str(image_folder), "--mean"]) == 0
    assert "of 6 images" in capsys.readouterr().out


def test_dense_answers_are_the_dense_models_where_its_weights_are_given(
    make_vit, sparse_file, images, tmp_path, capsys
):
    dense = make_vit(num_classes=2, seed=5)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    command = [
        "visualize",
        str(sparse_file),
        str(images[0]),
        "--checkpoint",
        "dense.safetensors",
        "-o",
        "d",
        "--json",
    ]
    assert run(command) == 0
    result = json.loads(capsys.readouterr().out)
    from vitprune.data import eval_transform, open_image

    with torch.no_grad():
        answer = dense(eval_transform(dense)(open_image(images[0]))[None]).softmax(-1)[0]
    assert result["dense"] == "dense"
    assert result["pictures"][0]["dense"][0]["probability_pct"] == pytest.approx(100 * answer.max().item(), rel=1e-4)


def test_the_demo_needs_no_images_and_no_weights(tmp_path, capsys, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    loaded = load_model("demo")
    sparse = attach(loaded.model, 0.5, [3]).eval()
    save(sparse, tmp_path / "model.safetensors", describe(sparse, name="demo", class_names=demo.CLASS_NAMES))
    assert run(["visualize", str(tmp_path), "--limit", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dense"] == "dense"
    assert result["grid_size"] == [12, 12]
    assert all(entry["dense"][0]["name"] in demo.CLASS_NAMES for entry in result["pictures"])


def test_images_that_are_not_square_on_another_grid(make_vit, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sparse = attach(make_vit(num_classes=2, img_size=(96, 160)), 0.5, [2]).eval()
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    assert run(["visualize", str(tmp_path), str(image_folder), "--limit", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["grid_size"] == [6, 10]
    with Image.open(result["files"][0]) as drawn:
        assert drawn.width > drawn.height


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["model.safetensors"], 2, "no images are named"),
        (["model.safetensors", "absent.jpg"], 1, "there is no image or folder 'absent.jpg'"),
        (["model.safetensors", "bad.jpg"], 1, "cannot read image 'bad.jpg'"),
        (["model.safetensors", "empty"], 1, "there are no images in 'empty'"),
        (["model.safetensors", "bad.jpg", "--data", "demo"], 2, "IMAGE and --data"),
        (["model.safetensors", "--data", "absent"], 1, "the data 'absent' is not there"),
        (["absent.safetensors", "bad.jpg"], 1, "absent.safetensors"),
        (["demo"], 2, "'demo' is a dense model"),
        (["model.safetensors", "bad.jpg", "--limit", "0"], 2, "--limit"),
    ],
)
def test_mistakes_are_one_sentence_with_a_way_out(sparse_file, tmp_path, capsys, arguments, code, message):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    assert run(["visualize", *arguments]) == code
    err = capsys.readouterr().err
    assert f"error: {message}" in err or message in err
    assert "hint:" in err
    assert not list(tmp_path.rglob("*.png")), "nothing is written"
    assert not list(tmp_path.glob("runs/*"))


def test_a_file_that_keeps_everything_has_nothing_to_show(make_vit, tmp_path, capsys):
    sparse = attach(make_vit(num_classes=2), 1.0).eval()
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    assert run(["visualize", str(tmp_path), "--data", "demo"]) == 2
    assert "keeps all its tokens" in capsys.readouterr().err


def test_output_that_exists_needs_overwrite(sparse_file, images, tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "note.txt").write_text("mine")
    command = ["visualize", str(sparse_file), str(images[0]), "-o", "maps"]
    assert run(command) == 1
    assert "the output folder 'maps' exists" in capsys.readouterr().err
    assert run([*command, "--overwrite"]) == 0
    assert (tmp_path / "maps" / "note.txt").read_text() == "mine"


def test_a_sheet_of_too_many_is_refused(sparse_file, capsys):
    assert run(["visualize", str(sparse_file), "--data", "demo", "--limit", "101", "--sheet"]) == 2
    assert "--sheet takes at most 100 images, got 101" in capsys.readouterr().err


def test_imagenets_names_where_the_file_has_none(make_vit, images, tmp_path, capsys):
    sparse = attach(make_vit(num_classes=1000), 0.5, [2]).eval()
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    assert run(["visualize", str(tmp_path), str(images[0]), "-o", str(tmp_path / "o"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["pictures"][0]["dense"][0]
    assert answer["name"] == timm.data.ImageNetInfo().index_to_description(answer["index"])
