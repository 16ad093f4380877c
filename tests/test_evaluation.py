"""Accuracy, and differences that are paired."""

import math

import pytest
import torch
from torch import nn

from vitprune.common.progress import Listener
from vitprune.data import ImageSet, ModelClasses, eval_transform, open_data
from vitprune.errors import DataError, VitpruneError
from vitprune.evaluation import compared, predict
from vitprune.measure import Timing
from vitprune.tasks import Predictions, class_accuracy, task_named

CPU = torch.device("cpu")
CLASSES = task_named("classification")


def _predictions(top1, labels):
    top = torch.tensor([[c, *[x for x in range(10) if x != c][:4]] for c in top1])
    return Predictions(torch.tensor(labels), top)


def test_top1_and_top5_count_images():
    predictions = _predictions([0, 1, 9, 8], [0, 0, 9, 7])
    assert predictions.summary() == {"top1_pct": 50.0, "top5_pct": 75.0, "num_images": 4}


def test_without_labels_there_is_no_accuracy_but_agreement():
    one, other = _predictions([0, 1], [-1, -1]), _predictions([0, 2], [-1, -1])
    assert one.summary() == {"top1_pct": None, "top5_pct": None, "num_images": 2}
    assert one.agreement_pct(other) == 50.0
    assert one.change(other) == {"top1_points": None, "top1_points_ci95": None}
    assert class_accuracy({}, one=one) == []


def test_paired_interval_is_that_of_the_differences():
    labels = [0] * 100
    base = _predictions([0] * 80 + [1] * 20, labels)
    model = _predictions([0] * 75 + [1] * 5 + [0] * 10 + [1] * 10, labels)  # 5 lost, 10 won
    difference = model.change(base)
    assert difference["top1_points"] == pytest.approx(5.0)
    up, down = 11 / 102, 6 / 102  # one image more of each kind
    half = 196 * math.sqrt((up + down - (up - down) ** 2) / 102)
    middle = 100 * (up - down)
    assert difference["top1_points_ci95"] == pytest.approx([middle - half, middle + half], abs=1e-3)


def test_few_images_without_a_difference_are_no_certainty():
    for count, bound in ((1, 92.4), (40, 6.6), (1000, 0.28)):
        same = _predictions([0] * count, [0] * count)
        difference = same.change(same)
        assert difference["top1_points"] == 0
        low, high = difference["top1_points_ci95"]
        assert -low == pytest.approx(high)
        assert high == pytest.approx(bound, rel=0.03)


