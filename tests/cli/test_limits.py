"""Limits: what goes with which task, what can be held against something, and what is missed."""

import shutil

import pytest
import torch
import typer
from finished_run import make_report, make_task_report

from vitprune.cli.app import run
from vitprune.cli.limits import check_goes_with, check_measured, drop_check, fidelity_check
from vitprune.cli.output import Check, enforce
from vitprune.data import Data, ImageSet
from vitprune.errors import UsageError
from vitprune.report import Report
from vitprune.tasks import TASKS, ClassVectors, task_named, zero_shot_task

EACH = pytest.mark.parametrize("name", TASKS)


def _images(labelled):
    return ImageSet(["a.png"], [0 if labelled else -1], open)


def _data(val, train=None):
    return Data("made up", None if train is None else _images(train), _images(val))


@EACH
def test_limits_that_are_of_another_task_are_refused_with_what_goes_instead(name):
    task = task_named(name)
    for limit, is_refused in (("min_top1", name != "classification"), ("max_drop", name == "dense")):
        if not is_refused:
            check_goes_with(task, **{limit: 1.0})
            continue
        with pytest.raises(UsageError) as caught:
            check_goes_with(task, **{limit: 1.0})
        assert task.fidelity[0].text in caught.value.hint


@EACH
def test_a_share_for_a_percentage_and_a_percentage_for_a_cosine_are_refused(name):
    task = task_named(name)
    right, wrong = (98.0, 0.98) if task.fidelity[0].in_percent else (0.98, 98.0)
    check_goes_with(task, min_fidelity=right)
    with pytest.raises(UsageError, match=f"min_fidelity is {wrong:g}"):
        check_goes_with(task, min_fidelity=wrong)


@EACH
def test_limits_of_accuracy_need_labels(name):
    task = task_named(name)
    for data in (_data(False), _data(False, True)):
        with pytest.raises(UsageError, match="max_drop cannot be checked: ") as caught:
            check_measured(task, data, max_drop=1.0, min_top1=None)
        assert task.no_accuracy in caught.value.message
        check_measured(task, data, max_drop=None, min_top1=None)
    if name == "embedding":
        for train in (None, False):
            with pytest.raises(UsageError, match="k-NN needs classes"):
                check_measured(task, _data(True, train), max_drop=1.0)
        vectors = ClassVectors(("a",), torch.ones(1, 2))
        for of_text in (zero_shot_task(), task_named("embedding", vectors)):
            check_measured(of_text, _data(True), max_drop=1.0)
    if name != "dense":
        check_measured(task, _data(True, True), max_drop=1.0)


def _missed(check, capsys):
    """What is said of a limit that is missed."""
    with pytest.raises(typer.Exit) as exit_:
        enforce([check])
    assert exit_.value.exit_code == 3
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("name", "met", "missed", "said"),
    [
        ("classification", 0.6, 0.5, "(as change of top-1): missed, measured -0.595, at least -0.5 was asked for"),
        ("multilabel", 0.75, 0.7, "(as change of mAP): missed, measured -0.750, at least -0.7 was asked for"),
        (
            "regression",
            2.5,
            2.25,
            "(as change of mean absolute error): missed, measured 2.50000, at most 2.25 was asked for",
        ),
        ("embedding", 0.25, 0.0, "(as change of k-NN top-1): missed, measured -0.250, at least -0 was asked for"),
    ],
)
def test_max_drop_is_a_loss_of_what_the_task_measures(name, met, missed, said, capsys):
    task, report = task_named(name), Report.model_validate(make_task_report(name))
    enforce([drop_check(task, report, met), drop_check(task, report, None)])
    assert _missed(drop_check(task, report, missed), capsys) == f"--max-drop {said}"
    report = make_task_report(name, labelled=False) if name != "classification" else _unlabelled()
    report = Report.model_validate(report)
    said = f"--max-drop: cannot be checked, {task.no_accuracy}"
    assert _missed(drop_check(task, report, 100.0), capsys) == said, "no silent pass"


def _unlabelled():
    report = make_report()
    for side in ("dense", "sparse", "random"):
        report[side] |= {"top1_pct": None, "top5_pct": None}
    report["delta"] |= {key: None for key in report["delta"] if "top1" in key}
    return report


@EACH
def test_min_fidelity_is_the_tasks_first_figure(name, capsys):
    task = task_named(name)
    key, delta = task.fidelity[0].key, make_task_report(name)["delta"]
    enforce([fidelity_check(task, delta, delta[key])])
    assert "missed, measured " in _missed(fidelity_check(task, delta, delta[key] + 0.001), capsys)
    for nothing in (None, {}, {key: None}):
        assert "cannot be checked" in _missed(fidelity_check(task, nothing, 0.5), capsys)
    assert _missed(Check("--min-fidelity", float("nan"), 0.5), capsys), "what is no number is no success"


def test_sparsify_refuses_what_it_could_not_check_before_it_trains(finished, arguments, tmp_path, capsys):
    flat = tmp_path / "flat"
    shutil.copytree(finished.root / "images" / "val" / "cat", flat)
    arguments = [str(flat) if argument.endswith("/images") else argument for argument in arguments]
    for limit, said in (
        (["--max-drop", "1"], "--max-drop cannot be checked: the images have no labels"),
        (["--min-top1", "50"], "--min-top1 cannot be checked: the images have no labels"),
        (["--min-fidelity", "0.9"], "same prediction as dense (%)"),
    ):
        assert run([*arguments, "--no-labels", *limit]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert "hint:" in err
    assert not (tmp_path / "runs").exists()


def test_eval_holds_fidelity_against_the_dense_model_alone(finished, capsys):
    images, weights = str(finished.root / "images"), str(finished.root / "weights.safetensors")
    common = ["eval", str(finished.folder), images, "-j", "0", "--device", "cpu"]
    assert run([*common, "--min-fidelity", "50"]) == 2
    assert "--checkpoint FILE" in capsys.readouterr().err
    assert run([*common, "--checkpoint", weights, "--min-fidelity", "1.5"]) == 0
    assert run([*common, "--checkpoint", weights, "--min-fidelity", "100.5"]) == 3
    assert "--min-fidelity (same prediction as dense (%)): missed" in capsys.readouterr().err
    assert run([*common[:2], f"{images}/val/cat", *common[3:], "--checkpoint", weights, "--min-top1", "50"]) == 2
    assert "--min-top1 cannot be checked" in capsys.readouterr().err
