"""Real weights and real images, where the folder `shared` stands beside the repository; skipped aloud elsewhere."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from vitprune.cli.app import run

SHARED = Path(__file__).parent.parent.parent / "shared"
NAMES = ["deit_tiny_patch16_224", "vit_tiny_patch16_224"]

REASON = "needs ../shared with real weights and ImageNet images"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "models" / "dense.json").is_file(), reason=REASON),
]


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """Every twelfth validation image, in its class folder."""
    root = tmp_path_factory.mktemp("imagenet")
    for path in sorted((SHARED / "imagenet" / "val").glob("*/*"))[::12]:
        link = root / "val" / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return root


@torch.inference_mode()
def _by_timm(name, weights, root):
    """Whether the class of each image is timm's first answer, and whether it is among its first five."""
    model = timm.create_model(name).eval()
    model.load_state_dict(load_file(weights))
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    paths, ids = sorted(root.glob("val/*/*")), timm.data.ImageNetInfo().label_names()
    logits = model(torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths]))
    hits = logits.topk(5).indices == torch.tensor([ids.index(path.parent.name) for path in paths])[:, None]
    return hits[:, 0], hits.any(dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_dense_accuracy_on_imagenet_images_is_timms(name, few_images, capsys):
    weights = SHARED / "models" / f"{name}.safetensors"
    arguments = [name, str(few_images), "--checkpoint", str(weights)]
    assert run(["eval", *arguments, "--device", "cpu", "--precision", "fp32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    first, five = _by_timm(name, weights, few_images)
    assert result["num_images"] == len(first)
    assert result["top1_pct"] == pytest.approx(100 * first.float().mean().item(), abs=1e-3)
    assert result["top5_pct"] == pytest.approx(100 * five.float().mean().item(), abs=1e-3)
    known = json.loads((SHARED / "models" / "dense.json").read_text())[name]
    assert result["top1_pct"] == pytest.approx(known["top1_pct"], abs=12), "of a twelfth of the images"


def test_short_pretraining_beats_random_tokens_on_imagenet_images(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = str(SHARED / "models" / "vit_tiny_patch16_224.safetensors")
    files = ["--checkpoint", weights, "--data", str(SHARED / "imagenet"), "--limit", "96"]
    quick = ["--pretraining-steps", "30", "--steps", "0", "-b", "16", "--device", "cpu", "--bench-seconds", "0"]
    assert run(["sparsify", "vit_tiny", *files, *quick, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["delta"]["kl"] < 0.6 * report["random"]["kl"]  # top-1 of so few images would say nothing
