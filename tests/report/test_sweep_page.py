"""Who is on the front, the sentences about it, and sweep.html."""

import json
import math
import re

import pytest
from html_page import Page

from vitprune.adaptive import Reached
from vitprune.cli.app import run
from vitprune.report.sweep import WithDense, adaptive_said, dominated_by, verdict, write_sweep
from vitprune.report.sweep_page import judged_by, render_sweep_page

TOP1, AGREEMENT = (judged_by({"accuracy": key}) for key in ("top1_pct", "agreement_pct"))
NASTY = 'tiny"><script>alert(1)</script>'


def test_front_of_known_points():
    """By hand: b dominates a and c; d is slowest and most accurate; e is b again, and neither dominates the other."""
    points = {"a": (80, 10), "b": (81, 12), "c": (81, 11), "d": (82, 5), "e": (81, 12)}
    assert dominated_by(points) == {"a": ["b", "e"], "b": [], "c": ["b", "e"], "d": [], "e": []}
    assert dominated_by({"dense": (80, -4.6), "sparse": (80, -3.0)}) == {"dense": ["sparse"], "sparse": []}, "a cost"


def _beats(label, points, low, high, speed_ratio):
    return {
        "label": label,
        "top1_points": points,
        "top1_points_ci95": [low, high],
        "better_by": 1.5,
        "speed_ratio": speed_ratio,
    }


def _row(label, kind, top1, rates, gmacs, beaten=()):
    points = top1 - 80.0
    return {
        "label": label,
        "kind": kind,
        "model": "deit_small",
        "keep": 0.5,
        "run": label.replace(" ", "") if kind == "sparse" else None,
        "top1_pct": top1,
        "num_images": 1172,
        "gmacs": gmacs,
        "speed": [{"batch_size": size, "images_per_s": rate} for size, rate in zip((1, 32), rates, strict=True)],
        "delta": {
            "top1_points": points,
            "top1_points_ci95": [points - 0.5, points + 0.5],
            "agreement_pct": 99.0,
            "speedup": [
                {"batch_size": size, "speedup": rate / dense, "slower": rate < dense}
                for size, rate, dense in zip((1, 32), rates, (14.0, 16.0), strict=True)
            ],
        },
        "by_throughput": {"on_front": not beaten, "dominated_by": list(beaten)},
        "by_gmacs": {"on_front": not beaten, "dominated_by": list(beaten)},
    }


@pytest.fixture
def result():
    """sweep.json, made up: the small model beats keep 0.5; keep 0.9 is slower at batch 1."""
    rows = [
        _row("dense", "dense", 80.0, (14.0, 16.0), 4.6),
        _row("keep 0.9", "sparse", 79.5, (13.0, 18.0), 4.0),
        _row("keep 0.5", "sparse", 71.0, (21.0, 34.0), 2.3, [_beats(NASTY, 1.0, 0.25, 1.75, 1.7)]),
        _row(NASTY, "other", 72.0, (45.0, 57.8), 1.25),
    ]
    return {
        "schema_version": 2,
        "accuracy": "top1_pct",
        "verdict": verdict(rows, TOP1, 32),
        "rows": rows,
        "adaptive": {"fixed": [], "curve": [], "chosen": None, "speed": []},
        "model": "deit_small",
        "failed": [{"label": "keep 0.7", "keep": 0.7, "error": "out of <memory>"}],
        "recipe": {"name": "short"},
        "data": {"name": "/home/somebody/images", "note": None, "num_unreadable_val": 1},
        "commands": {"sweep": "vitprune sweep deit_small --data 'path/to/<em>images'"},
        "precision": "fp32",
        "device": "cpu",
        "seconds": 12.0,
        "environment": {"torch": "2.15.0"},
    }


def test_the_verdict_names_the_best_choice_the_beaten_and_the_slow(result):
    assert result["verdict"] == [
        "The fastest within 1 point of dense is keep 0.9: -0.50 points (95 %: -1.00 to +0.00), 1.12 x as fast at "
        "batch 32.",
        f"{NASTY} (dense) is better at batch 32 than keep 0.5 (+1.00 points, 1.70 x as fast).",
        "Slower than dense at batch 1: keep 0.9.",
    ]


def test_a_difference_that_may_be_chance_is_said_to_be(result):
    result["rows"][3]["label"] = "tiny"
    for points, low, high, words in (
        (1.0, -0.5, 2.5, "(+1.00 points, within chance, 1.70 x as fast)"),
        (0.0, -0.5, 0.5, "(as accurate, 1.70 x as fast)"),
        (None, 0, 0, "(+1.5 % same prediction as dense, 1.70 x as fast)"),
    ):
        result["rows"][2]["by_throughput"]["dominated_by"] = [_beats("tiny", points, low, high, 1.7)]
        judged = AGREEMENT if points is None else TOP1
        assert any(words in sentence for sentence in verdict(result["rows"], judged, 32))
    rows = result["rows"][:1] + result["rows"][2:]
    assert verdict(rows, TOP1, 32)[0] == "No model within 1 point of dense is faster than the dense one at batch 32."


