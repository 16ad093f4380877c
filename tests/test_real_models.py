"""Real weights and real images, where the folder `shared` stands beside the repository; skipped aloud elsewhere."""

import json
import os
from pathlib import Path

import pytest
import torch

from vitprune.cli.app import run

SHARED = Path(__file__).parent.parent.parent / "shared"
NAMES = ["deit_tiny_patch16_224", "vit_tiny_patch16_224"]

REASON = "needs ../shared with real weights and ImageNet images"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "models" / "dense.json").is_file(), reason=REASON),
]


@pytest.fixture(autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_dense_accuracy_on_imagenet_images_is_the_known_one(name, capsys):
    arguments = [name, str(SHARED / "imagenet"), "--checkpoint", str(SHARED / "models" / f"{name}.safetensors")]
    assert run(["eval", *arguments, "--device", "cpu", "--precision", "fp32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = json.loads((SHARED / "models" / "dense.json").read_text())[name]
    assert result["num_images"] == expected["num_images"]
    assert result["top1_pct"] == pytest.approx(expected["top1_pct"], abs=0.1)
    assert result["top5_pct"] == pytest.approx(expected["top5_pct"], abs=0.1)


@pytest.mark.timeout(600)
def test_short_pretraining_beats_random_tokens_on_imagenet_images(capsys, tmp_path, monkeypatch, quick_bench):
    monkeypatch.chdir(tmp_path)
    weights = str(SHARED / "models" / "vit_tiny_patch16_224.safetensors")
    files = ["--checkpoint", weights, "--data", str(SHARED / "imagenet")]
    quick = ["--pretraining-steps", "30", "--steps", "0", "--device", "cpu", "--bench-seconds", "0.1", "--limit", "300"]
    assert run(["sparsify", "vit_tiny", *files, *quick, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["delta"]["kl"] < 0.6 * report["random"]["kl"]  # top-1 of 300 images would say nothing
