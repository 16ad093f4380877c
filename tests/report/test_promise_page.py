"""The page of a promise: its words and charts, nothing from elsewhere, nothing unescaped."""

import pytest
from finished_run import CLASSES, make_keep_maps
from html_page import Page

from vitprune.report.promise_page import render_promise_page
from vitprune.report.schema import KeepMaps


def _side(agreement, speedup):
    change = {"batch_size": 8, "speedup": speedup, "slower": speedup < 1, "speedup_ci95": [speedup, speedup]}
    return {"agreement_pct": agreement, "label_agreement_pct": agreement, "kl": 0.02, "speedup": [change]}


@pytest.fixture
def result():
    points = [(0.1, 0.0, 0.1, 0.6), (0.4, 25.0, 0.0125, 0.85), (2.0, 100.0, 0.0, 1.6)]
    keys = ("threshold", "went_on_pct", "loss", "gmacs_mean")
    return {
        "model": "vit<script>alert(1)</script>",
        "label": "keep 0.5, then dense",
        "task": "classification",
        "data": "/home/somebody/<em>images",
        "precision": "fp32",
        "device": "cpu",
        "asked": {"fidelity_pct": 98.0, "max_kl": None, "confidence": 0.95},
        "threshold": 0.4,
        "chosen_from": ["keep 0.5, then dense", "keep 0.6, then dense"],
        "calibration": {
            "num_images": 480,
            "num_choosing": 120,
            "loss": 0.01,
            "bound": 0.019,
            "went_on_pct": 24.0,
            "gmacs_mean": 0.84,
        },
        "num_images": 80,
        "loss": 0.0125,
        "went_on_pct": 25.0,
        "costs": [{"gmacs": 0.6, "num_images": 60}, {"gmacs": 1.6, "num_images": 20}],
        "curve": [dict(zip(keys, point, strict=True)) for point in points],
        "gmacs_mean": 0.85,
        "gmacs_worst": 1.6,
        "gmacs_sparse": 0.6,
        "gmacs_dense": 1.25,
        "delta": _side(98.75, 0.9),
        "fixed": _side(90.0, 1.8),
        "speed": [
            {"model": name, "batch_size": size, "images_per_s": rate * size}
            for size in (1, 8)
            for name, rate in (("dense", 10.0), ("sparse", 18.0), ("adaptive", 9.0))
        ],
        "num_unreadable": 2,
        "remarks": ["<b>1</b> image(s) scaled"],
    }


def test_it_says_what_was_asked_what_came_of_it_and_what_it_cost(result):
    text = render_promise_page(result, KeepMaps.model_validate(make_keep_maps()))
    page = Page(text)
    page.assert_self_contained()
    assert not page.all("script", "b", "em")
    assert "somebody" not in text
    said = " ".join(page.text.split())
    for words in (
        "Chosen: keep 0.5, then dense, by 120 images the cheapest of keep 0.5, then dense, keep 0.6, then dense.",
        "the class of the dense model on at least 98 % of images like these; by 480 images on 98.10 % or more",
        "Measured on 80 other images: on 98.75 %.",
        "0.600 60 75.0 % 1.600 20 25.0 %",
        "adaptive 98.8 0.020 0.850 0.90 x SLOWER",
        "2 unreadable image(s) were left out",
        "<b>1</b> image(s) scaled",
        f"Dense: {CLASSES[2]} 61.2 %",
    ):
        assert words in said
    by_cost, by_speed = (each["aria-label"] for each in page.all("svg") if each.get("class") == "chart")
    for words in ("adaptive: 98.75 at 0.850 mean GMACs", "sparse alone: 90.00 at 0.600", "to 100.00 at 1.600"):
        assert words in by_cost
    assert "adaptive: 98.75 at 72.000 images/s at batch 8" in by_speed


def test_of_divergence_and_labels_and_without_images(result):
    result |= {"task": "multilabel", "asked": {"fidelity_pct": None, "max_kl": 0.02, "confidence": 0.9}}
    page = Page(render_promise_page(result, KeepMaps(grid_size=(2, 3), num_seen=80, images=[])))
    said = " ".join(page.text.split())
    assert "a mean KL divergence from the dense model of at most 0.02" in said
    assert "KL from dense (nats) against mean GMACs" in said
    assert "No image went on, and none has another answer than dense." in said
    result["threshold"] = None
    assert "all images go on" in render_promise_page(result, KeepMaps(grid_size=(2, 3), num_seen=80, images=[]))