@pytest.mark.parametrize("count", [20, 200])
def test_the_interval_holds_the_truth_as_often_as_it_says(count):
    """Models that get 4 % more and 6 % fewer right: -2 points."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(500):
        draw = torch.rand(count, generator=generator)
        base = _predictions((draw >= 0.04).long().tolist(), [1] * count)
        model = _predictions(((draw < 0.04) | (draw >= 0.1)).long().tolist(), [1] * count)
        low, high = model.change(base)["top1_points_ci95"]
        held += low <= -2 <= high
    assert held / 500 > 0.93


def test_a_model_is_compared_with_dense_at_each_batch_size():
    dense, model = _predictions([0, 1, 2, 3], [0, 1, 2, 4]), _predictions([0, 1, 3, 4], [0, 1, 2, 4])
    rates = {"model": {1: 9.0, 32: 30.0}, "dense": {1: 10.0, 32: 20.0, 64: 20.0}}
    timings = [Timing(name, size, 1, 1, 1, rate, None, 1) for name in rates for size, rate in rates[name].items()]
    assert compared("model", {"model": model, "dense": dense}, timings) == {
        **model.change(dense),
        "agreement_pct": 50.0,
        "kl": None,
        "speedup": [
            {"batch_size": 1, "speedup": 0.9, "speedup_ci95": None, "slower": True},
            {"batch_size": 32, "speedup": 1.5, "speedup_ci95": None, "slower": False},
        ],
    }


class _Echo(nn.Module):
    """Answers the class that the first pixel names."""

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()


def _images(values, label=None):
    """Images of one pixel each."""
    return ImageSet(values, [v if label is None else label for v in values], lambda v: torch.full((1, 1, 1), float(v)))


class _Heard(Listener):
    def __init__(self):
        self.counts = []

    def advance(self, count=1):
        self.counts.append(count)


def test_every_image_counts_once_and_in_order():
    heard, images = _Heard(), _images([0, 1, 2, 0, 1, 2, 0])
    found, faults = predict({"echo": _Echo()}, images, CPU, task=CLASSES, batch_size=3, listener=heard)
    assert heard.counts == [3, 3, 1]
    assert found["echo"].targets.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found["echo"].top1_pct == 100.0
    assert found["echo"].top.shape == (7, 3), "fewer than five classes"
    assert (faults.count, faults.names) == (0, [])


def test_unreadable_images_are_left_out_where_that_is_allowed():
    images = _images([0, 1, 2])

    def read(value):
        if value == 1:
            raise OSError("truncated")
        return torch.full((1, 1, 1), float(value))

    images.read = read
    found, faults = predict({"echo": _Echo()}, images, CPU, task=CLASSES, allowed_share=1.0)
    assert found["echo"].targets.tolist() == [0, 2]
    assert (faults.count, faults.names) == (1, ["1"])
    with pytest.raises(DataError, match="cannot read image '1'"):
        predict({"echo": _Echo()}, images, CPU, task=CLASSES)
    with pytest.raises(DataError, match="none of 1 images could be read: the first is"):
        predict({"echo": _Echo()}, images.subset([1]), CPU, task=CLASSES, allowed_share=1.0)


class _Fixed(nn.Module):
    """Answers every image alike."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log() + 3.0

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_divergence_is_the_formula_and_the_reference_has_none():
    images = _images([0] * 5, label=-1)
    p, q = [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]
    models = {"dense": _Fixed(p), "sparse": _Fixed(q), "same": _Fixed(p)}
    predictions, _ = predict(models, images, CPU, task=CLASSES, batch_size=2, reference="dense")
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert predictions["sparse"].kl.shape == (5,)
    assert predictions["sparse"].mean_kl == pytest.approx(expected, abs=1e-6)
    assert predictions["same"].mean_kl == pytest.approx(0.0, abs=1e-6)
    assert predictions["dense"].mean_kl is None
    assert predict({"sparse": _Fixed(q)}, images, CPU, task=CLASSES)[0]["sparse"].mean_kl is None


def test_dense_accuracy_is_timms_own(make_vit, image_folder):
    model = make_vit(num_classes=2)
    images = open_data(str(image_folder), ModelClasses(2)).val
    images.transform = eval_transform(model)
    predictions = predict({"m": model}, images, CPU, task=CLASSES, batch_size=4)[0]["m"]
    with torch.no_grad():
        answers = [model(images[i][0][None]).argmax().item() for i in range(len(images))]
    assert predictions.top[:, 0].tolist() == answers


def test_accuracy_by_class_counts_images_of_each():
    labels = [0, 0, 2, 2, 2, 5]
    dense, sparse = _predictions([0, 1, 2, 2, 2, 5], labels), _predictions([0, 0, 2, 2, 1, 4], labels)
    assert class_accuracy({2: "cat"}, dense_pct=dense, sparse_pct=sparse) == [
        {"index": 0, "name": None, "num_images": 2, "dense_pct": 50.0, "sparse_pct": 100.0},
        {"index": 2, "name": "cat", "num_images": 3, "dense_pct": 100.0, "sparse_pct": pytest.approx(200 / 3)},
        {"index": 5, "name": None, "num_images": 1, "dense_pct": 100.0, "sparse_pct": 0.0},
    ]


class _Hungry(nn.Module):
    def forward(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")


def test_out_of_memory_says_what_to_lower():
    with pytest.raises(VitpruneError, match="out of memory while evaluating 4 images at a time on cpu") as caught:
        predict({"model": _Hungry()}, _images([0]), CPU, task=CLASSES, batch_size=4)
    assert "--batch-size" in caught.value.hint
