"""The model card against report.json and the file's header: figures, licence, hostile names, the user's own text."""

import html
import json
import re

import pytest
import timm
from finished_run import write_run, write_whole_run
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from vitprune.checkpoint.sparse_file import describe, read_metadata
from vitprune.cli.app import run
from vitprune.common.run_folder import RunFolder, signed, unsigned
from vitprune.loading.load import load_model
from vitprune.report.card import code, markdown, render_card
from vitprune.report.runs import read_run

BASE = "timm/deit_tiny_patch16_224.fb_in1k"
OF_TIMM = {"source": BASE, "license": "apache-2.0"}
MARKDOWN = MarkdownIt("commonmark").enable("table")


@pytest.fixture(scope="module")
def sparse(make_sparse):
    return make_sparse(num_classes=2)


@pytest.fixture
def folder(sparse, tmp_path):
    return write_whole_run(tmp_path / "run", sparse, OF_TIMM)


def card_of(folder):
    return ModelCard(render_card(read_run(folder), read_metadata(folder / "model.safetensors")))


def card_from(folder, sparse, origin):
    return ModelCard(render_card(read_run(folder), describe(sparse, origin=origin)))


def rows_of(card):
    """First cell of a table's row to the others, without emphasis."""
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_figures_are_the_reports(folder):
    card, report = card_of(folder), json.loads((folder / "report.json").read_text())
    dense, sparse, delta = report["dense"], report["sparse"], report["delta"]
    rows = rows_of(card)
    assert rows["top-1 (%)"] == [f"{dense['top1_pct']:.2f}", f"{sparse['top1_pct']:.2f}", f"{delta['top1_points']:.2f}"]
    assert rows["top-5 (%)"][:2] == [f"{side['top5_pct']:.2f}" for side in (dense, sparse)]
    assert rows["GMACs"][:2] == [f"{side['gmacs']:.3f}" for side in (dense, sparse)]
    assert rows["parameters (M)"][:2] == [f"{side['params_m']:.3f}" for side in (dense, sparse)]
    for index, batch in enumerate((1, 32)):
        speeds = [side["speed"][index] for side in (dense, sparse)]
        slower = " **SLOWER**" if batch == 1 else ""
        assert [
            row for row in card.text.splitlines() if row.startswith(f"| {batch} | {speeds[0]['images_per_s']}")
        ] == [
            f"| {batch} | {speeds[0]['images_per_s']:.1f} | {speeds[1]['images_per_s']:.1f} "
            f"| {speeds[0]['latency_ms_p50']:.2f} | {speeds[1]['latency_ms_p50']:.2f} "
            f"| {delta['speedup'][index]['speedup']:.2f} x{slower} |"
        ]
    assert "95 % interval -1.62 to +0.43" in card.text
    assert "71.59 % top-1" in card.text
    assert "It is slower than the dense model at batch 1" in card.text
    for stage in report["stages"]:
        assert f"| {stage['block']} | {stage['num_tokens']} of 6 |" in card.text
    assert report["commands"]["sparsify"] in card.text


def test_what_the_hub_reads(folder):
    data = card_of(folder).data
    report = json.loads((folder / "report.json").read_text())
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("vitprune", "image-classification", BASE)
    assert {"vitprune", "token-pruning"} <= set(data.tags)
    assert "timm" not in data.tags, "it could not open the file"
    results = {result.metric_name: result for result in data.eval_results}
    for key, name in (("top1_pct", "Top-1 accuracy (%)"), ("top5_pct", "Top-5 accuracy (%)")):
        assert results[name].metric_value == report["sparse"][key]
        assert results[name].metric_type == "accuracy"
        assert results[name].dataset_name == "images, 1172 images"
    assert data.datasets is None, "a folder of this machine is no data set of the Hub"


def test_data_sets_of_the_hub_are_named_and_folders_are_not(folder):
    report = json.loads((folder / "report.json").read_text())
    for name, datasets in (
        ("imagenet", ["ILSVRC/imagenet-1k"]),
        ("/home/somebody/imagenet", None),
        ("hf:owner/pets:small", ["owner/pets"]),
        ("hf:../secret", None),
        ("demo", None),
    ):
        write_run(folder, model=report["model"], label=report["label"], data={**report["data"], "name": name})
        assert card_of(folder).data.datasets == datasets


def test_licence_is_the_one_that_timm_gives_the_weights(folder, sparse):
    for name in (
        "deit_tiny_patch16_224.fb_in1k",
        "vit_small_patch16_dinov3.lvd1689m",
        "aimv2_large_patch14_224.apple_pt",
    ):
        config = timm.get_pretrained_cfg(name)
        card = card_from(folder, sparse, {"source": config.hf_hub_id, "license": config.license})
        said = card.data.license_name if card.data.license == "other" else card.data.license
        assert said == config.license
        assert card.data.base_model == config.hf_hub_id
        assert f"{config.license}, the licence of the dense weights." in card.text
    card = card_from(folder, sparse, {"source": "hf-hub:owner/net@v1", "license": "my licence #1"})
    assert (card.data.license, card.data.license_name) == ("other", "my-licence-1")
    assert card.data.license_link == "https://huggingface.co/owner/net"


