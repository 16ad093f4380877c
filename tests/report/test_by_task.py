"""Page, card, summary and sweep of every task: its own words and figures, and none of another's."""

import base64
import io
import json
import re

import pytest
import torch
from finished_run import make_task_keep_maps, make_task_report, write_whole_run
from html_page import Page
from huggingface_hub import ModelCard
from PIL import Image

from vitprune.checkpoint.sparse_file import read_metadata
from vitprune.cli.app import run
from vitprune.cli.tables import print_summary
from vitprune.data import Data, ImageSet, eval_transform
from vitprune.model import attach
from vitprune.report import Report, accuracy_of
from vitprune.report.card import render_card
from vitprune.report.page import render_page
from vitprune.report.runs import read_run
from vitprune.report.samples import choose_images
from vitprune.report.schema import ImageRow, KeepMaps
from vitprune.report.sweep import verdict
from vitprune.report.sweep_page import judged_by
from vitprune.report.tables import verdict as report_verdict
from vitprune.tasks import TASKS, task_named

OTHERS = [name for name in TASKS if name != "classification"]
EACH = pytest.mark.parametrize("name", OTHERS)
OF_CLASSIFIERS = ("top-1", "class", "prediction", "probabilit")
CHANGES = {
    "multilabel": "mAP changes by -0.75 points on 1172 images (95 %: -1.50 to +0.00), neither a loss",
    "regression": "mean absolute error changes by +2.5000 on 1172 images (95 %: +1.0000 to +4.0000), a loss",
    "embedding": "k-NN top-1 changes by -0.25 points on 1172 images (95 %: -1.00 to +0.50), neither a loss",
    "dense": "its patches' features have cosine 0.9612 to the dense model's, centred, those of pruned patches 0.9200",
}
USAGE = {
    "multilabel": "model(images).sigmoid()",
    "regression": "values = model(images)",
    "embedding": "embedding = torch.nn.functional.normalize(model(images), dim=-1)",
    "dense": "features = model.forward_features(images)",
}


@pytest.fixture(scope="module")
def sparse(make_sparse):
    return make_sparse(num_classes=2)


@pytest.fixture
def finished(sparse, tmp_path):
    """`finished(task, labelled=True)`: a run folder."""

    def make(name, labelled=True):
        sparse.task = name
        report = make_task_report(name, labelled)
        content = {key: value for key, value in report.items() if key not in ("model", "label")}
        folder = write_whole_run(tmp_path / name, sparse, class_names=("cat", "dog"), **content)
        (folder / "keepmaps.json").write_text(json.dumps(make_task_keep_maps(name)))
        log = folder / "log.jsonl"
        log.write_text(log.read_text().replace('"kl"', f'"{task_named(name).loss}"'))
        sparse.task = "classification"
        return folder

    return make


def _words(text, name):
    """In small letters, without what a task says of its own."""
    text = text.lower().replace("class token", "").replace("k-nn top-1", "").replace("k-nn-top-1", "")
    text = text.replace("multi-label image classifier", "").replace("kl divergence from the teacher's predictions", "")
    if name == "embedding":
        text = text.replace("the class that", "")
    return text.replace("probabilities = ", "").replace("its probability", "").replace("by a probability above", "")


@EACH
@pytest.mark.parametrize("labelled", [True, False])
def test_the_page_has_the_figures_of_the_task_and_nothing_of_classes(finished, name, labelled):
    folder, task = finished(name, labelled), task_named(name)
    text = render_page(read_run(folder))
    page = Page(text)
    page.assert_self_contained()
    said = " ".join(page.text.split())
    for figure in task.fidelity:
        assert figure.text in said
        assert any(each["data-key"] == f"delta.{figure.key}" for each in page.all("data")), figure
    for figure in task.accuracy:
        assert (figure.text in said) == labelled
    assert task.explained in said
    found = [word for word in OF_CLASSIFIERS if word in _words(said, name)]
    assert not found, found
    assert ("nearest of 3000 training images" in said) == (name == "embedding" and labelled)
    titles = [each["aria-label"] for each in page.all("svg") if each.get("class") == "chart"]
    against = [title for title in titles if "against images/s" in title]
    assert len(against) == (labelled and bool(task.accuracy))


