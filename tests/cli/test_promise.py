"""`eval --fidelity`: a promise by some images, kept on others."""

import json
import re
from pathlib import Path

import pytest
import torch
from html_page import Page
from PIL import Image
from safetensors.torch import save_file

import vitprune
from vitprune.cli.app import run
from vitprune.data import ImageSet
from vitprune.errors import UsageError
from vitprune.jobs.promise import as_promised, read_promise
from vitprune.jobs.side_by_side import over_images
from vitprune.loading.load import load_dense, load_model


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture
def many(finished, tmp_path):
    """`many(n)`: a folder of n images that differ."""

    def make(count):
        generator = torch.Generator().manual_seed(0)
        (tmp_path / "images").mkdir()
        for number in range(count):
            pixels = torch.randint(0, 255, (40, 40, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{number}.png")
        return str(tmp_path / "images")

    return make


def test_of_shares_that_were_chosen_freely(finished, many, make_vit, tmp_path, capsys):
    sparse = vitprune.attach(make_vit(num_classes=2), tokens_left=[0.7, 0.5], prune_at=[2, 3])
    vitprune.save(sparse, tmp_path / "free")
    arguments = ["--checkpoint", str(finished.root / "weights.safetensors"), "--device", "cpu", "-j", "0"]
    quick = ["--calibrate", "40", "--bench-batch-sizes", "1,16", "--bench-seconds", "0.02"]  # of ten others
    assert run(["eval", str(tmp_path / "free"), many(50), *arguments, "--fidelity", "90", *quick]) == 0
    assert "ratios 0.7,0.5, then dense, beside dense alone" in capsys.readouterr().out


def test_from_the_command_line(finished, many, capsys):
    start = ["eval", str(finished.folder), many(60), "--checkpoint", str(finished.root / "weights.safetensors")]
    start += ["--device", "cpu", "-j", "0"]
    quick = ["--bench-batch-sizes", "1,4", "--bench-seconds", "0.02"]
    assert run([*start, "--fidelity", "90", "--calibrate", "40", *quick, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["calibration"]["num_images"] == 40
    assert result["num_images"] == 20
    assert result["calibration"]["bound"] <= 0.1
    assert result["agreement_pct"] == pytest.approx(100 * (1 - result["loss"]))
    assert len(result["went_on"]) == round(result["went_on_pct"] * 20 / 100)
    least, most = result["gmacs_sparse"], result["gmacs_worst"]
    assert sum(row["num_images"] for row in result["costs"]) == 20
    assert [row["gmacs"] for row in result["costs"]] == pytest.approx([least, most][: len(result["costs"])])
    ends = result["curve"][0], result["curve"][-1]
    assert [each["gmacs_mean"] for each in ends] == [pytest.approx(least), pytest.approx(most)]
    assert [each["loss"] for each in ends] == [pytest.approx(1 - result["fixed"]["agreement_pct"] / 100), 0]
    share = result["went_on_pct"] / 100
    assert result["gmacs_mean"] == pytest.approx(share * most + (1 - share) * least)
    assert least < result["gmacs_dense"] < most
    assert [row["batch_size"] for row in result["delta"]["speedup"]] == [1, 4]
    assert run([*start, "--max-kl", "0.2", "--calibrate", "40", *quick]) == 0
    assert "promised, with 95 % confidence: a mean KL divergence" in capsys.readouterr().out
    for options, words in (
        (("--fidelity", "99"), "there are 60 images; 600 choose the threshold"),
        (("--fidelity", "99", "--calibrate", "40"), "40 images are too few to promise a loss of at most 1 %"),
        (("--fidelity", "90", "--calibrate", "60"), "there are 60 images; 60 choose the threshold"),
        (("--calibrate", "40"), "--calibrate is of a promise, and none is asked for"),
        (("-o", "promise.json"), "--output is of a promise, and none is asked for"),
        (("--fidelity", "99", "--max-kl", "0.1"), "mutually exclusive"),
        (("--fidelity", "90", "--min-top1", "50"), "--min-top1 does not go with a promise"),
        (("--fidelity", "90", "--per-class"), "--per-class does not go with a promise"),
        (("--fidelity", "90", "--confidence", "95"), "--confidence is 95, expected a share"),
        (("-o", "page.html"), "--output is of a promise, and none is asked for"),
        (("--overwrite",), "--overwrite is of a promise, and none is asked for"),
        (("--fidelity", "90", "-o", "page.txt"), "--output is 'page.txt', and what is written is a page"),
        (("--fidelity", "90", "-o", "absent/page.html"), "there is no folder 'absent' to write to"),
    ):
        assert run([*start, *options]) == 2
        assert words in capsys.readouterr().err
    assert run(["eval", "demo", "demo", "--fidelity", "99"]) == 2
    assert "'demo' is no sparse file" in capsys.readouterr().err


def test_the_page_shows_images_by_what_became_of_them_and_unreadable_ones_are_left_out(
    finished, many, tmp_path, capsys
):
    folder, page = many(60), tmp_path / "page.html"
    start = ["eval", str(finished.folder), folder, "--checkpoint", str(finished.root / "weights.safetensors")]
    start += ["--device", "cpu", "-j", "0", "--calibrate", "40", "--bench-batch-sizes", "1", "--bench-seconds", "0.02"]
    assert run([*start, "--fidelity", "90", "--json"]) == 0
    went_on = json.loads(capsys.readouterr().out)["went_on"]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    others = [str(sorted((tmp_path / "images").iterdir())[row]) for row in sorted(order[40:])]
    assert went_on
    broken = next(name for name in others if name not in went_on)
    assert others.index(broken) < others.index(went_on[-1])
    Path(broken).write_bytes(b"no image")
    page.write_text("old")
    assert run([*start, "--fidelity", "90", "--skip-unreadable", "-o", str(page), "--overwrite", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert f"written to {page}" in err
    assert (result["num_images"], result["num_unreadable"], result["unreadable"]) == (19, 1, [broken])
    assert result["went_on"] == went_on
    shown = Page(page.read_text())
    shown.assert_self_contained()
    assert str(tmp_path) not in page.read_text()
    said = " ".join(shown.text.split())
    for words in ("the class of the dense model on at least 90 %", "Measured on 19 other images"):
        assert words in said
    changed, stayed = (
        int(re.search(rf"Went on, and the answer {what}: (\d+) of 19", said)[1]) if f"the answer {what}:" in said else 0
        for what in ("changed", "stayed")
    )
    assert changed + stayed == len(result["went_on"])
    images = [each for each in shown.all("image") if each.get("id", "").startswith("image-")]
    assert len(images) >= min(4, changed) + min(4, stayed)
    assert "certainty 0." in said.lower()
    assert run([*start, "--fidelity", "90", "--skip-unreadable", "-o", str(page)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.fixture(scope="module")
def elastic(make_vit, tmp_path_factory):
    """A file of a range, untrained, and the weights that it was made from."""
    root, dense = tmp_path_factory.mktemp("elastic"), make_vit(num_classes=2)
    save_file(dense.state_dict(), root / "weights.safetensors")
    sparse = vitprune.attach(dense, (0.5, 0.9))
    randomise(sparse.predictors, 1)
    vitprune.save(sparse, root / "run")
    return root


def test_of_a_range_the_ratio_is_chosen_kept_and_used(elastic, many, tmp_path, capsys):
    data, file = many(70), tmp_path / "promise.json"
    start = ["eval", str(elastic / "run"), data, "--checkpoint", str(elastic / "weights.safetensors")]
    start += ["--device", "cpu", "-j", "0", "--fidelity", "90", "--bench-batch-sizes", "1", "--bench-seconds", "0"]
    assert run([*start, "--calibrate", "50", "-o", str(file)]) == 0
    out = capsys.readouterr().out
    made = json.loads(file.read_text())
    candidates = [f"keep {keep:g}, then dense" for keep in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert made["chosen_from"] == candidates
    assert made["label"] == f"keep {made['keep']:g}, then dense"
    assert f"chosen: {made['label']}, by 10 images the cheapest of keep 0.5, then dense" in out
    assert (made["calibration"]["num_choosing"], made["calibration"]["num_images"]) == (10, 40)
    assert made["schema_version"] == 2
    assert run([*start, "--calibrate", "50", "-o", str(file)]) == 2
    assert "promise.json' exists" in capsys.readouterr().err

    assert run([*start, "--keep", "0.6", "--calibrate", "40", "--json"]) == 0
    fixed = json.loads(capsys.readouterr().out)
    assert (fixed["keep"], fixed["chosen_from"]) == (0.6, ["keep 0.6, then dense"])
    assert fixed["calibration"] | {"num_images": 40, "num_choosing": 0} == fixed["calibration"]
    assert run([*start, "--calibrate", "35"]) == 2
    assert "35 images are too few" in capsys.readouterr().err

    kept = read_promise(file)
    loaded = load_model(str(elastic / "run"))
    dense = load_dense(loaded, elastic / "weights.safetensors").model
    if kept.threshold is not None:
        adaptive = as_promised(kept, loaded.sparse, dense)
        assert (adaptive.models[0].keep, adaptive.threshold) == (made["keep"], made["threshold"])
    with pytest.raises(UsageError, match="all images go on"):
        as_promised(kept.model_copy(update={"threshold": None}), loaded.sparse, dense)
    with pytest.raises(UsageError, match="made of other weights"):
        as_promised(kept, vitprune.load(elastic / "run"), randomise(dense))


def test_unreadable_images_may_make_them_too_few(finished, many, capsys):
    data = many(50)
    for number in range(45):
        Path(data, f"{number}.png").write_bytes(b"no image")
    arguments = ["eval", str(finished.folder), data, "--checkpoint", str(finished.root / "weights.safetensors")]
    arguments += ["--device", "cpu", "-j", "0", "--fidelity", "90", "--calibrate", "40", "--skip-unreadable"]
    assert run(arguments) == 2
    assert "images are too few to promise a loss of at most 10 %" in capsys.readouterr().err


def test_python_promises_what_the_command_does_and_opens_it_again(elastic, many, tmp_path, capsys):
    data, by_command, file = many(70), tmp_path / "command.json", tmp_path / "python.json"
    weights = elastic / "weights.safetensors"
    start = ["eval", str(elastic / "run"), data, "--checkpoint", str(weights), "--device", "cpu", "-j", "0"]
    start += ["--fidelity", "60", "--calibrate", "50", "--bench-batch-sizes", "1", "--bench-seconds", "0"]
    assert run([*start, "-o", str(by_command)]) == 0
    expected = json.loads(by_command.read_text())

    sparse, dense = vitprune.load(elastic / "run"), load_dense(load_model(str(elastic / "run")), weights).model
    quick = {"device": "cpu", "num_workers": 0, "bench_seconds": 0, "progress": False}
    asked = {"fidelity": 60, "calibrate": 50, "dense": dense, **quick}
    adaptive = vitprune.promise(sparse, data, output=file, **asked)
    written = json.loads(file.read_text())
    assert written == {"schema_version": 2} | json.loads(json.dumps(adaptive.promise))
    timed = {"delta", "fixed", "speed", "model"}
    assert {key: written[key] for key in written.keys() - timed} == {
        key: expected[key] for key in expected.keys() - timed
    }
    assert adaptive.threshold == expected["threshold"] <= 1

    again = vitprune.promise(elastic / "run", kept=by_command, dense=dense, device="cpu", progress=False)
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(images), adaptive(images))
    assert again.promise["calibration"] == expected["calibration"]

    for arguments, words in (
        ({"data": data, "dense": dense}, "there is nothing to promise\nhint: try fidelity=99"),
        ({"data": data, **asked, "max_kl": 0.1}, "fidelity and max_kl are mutually exclusive"),
        ({"data": data, **asked, "confidence": 95}, "confidence is 95, expected a share"),
        ({"data": data, **asked, "calibrate": 0}, "0 images are too few"),
        ({"data": data, **asked, "keep": 0.3}, "0.3"),
        ({"data": data, **asked, "output": file}, "exists"),
        ({"data": data, **asked, "dense": None}, "does not hold the dense model .*\n.*dense=timm.create_model"),
        ({**asked}, "there are no images to make a promise by"),
        ({"data": data, "kept": file, "dense": dense}, "data does not go with kept"),
        ({"kept": tmp_path / "absent.json", "dense": dense}, "absent.json' not found"),
    ):
        with pytest.raises(vitprune.VitpruneError, match=words):
            vitprune.promise(sparse, **arguments)
    with pytest.raises(UsageError, match="is no sparse file"):
        vitprune.promise(dense, data, **asked)


def test_what_hangs_on_the_images_is_timed_on_some_of_all_of_them():
    """And not on the first classes of a sorted folder; where they are few, in turns."""
    seen = []

    class Seen(torch.nn.Module):
        def forward(self, images):
            seen.append(images[:, 0, 0, 0].int().tolist())
            return images

    def timed(count, size, passes):
        seen.clear()
        images = ImageSet(range(count), [0] * count, read=lambda item: Image.new("I", (2, 2), item))
        images.transform = lambda image: torch.full((1, 2, 2), float(image.getpixel((0, 0))))
        model = over_images(Seen(), images, [1, size])
        for _ in range(passes):
            model(torch.zeros(size, 1, 2, 2))
        return seen

    drawn = [number for batch in timed(1000, 8, 32) for number in batch]
    assert len(set(drawn)) == 256
    assert 400 < sum(drawn) / 256 < 600
    assert [len(batch) for batch in timed(3, 128, 3)] == [128, 128, 128]
    assert {number for batch in seen for number in batch} == {0, 1, 2}
