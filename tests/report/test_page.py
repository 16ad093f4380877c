"""report.html against report.json: every figure, nothing from elsewhere, nothing unescaped, readable by everyone."""

import json
import re
from itertools import pairwise

import pytest
from finished_run import make_keep_maps, make_report, write_run
from html_page import Page

from vitprune.cli.app import run
from vitprune.common.json_version import RENAMED
from vitprune.errors import CheckpointError, UsageError
from vitprune.report.page import render_page
from vitprune.report.runs import read_run
from vitprune.report.schema import Report
from vitprune.report.tables import verdict

PROMISED = {
    *("dense.top1_pct", "sparse.top1_pct", "delta.top1_points", "delta.top1_points_ci95.0", "delta.top1_points_ci95.1"),
    *("dense.gmacs", "sparse.gmacs", "delta.gmacs_pct", "dense.top5_pct", "sparse.top5_pct", "random.top1_pct"),
    *(f"{side}.speed.{i}.images_per_s" for side in ("dense", "sparse") for i in (0, 1)),
    *(f"{side}.speed.{i}.latency_ms_p50" for side in ("dense", "sparse") for i in (0, 1)),
    *("delta.speedup.0.speedup", "delta.speedup.1.speedup", "stages.0.num_tokens", "stages.1.num_tokens", "seconds"),
    *("classes.1.dense_top1_pct", "classes.1.sparse_top1_pct", "classes.2.sparse_top1_pct", "correct.both_right"),
}  # fmt: skip