@EACH
def test_the_verdict_says_loss_or_gain_by_the_task(name):
    report = Report.model_validate(make_task_report(name))
    assert CHANGES[name] in report_verdict(report)
    assert "better" not in report_verdict(report)
    blank = make_task_report(name, labelled=False)
    said = report_verdict(Report.model_validate(blank))
    assert "1172 images" in said
    assert "without labels" in said or name in ("embedding", "dense")
    assert "at random" not in said
    first = task_named(name).fidelity[0].key
    blank["random"][first], blank["delta"][first] = blank["delta"][first], blank["random"][first]
    assert "tokens at random, untrained, come closer" in report_verdict(Report.model_validate(blank))


def test_less_error_is_a_gain_and_random_tokens_with_less_are_better():
    report = make_task_report("regression")
    report["delta"] |= {"mae_change": -2.5, "mae_change_ci95": [-4.0, -1.0], "mae_change_over_random": 3.0}
    said = report_verdict(Report.model_validate(report))
    assert "-2.5000 on 1172 images (95 %: -4.0000 to -1.0000), a gain" in said
    assert "as many tokens at random, untrained, are 3.0000 of mean absolute error better" in said


def test_a_chart_of_values_is_not_cut_at_100(finished):
    page = Page(render_page(read_run(finished("regression"))))
    (chart,) = [each for each in page.all("svg") if "against images/s" in each.get("aria-label", "")]
    assert "Mean absolute error against images/s at batch 32. dense 151.5000" in chart["aria-label"]
    heights = [float(each["y"]) for each in page.all("use") if "fill" in each.get("style", "") and "y" in each]
    assert heights
    assert all(0 <= height <= 230 for height in heights), "within the drawing"


@EACH
@pytest.mark.parametrize("labelled", [True, False])
def test_the_card_is_of_the_task(finished, name, labelled):
    folder, task = finished(name, labelled), task_named(name)
    card = ModelCard(render_card(read_run(folder), read_metadata(folder / "model.safetensors")))
    assert card.data.pipeline_tag == task.pipeline
    assert task.noun in card.text
    assert USAGE[name] in card.text
    assert "softmax" not in card.text
    assert not [word for word in OF_CLASSIFIERS if word in _words(card.text, name)]
    assert "cat, dog" not in card.text
    results = {each.metric_name: each.metric_value for each in card.data.eval_results}
    report = json.loads((folder / "report.json").read_text())
    expected = {task.fidelity[0].text: report["delta"][task.fidelity[0].key]}
    if labelled:
        expected |= {figure.text: report["sparse"][figure.key] for figure in task.accuracy}
    assert results == expected
    assert card.data.metrics is None


@EACH
def test_the_summary_is_of_the_task(name, tmp_path, capsys):
    task, report = task_named(name), Report.model_validate(make_task_report(name))
    print_summary(report, tmp_path)
    out = capsys.readouterr().out
    assert not [word for word in OF_CLASSIFIERS if word in _words(out.replace("same prediction as dense", ""), name)]
    (line,) = [line for line in out.splitlines() if "random baseline" in line]
    ours, by_chance = line.split("; random baseline: ")
    for figure in task.fidelity:
        assert f"{getattr(report.delta, figure.key):.{figure.digits}f}" in ours
    for figure in (task.fidelity[0], *task.accuracy[:1]):
        assert f"{getattr(report.random, figure.key):.{figure.digits}f}" in by_chance


