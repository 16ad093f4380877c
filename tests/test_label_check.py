"""Labels that cannot be the model's are doubted aloud, and stop a run before it begins."""

import json
from math import comb

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vitprune.cli.app import run
from vitprune.jobs.label_check import _at_most, doubt
from vitprune.tasks import Predictions


def predictions(right, count, sure, num_classes):
    """`right` of `count` answers are right, all given with the probability `sure`."""
    labels = torch.arange(count) % num_classes
    answers = torch.where(torch.arange(count) < right, labels, (labels + 1) % num_classes)
    return Predictions(labels, answers[:, None], confidence=torch.full((count,), sure))


@pytest.mark.parametrize("count", [1, 6, 200])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.97])
def test_the_binomial_distribution_is_that_of_the_formula(count, share):
    for right in {0, count // 2, count - 1, count}:
        exact = sum(comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(right + 1))
        assert _at_most(right, count, share) == pytest.approx(exact, rel=1e-9)
    assert _at_most(-1, count, share) == 0


@pytest.mark.parametrize(
    ("right", "count", "sure", "num_classes", "doubted"),
    [
        (8, 100, 0.97, 12, True),  # class folders in another order than the model's
        (97, 100, 0.97, 12, False),
        (8, 100, 0.1, 12, False),  # a head that was never trained says so itself
        (30, 100, 0.97, 12, False),  # poor, but not chance: other images, not other labels
        (0, 200, 0.7, 1000, True),
        (3, 6, 0.55, 2, False),  # too few to tell
        (3, 6, 0.999, 2, False),
        (10, 20, 0.999, 2, True),
        (1, 1, 0.9, 2, False),
        (0, 50, 1.0, 1, False),
    ],
)
def test_doubt_is_that_of_two_tests(right, count, sure, num_classes, doubted):
    reason = doubt(predictions(right, count, sure, max(2, num_classes)), num_classes)
    assert (reason is not None) == doubted
    if doubted:
        assert f"{right} of {count} images" in reason


def test_unlabelled_images_raise_no_doubt():
    found = predictions(0, 50, 0.9, 2)
    assert doubt(Predictions(torch.full((50,), -1), found.top, confidence=found.confidence), 2) is None


def test_a_run_with_such_labels_stops_before_it_writes_and_eval_says_so(make_vit, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_vit(num_classes=2, img_size=64, depth=2)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([50.0, -50.0]))  # always the first class, always sure
    save_file(model.state_dict(), "w.safetensors")
    for index in range(80):
        split, name = "train" if index < 40 else "val", "cat" if index % 2 else "dog"
        image = tmp_path / "images" / split / name / f"{index}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (index, 0, 0)).save(image)
    shallow = ["--model-kwargs", "depth=2", "--img-size", "64"]
    data = ["images", "--checkpoint", "w.safetensors", *shallow, "--device", "cpu", "-j", "0"]
    short = ["--pretraining-steps", "1", "--steps", "1", "-b", "4", "--bench-seconds", "0", "-o", "run"]
    for more in ([], ["--dry-run"]):
        assert run(["sparsify", "test_vit", *data, *short, *more]) == 1
        err = capsys.readouterr().err
        assert "images, about as chance would (50 %), though it is 100 % sure" in err
        assert "--force-labels goes on" in err
        assert not (tmp_path / "run").exists()
    assert run(["sparsify", "test_vit", *data, *short, "--force-labels", "--dry-run"]) == 0
    assert run(["sparsify", "test_vit", *data, *short, "--force-labels"]) == 0
    capsys.readouterr()
    assert run(["eval", "test_vit", *data, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "warning: the model gives the right class for 20 of 40 images" in err
    assert json.loads(out)["doubt"].startswith("the model gives")