def test_an_unknown_licence_or_base_is_left_out_and_said(folder, sparse, weights_file):
    for licence in (None, "unknown", ""):
        card = card_from(folder, sparse, {"source": "owner/net", "license": licence})
        assert card.data.license is None
        assert "The licence is that of the base model" in card.text
    old = {"source": "mine.safetensors", "license": "apache-2.0"}  # as earlier versions wrote it
    for origin in (load_model("test_vit", checkpoint=weights_file).origin, old):
        card = card_from(folder, sparse, origin)
        assert (card.data.license, card.data.base_model) == (None, None)
        assert "which vitprune does not know" in card.text


def test_no_path_of_the_machine(folder, sparse, tmp_path):
    card = card_from(folder, sparse, {"source": "/home/somebody/secret/owner/net", "license": None})
    for text in (str(card), str(card_of(folder))):
        assert "/home" not in text
        assert "somebody" not in text
        assert str(tmp_path) not in text


def test_hostile_text_is_shown_as_it_is():
    for name in (
        *("a|b", "<script>alert(1)</script>", "[x](javascript:y)", "![i](//e.org/i.png)", "`c` *d* _e_ **f**"),
        *("# g\n---\nh", "$$x$$ \\(y\\)", "&lt;b&gt;", "http://e.org", "a\x1b[31mb", "```\n# x"),
    ):
        table = MARKDOWN.render(f"| a | b |\n|---|---|\n| {markdown(name)} | end |\n")
        cells = re.findall(r"<td>(.*?)</td>", table)
        shown = " ".join(name.replace("\x1b", "\N{REPLACEMENT CHARACTER}").split())
        assert cells == [html.escape(shown), "end"]


def test_hostile_commands_stay_in_their_block():
    for text in ("a\n```\n# b", "`````", "a\x1b]0;x\x07"):
        tokens = MARKDOWN.parse(str(code(text, "bash")))
        assert [token.type for token in tokens] == ["fence"]


def test_hostile_names_of_a_run(sparse, tmp_path):
    names = ("cat|<img src=x onerror=y>", "dog\n---\nlicense: mit")
    folder = write_whole_run(
        tmp_path / "run",
        sparse,
        {"source": "x](http://e.org)\n---\n<b>", "license": "x\n---\ny"},
        names,
        model="m<i>|\n---\nlicense: mit",
        label="**k**",
        device="<u>",
        precision="`p`",
        data={"name": "d\n---\n| # e", "num_train_images": 1, "num_val_images": 2, "note": "<s>n</s>"},
        environment={"cpu": "<em>", "gpus": "<GPU>", "timm": "<t>"},
        commands={"sparsify": "vitprune\n```\n<h1>"},
    )
    card = card_of(folder)
    assert card.data.license == "other"
    assert card.data.to_dict()["model-index"][0]["name"] == "m<i>| --- license: mit, **k**"
    shown = MARKDOWN.render(card.text)
    tags = set(re.findall(r"<([a-z][a-z0-9]*)", shown))
    assert tags <= {
        *("h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "strong"),
        *("a", "code", "pre", "ul", "li"),
    }
    assert shown.count("<h1") == 1
    links = re.findall(r'href="([^"]*)"', shown)
    assert {link for link in links if not link.startswith("https://arxiv.org/")} == {"report.html", "report.json"}


def test_a_run_without_labels(folder, sparse):
    report = json.loads((folder / "report.json").read_text())
    sides = {name: report[name] | {"top1_pct": None, "top5_pct": None} for name in ("dense", "sparse", "random")}
    delta = report["delta"] | {"top1_points": None, "top1_points_ci95": None}
    write_run(folder, **sides, delta=delta, correct=None, classes=[], commands={}, environment={})
    card = card_of(folder)
    assert "model-index" not in card.data.to_dict()
    assert "without labels" in card.text
    assert "Paired difference" not in card.text


def test_report_writes_the_card_where_there_is_none_and_keeps_any_other(folder, capsys):
    for name in ("log.jsonl", "keepmaps.json"):  # drawing their charts takes most of the time
        (folder / name).unlink()
    card = folder / "README.md"
    assert run(["report", str(folder), "-o", str(folder / "page.html")]) == 0
    assert not card.exists(), "--output names the page alone"
    capsys.readouterr()
    assert run(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"] == str(card)
    assert card.read_text() == signed(str(card_of(folder)))

    def kept():
        assert run(["report", str(folder), "--json"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["card"] is None and "README.md' exists and is kept as it is" in err

    card.write_text("# Mine\n")
    assert kept()
    assert card.read_text() == "# Mine\n"
    card.unlink()
    card.symlink_to("nowhere")
    assert kept()
    assert card.is_symlink()
    card.unlink()
    card.mkdir()
    assert kept()
    card.rmdir()
    (folder / "model.safetensors").unlink()
    assert run(["report", str(folder)]) == 0
    assert "README.md was not written" in capsys.readouterr().err


def test_a_card_goes_with_the_run_that_it_is_of(folder):
    card, text = folder / "README.md", signed("# The run's\n")
    for edited in (text + "More.\n", "More.\n" + text, text.replace("run", "runner"), "# Of a project\n", ""):
        card.write_text(edited)
        RunFolder(folder).forget()
        assert card.read_text() == edited
    card.write_text(text)
    assert unsigned(card.read_bytes()) == b"# The run's\n"
    RunFolder(folder).forget()
    assert not card.exists()