def at(report, place):
    for part in place.split("."):
        report = report[int(part)] if isinstance(report, list) else report[part]
    return report


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A page: its text, its elements, and the report that it shows."""
    folder = write_run(tmp_path_factory.mktemp("page") / "run")
    text = render_page(read_run(folder))
    return text, Page(text), json.loads((folder / "report.json").read_text())


def test_every_figure_is_the_reports(drawn):
    _, page, report = drawn
    figures = page.all("data")
    assert {figure["data-key"] for figure in figures} >= PROMISED
    for figure in figures:
        value = at(report, figure["data-key"])
        assert json.loads(figure["value"]) == value
        text = figure["text"]
        digits = len(text.partition(".")[2])
        assert float(text) == pytest.approx(value, abs=0.5000001 * 10**-digits)
        assert digits > 0 or isinstance(value, int) or figure["data-key"] == "seconds"


def test_the_first_screen_says_what_happened(drawn):
    _, page, _ = drawn
    (heading,) = page.all("h1")
    assert heading["text"] == "deit_tiny_patch16_224.fb_in1k, keep 0.7"
    before = page.text[: page.text.index("Which tokens are kept")]
    for words in (
        "35.4 % fewer GMACs",
        "1.46 x as fast",
        "x at batch 1, slower",
        "-0.60 points",
        "-1.62 to +0.43",
        "75.09",
    ):
        assert words in " ".join(before.split())


def test_what_the_keep_ratio_means_is_said(drawn):
    _, page, _ = drawn
    said = "Keep 0.7 leaves 4/2 of 6 patch tokens, as in the paper"
    assert said in " ".join(page.text.split())


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(drawn):
    text, page, _ = drawn
    page.assert_self_contained()
    assert "default-src 'none'" in text


def test_everything_from_the_run_is_escaped(drawn):
    text, page, _ = drawn
    tags = {element["tag"] for element in page.elements}
    assert not tags & {"script", "b", "i", "u", "s", "em", "gpu"}
    for words in (
        'dog"><script>alert(1)</script>',
        "cat <b>bold</b>",
        "<i>x</i>",
        "<u>teacher",
        "<em>images",
        "<b>new</b>",
        "<GPU>",
    ):
        assert words in page.text or any(words in (e.get("aria-label") or "") for e in page.elements), words
    assert "<script" not in text


def test_control_characters_are_replaced_and_images_can_be_left_out(make_run):
    data = {"name": "x\x00y", "num_train_images": None, "num_val_images": 3}
    text = render_page(read_run(make_run(model="a\x1b[31m\u202eb", data=data)), images=False)
    assert not set(Page(text).text) & {"\x1b", "\u202e", "\x00"}
    assert "data:image/jpeg" not in text


def test_no_path_of_this_machine(drawn):
    text = drawn[0]
    assert "data:image/jpeg" in text
    assert "somebody" not in text
    assert "train/cat/1.jpg" in text
    assert "of images, on cpu" in text


def test_text_alternatives_headings_and_tables(drawn):
    _, page, _ = drawn
    assert page.elements[0] == {"tag": "html", "text": page.elements[0]["text"], "lang": "en"}
    assert any(e.get("name") == "viewport" and "width=device-width" in e["content"] for e in page.all("meta"))
    images = page.all("svg")
    assert len(images) == 2 * 3 + 1 + 1 + 3, "two images, speed, kept shares, three losses"
    for element in images:
        assert element["role"] == "img"
        assert len(element["aria-label"]) > 15
    assert not page.all("img")
    levels = [int(element["tag"][1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.all("th")
    assert all(element["scope"] in ("col", "row") for element in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for box in (e for e in page.elements if e.get("class") == "scroll"):
        assert box["tabindex"] == "0"
        assert box["role"] == "region"
        assert box["aria-label"]
    ids = [element["id"] for element in page.elements if element.get("id")]
    assert len(ids) == len(set(ids))
    used = {element["href"][1:] for element in page.all("use")}
    assert used <= set(ids)


def test_slower_rows_say_so_and_only_classes_that_moved_are_listed_worst_first(drawn):
    rows = [element["text"].split() for element in drawn[1].all("tr")]
    (one,) = [row for row in rows if row[0] == "1" and "45.4" in row]
    (many,) = [row for row in rows if row[0] == "32"]
    assert one[-1] == "SLOWER"
    assert "SLOWER" not in many
    worst, other = (row for row in rows if {"cat", "dog"} & set(" ".join(row).replace('"', " ").split()))
    assert ("cat" in worst, worst[-6:]) == (True, ["3", "2", "1", "66.7", "33.3", "-33.3"])
    assert other[0].startswith("dog")
    assert not any("tench" in row for row in rows)


def test_contrast_of_text_is_at_least_4_5(drawn):
    text, page, _ = drawn
    _, *schemes = page.all("style")[0]["text"].split(":root")
    assert len(schemes) == 3, "light, dark, print"
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for name in ("ink", "soft", "link", "c0", "c1", "c2", "c3"):
            for ground in ("paper", "box"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        assert contrast(colours["edge"], colours["veil"]) >= 3
        assert set(re.findall(r"var\(--(\w+)\)", text)) <= colours.keys(), "charts use no others"
    charts = [element for element in page.elements if element["tag"] in ("path", "text", "use") and "style" in element]
    assert len(charts) > 50
    assert not any(re.search(r"#\w{3,6}", element["style"]) for element in charts)


def test_nothing_is_wider_than_a_phone(drawn):
    style = drawn[1].all("style")[0]["text"]
    for width in re.findall(r"(?:^|[\s;{])(?:min-)?width:\s*([\d.]+)(px|rem)", style):
        assert float(width[0]) * (16 if width[1] == "rem" else 1) <= 390
    for least in re.findall(r"minmax\((.*?),", style):
        assert least.startswith("min("), "columns give way on a narrow screen"


def test_a_report_of_an_older_version_without_log_and_images(make_run):
    folder = make_run(keep_maps=False, steps=False)
    report = json.loads((folder / "report.json").read_text())
    for key in ("num_patches", "correct", "classes", "commands"):
        del report[key]
    for key in ("seconds_split", "num_unreadable", "unreadable"):
        del report["training"][key]
    (folder / "report.json").write_text(json.dumps(report))
    page = Page(render_page(read_run(folder)))
    for words in ("This page holds no images", "kept no log", "command that began this run was not kept"):
        assert words in page.text
    assert not page.all("image")
    commands = {"sparsify": "vitprune sparsify demo", "eval": "vitprune eval . demo", "bench": "vitprune bench ."}
    (folder / "report.json").write_text(json.dumps(report | {"commands": commands}))
    page = Page(render_page(read_run(folder)))
    for words in (*commands.values(), "and . is the run folder"):
        assert words in page.text


def test_files_of_version_1_give_the_same_page(make_run):
    folder = make_run()
    expected = render_page(read_run(folder))
    new = {new: old for old, new in RENAMED.items()}

    def aged(content):
        if isinstance(content, list):
            return [aged(each) for each in content]
        return {new.get(k, k): aged(v) for k, v in content.items()} if isinstance(content, dict) else content

    for name in ("report.json", "keepmaps.json"):
        content = json.loads((folder / name).read_text())
        old = json.dumps(aged(content | {"schema_version": 1})).replace('"merge"', '"fold"')
        (folder / name).write_text(old)
    assert "fold" in (folder / "report.json").read_text()
    log = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(log.replace('"pretraining"', '"warm"'))
    assert render_page(read_run(folder)) == expected


def test_a_run_without_labels(make_run):
    blank, report = {"top1_pct": None, "top5_pct": None}, make_report()
    delta = report["delta"] | {"top1_points": None, "top1_points_ci95": None, "top1_points_over_random": None}
    sides = {side: report[side] | blank for side in ("dense", "sparse", "random")}
    folder = make_run(**sides, delta=delta, correct=None, classes=[])
    page = Page(render_page(read_run(folder)))
    assert "predicts the dense model's class on 94.1 % of 1172 images" in page.text
    assert "have no labels" in page.text


def verdict_with(**delta):
    report = make_report()
    return verdict(Report.model_validate(report | {"delta": report["delta"] | delta}))


def test_verdict():
    for points, interval, words in (
        (-0.5, (-1.0, 0.0), "neither a loss nor a gain beyond chance"),
        (-0.5, (-0.9, -0.1), "-0.50 points on 1172 images (95 %: -0.90 to -0.10), a loss"),
        (0.5, (0.1, 0.9), "a gain"),
        (0.0, (0.0, 0.0), "neither a loss nor a gain beyond chance"),
    ):
        assert words in verdict_with(top1_points=points, top1_points_ci95=interval)
    for points, said in ((-3.3, True), (0.0, False), (None, False)):
        words = "as many tokens at random, untrained, are 3.30 points better"
        assert (words in verdict_with(top1_points_over_random=points)) == said
    slow = verdict_with(speedup=[{"batch_size": 8, "speedup": 0.9, "slower": True}])
    assert "slower than the dense model at batch 8: 0.90 x" in slow
    assert "as fast" not in slow


def test_pruned_patches_are_covered_and_nothing_else(drawn):
    """The made up images keep patches 0, 1, 2, 5 and then 1, 5 of a grid of 2 x 3."""
    paths = {look: [e["d"] for e in drawn[1].all("path") if e.get("class") == look] for look in ("cover", "edges")}
    for stage, kept, num_edges in ((0, {0, 1, 2, 5}, 3), (1, {1, 5}, 5)):
        squares = re.findall(r"M(\d+) (\d+)h1v1h-1z", paths["cover"][stage])
        assert {3 * int(y) + int(x) for x, y in squares} == set(range(6)) - kept
        assert paths["edges"][stage].count("M") == num_edges


def test_merged_patches_are_filled_with_their_mean_colour_within_lines(make_run):
    folder = make_run()
    content = make_keep_maps()
    for image in content["images"]:
        image["owners"] = [[0, 1, 1, 3, 4, 1], [1, 1, 1, 5, 5, 5]]
    (folder / "keepmaps.json").write_text(json.dumps(content))
    page = Page(render_page(read_run(folder)))
    looks = [each for each in page.all("path") if "d" in each]
    fills = [each for each in looks if re.fullmatch("#[0-9a-f]{6}", each.get("fill", ""))]
    red = [each for each in fills if each["fill"].startswith("#c")]
    assert len(red) == len(fills) == 2 * 2, "an image of one colour; one merged token, then two of the same colour"
    squares = re.findall(r"M(\d+) (\d+)h1v1h-1z", fills[0]["d"])
    assert {3 * int(y) + int(x) for x, y in squares} == {1, 2, 5}
    covers, edges = ([each["d"] for each in looks if each.get("class") == look] for look in ("cover", "edges"))
    assert not any(covers), "nothing has gone"
    assert [each.count("M") for each in edges[:2]] == [3, 3]


def test_damaged_files_are_named(make_run):
    no_jpeg = make_keep_maps()
    no_jpeg["images"][0]["jpeg"] = '"/><script>alert(1)</script>'
    for name, content, message in (
        ("report.json", "{", "is damaged"),
        ("report.json", "[]", "holds no object"),
        ("report.json", "{}", "is not what vitprune writes: schema_version"),
        ("report.json", '{"schema_version": 3}', "is not what vitprune writes"),
        ("report.json", "[" * 100_000, "is damaged"),
        ("keepmaps.json", '{"grid_size": [2, 3]}', "keepmaps.json' is not what vitprune writes"),
        ("keepmaps.json", "\x00", "is damaged"),
        ("keepmaps.json", json.dumps(no_jpeg), "jpeg"),
    ):
        folder = make_run()
        (folder / name).write_text(content)
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            read_run(folder)
        assert name in caught.value.message


def test_the_command_draws_again_and_tells_mistakes(make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run()
    (folder / "report.html").write_text("old")
    assert run(["report", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_images"] == 2
    assert result["size_mib"] * 2**20 == (folder / "report.html").stat().st_size < 3 * 2**20
    assert run(["report", str(folder), "--no-images", "-o", "page.html"]) == 0
    assert "0 images" in capsys.readouterr().out
    assert run(["report", str(folder), "-o", "page.html"]) == 2
    assert "the output 'page.html' exists" in capsys.readouterr().err
    assert run(["report", "absent"]) == 2
    assert "run folder 'absent' not found" in capsys.readouterr().err
    (folder / "report.json").unlink()
    assert run(["report", str(folder)]) == 2
    assert "no complete run" in capsys.readouterr().err
    with pytest.raises(UsageError):
        read_run(folder)


def contrast(one, other):
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_promised_speed_is_shown_with_what_came_of_it(make_run):
    speeds = {"predicted_speedup": 1.512, "measured_speedup": 1.49}
    times = {"predicted_latency_ms": 20.0, "measured_latency_ms": 20.31}
    asked = {"speedup": 1.5, "latency_ms": None, "batch_size": 8, "precision": "bf16"}
    for met, end in ((True, " ms."), (False, " ms: <strong>MISSED</strong>.")):
        folder = make_run(target=asked | speeds | times | {"met": met}, steps=False)
        page = render_page(read_run(folder), images=False)
        assert re.search("Asked for <data[^>]*>1.50</data> x dense at batch 8 in bf16", page)
        assert re.search("Predicted before training: <data[^>]*>1.51</data> x, <data[^>]*>20.00</data> ms", page)
        assert re.search(f"Measured after it: <data[^>]*>1.49</data> x, <data[^>]*>20.31</data>{end}", page)
