"""The report: built from predictions and timings, written, and read back, also as older versions wrote it."""

import json
from dataclasses import fields, replace

import pytest
import torch
from finished_run import make_report

from vitprune.checkpoint.sparse_file import describe
from vitprune.data import Data, ImageSet
from vitprune.measure import Timing
from vitprune.report import Report, accuracy_of, build_report
from vitprune.report.tables import figure_rows, plain_figures, verdict
from vitprune.tasks import Predictions, task_named
from vitprune.training.progress import Progress
from vitprune.training.recipe import Recipe


def _predictions(classes, kl=None):
    top = torch.tensor([[index, 1 - index] for index in classes])
    return Predictions(torch.tensor([0, 0, 1, 1]), top, None if kl is None else torch.full((4,), kl))


def _timing(model, batch_size, rate):
    return Timing(model, batch_size, 1000 * batch_size / rate, 1.0, 2.0, rate, None, num_runs=9)


@pytest.fixture(scope="module")
def build(make_sparse):
    """`build(**changes)`: a report of four images."""
    sparse = make_sparse(num_classes=2, keep=0.5)
    images = ImageSet(["/home/me/images/a.png"] * 4, [0, 0, 1, 1], open, class_names={0: "cat", 1: "dog"})
    predictions = {
        "dense": _predictions([0, 0, 1, 0]),
        "sparse": _predictions([0, 1, 1, 1], kl=0.5),
        "random": _predictions([1, 1, 1, 1], kl=0.75),
    }
    rates = {("dense", 1): 10.0, ("dense", 32): 20.0, ("sparse", 1): 5.0, ("sparse", 32): 30.0}
    common = {
        "metadata": describe(sparse),
        "models": {"dense": sparse.model, "random": sparse, "sparse": sparse},
        "ratios": {},
        "results": predictions,
        "task": task_named("classification"),
        "timings": [_timing(*key, rate) for key, rate in rates.items()],
        "coverage": {"sparse": 90.0, "random": 50.0},
        "target": make_report()["target"],
        "training": {"recipe": Recipe().model_dump(mode="json")} | vars(Progress(num_images=8)),
        "data": Data("/home/me/images", images, images),
        "precision": "fp32",
        "device": "cpu",
        "seconds": 1.5,
        "commands": {"sparsify": "vitprune sparsify test_vit"},
    }
    return lambda **changes: build_report(**common | changes)


@pytest.fixture(scope="module")
def report(build):
    return build()


def test_figures_are_those_of_predictions_and_timings(report):
    assert (report.dense.top1_pct, report.sparse.top1_pct, report.random.top1_pct) == (75.0, 75.0, 50.0)
    delta = report.delta
    assert (delta.top1_points, delta.top1_points_over_random) == (0.0, 25.0)
    assert delta.top1_points_ci95[0] == -delta.top1_points_ci95[1]
    assert (delta.agreement_pct, delta.kl, report.random.kl) == (50.0, 0.5, 0.75)
    assert delta.gmacs_pct == pytest.approx(100 * (report.sparse.gmacs / report.dense.gmacs - 1))
    assert [(row.batch_size, row.speedup, row.slower) for row in delta.speedup] == [(1, 0.5, True), (32, 1.5, False)]
    assert report.correct.as_json() == {"both_right": 2, "dense_only": 1, "sparse_only": 1, "neither": 0}
    assert [(row.name, row.num_images, row.dense_top1_pct, row.sparse_top1_pct) for row in report.classes] == [
        ("cat", 2, 100.0, 50.0),
        ("dog", 2, 50.0, 100.0),
    ]
    assert report.coverage == {"sparse_pct": 90.0, "random_pct": 50.0}


