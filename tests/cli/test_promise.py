"""`eval --fidelity`: a promise by some images, kept on others."""

import json

import pytest
import torch
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
    ):
        assert run([*start, *options]) == 2
        assert words in capsys.readouterr().err
    assert run(["eval", "demo", "demo", "--fidelity", "99"]) == 2
    assert "'demo' is no sparse file" in capsys.readouterr().err
