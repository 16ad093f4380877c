"""`eval --fidelity`: a promise by some images, kept on others."""

import json
import re
from pathlib import Path

import pytest
import torch
from html_page import Page
from PIL import Image

import vitprune
from vitprune.cli.app import run


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
    assert "ratios 0.7,0.5, beside dense" in capsys.readouterr().out


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
        (("--fidelity", "99", "--calibrate", "40"), "takes at least 299 images"),
        (("--fidelity", "90", "--calibrate", "60"), "there are 60 images; 60 choose the threshold"),
        (("--calibrate", "40"), "--calibrate is of a promise, and none is asked for"),
        (("--fidelity", "99", "--max-kl", "0.1"), "mutually exclusive"),
        (("--fidelity", "90", "--min-top1", "50"), "--min-top1 does not go with a promise"),
        (("--fidelity", "90", "--per-class"), "--per-class does not go with a promise"),
        (("--fidelity", "90", "--confidence", "95"), "--confidence is 95, expected a share"),
        (("-o", "page.html"), "--output is of a promise, and none is asked for"),
        (("--overwrite",), "--overwrite is of a promise, and none is asked for"),
        (("--fidelity", "90", "-o", "page.json"), "--output is 'page.json', and what is written is a page"),
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