def test_the_page_says_in_words_what_the_charts_show_and_loads_nothing(result):
    text = render_sweep_page(result)
    page = Page(text)
    page.assert_self_contained(links=[f"keep0.{digit}/report.html" for digit in (5, 9)])
    assert not page.all("em", "memory")
    charts = page.all("svg")
    assert len(charts) == 2
    for chart in charts:
        for row in result["rows"]:
            assert row["label"] in chart["aria-label"]
        assert f"dominated by {NASTY}" in chart["aria-label"]
    assert page.text.count(f"dominated by {NASTY}") == 2, "in the table too: colour and shape say nothing alone"
    assert "SLOWER" in page.text
    assert "out of <memory>" in page.text
    assert "/home/somebody" not in text
    assert "1 unreadable image(s) were left out" in page.text
    assert "No smaller dense model was compared" not in page.text
    for sentence in result["verdict"]:
        assert sentence in page.text


def test_marks_lie_where_the_figures_say(result):
    """The more images a second the further right, the more accurate the higher; hollow if dominated."""
    text = render_sweep_page(result)
    chart = text[text.index("<svg") : text.index("</svg>")]
    marks = re.findall(r'<use href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: ([^;]+); stroke: ([^;"]+)', chart)
    looks = [list(mark[2:]) for mark in marks]
    blue, brown, violet, none = "var(--c0)", "var(--c1)", "var(--c3)", "var(--box)"
    assert looks == [[blue, blue], [brown, brown], [none, brown], [violet, violet]]
    (x0, y0), (x1, y1), (x2, y2) = ((float(x), float(y)) for x, y, *_ in marks[:3])
    assert math.isclose((x1 - x0) / (x2 - x0), (18 - 16) / (34 - 16), abs_tol=0.01)
    assert math.isclose((y1 - y0) / (y2 - y0), (79.5 - 80) / (71 - 80), abs_tol=0.01)
    assert y0 < y1 < y2


def test_without_labels_there_are_no_points(result):
    for row in result["rows"]:
        row["top1_pct"] = row["delta"]["top1_points"] = row["delta"]["top1_points_ci95"] = None
    result["accuracy"] = "agreement_pct"
    result["verdict"] = verdict(result["rows"], judged_by(result), 32)
    page = Page(render_sweep_page(result))
    assert "The images have no labels" in page.text
    assert "same prediction as dense (%)" in page.text
    assert "95 %" not in page.text


def test_the_page_is_written_whole(result, tmp_path):
    write_sweep(tmp_path, result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.html", "sweep.json"]
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    assert run(["report", str(tmp_path)]) == 2, "a sweep is no run"


def test_keep_ratios_with_dense_behind_are_drawn_and_said(result):
    points = [Reached(0.1, 0, 0.2, 2.3, "keep 0.5"), Reached(0.4, 31.25, 0.009, 3.6, "keep 0.5"), Reached(2, 100, 0, 6)]
    fixed = [points[0], Reached(0.1, 0, 0.05, 4.0, "keep 0.9")]
    behind = WithDense(fixed, points, points[1], 4.6)
    (said,) = adaptive_said(behind)
    assert said == (
        "keep 0.5 with dense behind it for the 31.2 % of which it is least sure has dense's answer on 99.1 % of these "
        "images at 3.600 GMACs on average, dense 4.600; vitprune eval --fidelity 99 promises it."
    )
    slow = {"batch_size": 32, "speedup": 0.9, "slower": True, "speedup_ci95": [0.8, 0.95]}
    assert "dense 4.600, 0.90 x as fast at batch 32 (SLOWER); vitprune" in adaptive_said(behind, [slow])[0]
    assert "saves nothing at 99 % fidelity" in adaptive_said(behind._replace(gmacs_dense=3.5))[0]
    assert adaptive_said(behind._replace(chosen=None)) == []
    speed = [{"batch_size": 32, "images_per_s": 21.5}]
    drawn = {"fixed": [each._asdict() for each in fixed], "curve": [each._asdict() for each in points]}
    result["adaptive"] = drawn | {"chosen": points[1]._asdict(), "speed": speed}
    page = Page(render_sweep_page(result))
    by_cost, by_speed = [each["aria-label"] for each in page.all("svg") if "Same answer" in each["aria-label"]]
    for words in (
        "Same answer as dense (%) against mean GMACs. dense: 100.00 at 4.600 mean GMACs",
        "keep 0.5: 80.00 at 2.300",
        "keep 0.9: 95.00 at 4.000",
        "adaptive: 99.10 at 3.600",
        "from 80.00 at 2.300 to 100.00 at 6.000",
    ):
        assert words in by_cost
    for words in (
        "dense: 100.00 at 16.000 images/s at batch 32",
        "keep 0.9: 95.00 at 18.000",
        "adaptive: 99.10 at 21.500",
    ):
        assert words in by_speed
    assert "Triangle: keep 0.5 with dense behind it" in page.text
    result["adaptive"] |= {"chosen": None, "speed": []}
    assert "Triangle: " not in Page(render_sweep_page(result)).text