@EACH
def test_info_says_what_the_file_is_for_and_what_was_measured(finished, name, capsys):
    folder, task = finished(name), task_named(name)
    metadata = read_metadata(folder / "model.safetensors")
    assert metadata.accuracy["fidelity"].keys() == {figure.key for figure in task.fidelity}
    assert run(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"blocks, {name}" in out
    for figure in (task.fidelity[0], *task.accuracy[:1]):
        assert f"measured {figure.text}: " in out
    assert "classes" not in out


def test_the_header_says_fidelity_of_classifiers_too():
    assert accuracy_of(Report.model_validate(make_task_report("classification")))["fidelity"]["agreement_pct"] > 90


# Images


def test_neighbours_are_embedded_once_and_framed_where_one_model_alone_finds_them(finished):
    text = render_page(read_run(finished("embedding")))
    page = Page(text)
    assert not page.all("img")
    assert text.count('<image id="near-') == 3
    near = [each for each in page.all("svg") if each.get("class", "").startswith("near")]
    assert [each["class"] for each in near] == ["near alone", "near", "near", "near alone"] * 2
    assert all("Nearest by " in each["aria-label"] for each in near)
    hidden = render_page(read_run(finished("embedding")), images=False)
    assert "near-" not in hidden
    assert "image/jpeg" not in hidden


def test_patches_are_covered_the_more_the_farther_their_features_are(finished):
    page = Page(render_page(read_run(finished("dense"))))
    far = [each for each in page.all("path") if each.get("class") == "far"][:3]
    found = {
        3 * int(y) + int(x): float(each["fill-opacity"])
        for each in far
        for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", each["d"])
    }
    assert found.keys() == {1, 2, 3, 5}, "the others are the same"
    assert found[1] == found[5] == 0.85 > found[2] > found[3] > 0
    assert "features: cosine 0.50 to 1.00" in page.text
    others = Page(render_page(read_run(finished("embedding"))))
    assert not [each for each in others.all("path") if each.get("class") == "far"]


def test_all_images_that_leave_the_machine_are_counted(finished, capsys):
    assert run(["report", str(finished("embedding")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 2 + 3


def test_what_is_right_and_said_is_escaped(finished):
    page = Page(render_page(read_run(finished("multilabel"))))
    assert not page.all("i")
    assert "True labels: <i>a</i>; b" in page.text
    assert "True values: 0.5, 16" in Page(render_page(read_run(finished("regression")))).text


def test_a_neighbour_that_is_not_there_is_left_out_and_hostile_rows_are_refused():
    row = make_task_keep_maps("embedding")["images"][0]
    for wrong in (
        {"likeness": [float("nan")]},
        {"neighbours": {"<b>": [0]}},
        {"neighbours": {"dense": [0] * 21}},
        {"dense": "x" * 10_001},
    ):
        with pytest.raises(ValueError, match=r"likeness|neighbours|dense"):
            ImageRow.model_validate(row | wrong)
    maps = make_task_keep_maps("embedding")
    with pytest.raises(ValueError, match="thumbnails"):
        KeepMaps.model_validate(maps | {"thumbnails": ["A" * 50_001]})


def test_keep_maps_of_before_tasks_are_read():
    old = make_task_keep_maps("embedding")["images"][0]
    old["kl"] = old.pop("distance")
    assert ImageRow.model_validate(old).distance == 0.125


def _data(count, targets=None):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    images = ImageSet(list(range(count)), targets or [-1] * count, lambda i: Image.fromarray(pixels[i]))
    return Data("made up", images, images)


@EACH
def test_images_are_the_nearest_middle_and_farthest_of_all_seen(make_vit, name):
    sparse = attach(make_vit(num_classes=0 if name in ("embedding", "dense") else 3), 0.5, prune_at=[2]).eval()
    sparse.task = name
    count, task = 20, task_named(name)
    data = _data(count)
    data.val.transform = eval_transform(sparse.model)
    found = choose_images(sparse, sparse.model, data, {}, torch.device("cpu"))
    assert found.num_seen == count
    images = torch.stack([image for image, _ in data.val])
    with torch.inference_mode():
        outputs = task.run(sparse.model, images), task.run(sparse, images)
    unknown = torch.full((count,), -1)
    dense, ours = (task.results(task.record(each, outputs[0]), unknown) for each in outputs)
    order = ours.distances(dense).sort().values.tolist()
    shown = [row.distance for row in found.images]
    assert shown == pytest.approx(sorted(order[i] for i in (0, 1, 9, 10, 18, 19)), rel=1e-3, abs=1e-5)
    assert [row.place for row in found.images] == [*["nearest"] * 2, *["middle"] * 2, *["farthest"] * 2]
    said = {"multilabel": list, "regression": str}.get(name)
    for row in found.images:
        assert isinstance(row.dense, (list, str))
        if name == "regression":
            assert re.fullmatch(r"[-\d.e]+, [-\d.e]+, [-\d.e]+", row.sparse)
        elif said is None:
            assert row.dense == row.sparse == []
    for row in found.images:
        assert len(row.likeness) == (100 if name == "dense" else 0)
        assert name != "dense" or 1 - sum(row.likeness) / 100 == pytest.approx(row.distance, abs=2e-3)
    if name == "embedding":
        near = {row.distance: row.neighbours for row in found.images}
        assert all(len(rows) == 5 for each in near.values() for rows in each.values())
        assert len(found.thumbnails) == len({n for each in near.values() for rows in each.values() for n in rows})
        for jpeg in found.thumbnails:
            with Image.open(io.BytesIO(base64.b64decode(jpeg))) as image:
                assert max(image.size) == 72
        assert len(found.model_dump_json()) < 500_000
    else:
        assert found.thumbnails == []


def test_labels_and_values_of_an_image_are_named():
    names = {0: "cat", 1: "dog"}
    assert task_named("multilabel").right(torch.tensor([1.0, 0.0, 1.0]), names) == "cat; label 2"
    assert task_named("multilabel").right(torch.zeros(2), names) == "no label"
    assert task_named("regression").right(torch.tensor([0.123456, 7.0]), names) == "0.1235, 7"
    assert task_named("embedding").right(torch.tensor(1), names) == "dog"
    assert task_named("classification").right(torch.tensor(5), names) == "class 5"
    for name in TASKS:
        assert task_named(name).right(torch.tensor(-1), names) is None


# Sweeps


def _sweep_row(label, kind, value, change, rate, figure):
    delta = {"speedup": [{"batch_size": 32, "speedup": rate / 10, "slower": rate < 10}], figure.key: value}
    if change is not None:
        delta |= {change[0]: change[1], f"{change[0]}_ci95": change[2]}
    front = {"on_front": True, "dominated_by": []}
    speed = [{"batch_size": 32, "images_per_s": rate}]
    return {"label": label, "kind": kind, "speed": speed, "delta": delta, figure.key: value, "by_throughput": front}


def test_the_choice_of_a_sweep_is_by_chance_where_there_are_no_points():
    judged = judged_by({"task": "regression", "accuracy": "mae"})
    rows = [
        _sweep_row("dense", "dense", 150.0, ("mae_change", 0.0, [0.0, 0.0]), 10.0, judged.figure),
        _sweep_row("keep 0.7", "sparse", 150.5, ("mae_change", 0.5, [-0.5, 1.5]), 15.0, judged.figure),
        _sweep_row("keep 0.5", "sparse", 180.0, ("mae_change", 30.0, [25.0, 35.0]), 20.0, judged.figure),
    ]
    (first, *_) = verdict(rows, judged, 32)
    assert first.startswith("The fastest as good as dense within chance is keep 0.7: +0.5000 mean absolute error")
    assert judged.merit(rows[0]) > judged.merit(rows[2]), "less error is better"


@EACH
def test_without_labels_a_sweep_is_judged_by_likeness(name):
    task = task_named(name)
    judged = judged_by({"task": name, "accuracy": task.fidelity[0].key})
    row = _sweep_row("dense", "dense", 1.0, None, 10.0, judged.figure)
    (said,) = verdict([row], judged, 32)
    assert task.fidelity[0].text in said
    assert task.no_accuracy[1:] in said
    assert judged.change is None