def test_it_is_written_with_all_keys_and_read_back_equal(report):
    content, expected = report.as_json(), make_report()
    for side in ("dense", "sparse"):
        for row in content[side]["speed"]:
            assert row.keys() == {field.name for field in fields(Timing)} - {"model"}
        del content[side]["speed"], expected[side]["speed"]
    assert content["training"].keys() == vars(Progress()).keys() - {"shown"} | {"recipe"}
    assert content.keys() == expected.keys()
    for part in ("dense", "sparse", "random", "delta", "correct", "data"):
        assert content[part].keys() == expected[part].keys()
    for part in ("classes", "stages"):
        assert content[part][0].keys() == expected[part][0].keys()

    content = report.as_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert Report.model_validate(content) == report
    for part in (report, report.dense, report.dense.speed[0], report.delta, report.training, report.data):
        assert not part.model_extra, "every key that is written is declared"
    assert accuracy_of(report)["data"]["name"] == "images", "no folder of this machine"


def test_a_report_of_version_1_keeps_its_keys():
    """Without anything that came later, and with a key that is no longer known."""
    old = make_report()
    for key in ("task", "schedule", "align", "num_patches", "correct", "classes", "coverage", "target", "commands"):
        del old[key]
    del old["environment"], old["rare"]
    for key in set(old["training"]) - {"recipe", "steps_done", "num_steps", "num_images", "seconds"}:
        del old["training"][key]
    for key in ("num_unreadable_val", "unreadable_val", "note"):
        del old["data"][key]
    for key in ("top1_points_over_random", "top1_points_over_random_ci95", "kl"):
        del old["delta"][key]
    for side in ("dense", "sparse"):
        for row in old[side]["speed"]:
            for key in set(row) - {"batch_size", "images_per_s", "latency_ms_p50"}:
                del row[key]
    old["training"]["rollbacks"] = 2
    report = Report.model_validate(old)
    assert report.training.num_unreadable == 0
    assert report.as_json() == old


@pytest.mark.parametrize(
    ("train", "shown", "labelled", "expected"),
    [
        ([0] * 5 + [1] * 4, (), True, ("labels", 2, 50.0, 100.0, 50.0)),  # dogs: one more is right
        ([0] * 5 + [1] * 4, (), False, ("labels", 1, None, None, None)),  # what dense calls a dog
        ([-1] * 20, [55, 5], True, ("predictions", 2, 50.0, 100.0, 50.0)),  # each image three times: under two dogs
        ([-1] * 20, [45, 15], True, None),
        ([0] * 5 + [1] * 5, (), True, None),
        ([0] * 4 + [1] * 4, (), True, None),  # all are: nothing to tell apart
        ([-1] * 20, (), True, None),
    ],
)
def test_classes_that_training_hardly_shows_are_told_apart(build, report, train, shown, labelled, expected):
    predictions = {"dense": [0, 0, 1, 0], "sparse": [0, 1, 1, 1], "random": [1, 1, 1, 1]}
    results = {name: _predictions(classes, kl=0.5) for name, classes in predictions.items()}
    if not labelled:
        results = {name: replace(each, targets=torch.full((4,), -1)) for name, each in results.items()}
    images = [ImageSet(["a.png"] * len(labels), labels, open) for labels in (train, [0, 0, 1, 1])]
    training = report.training.as_json() | {"shown": list(shown)}
    found = build(results=results, data=Data("images", *images), training=training)
    assert not found.training.model_extra
    rare = found.rare
    got = rare and (rare.counted_by, rare.num_images, rare.dense_top1_pct, rare.sparse_top1_pct, rare.top1_points)
    assert got == expected
    said = verdict(found)
    assert ("classes with fewer than 5 training images" in said) == (expected is not None)
    if expected is not None:
        assert ("by the dense model's predictions" in said) == (expected[0] == "predictions")
        assert ("by +50.00 points (95 %: " in said) == labelled
        assert labelled or said.endswith("training images on 100.0 %.")
    rows = [row[0] for row in figure_rows(found, plain_figures(found))]
    assert ("top-1 (%) of rare classes" in rows) == (expected is not None and labelled)
