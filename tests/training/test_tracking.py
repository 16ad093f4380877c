"""Steps in log.jsonl and, by accelerate, in TensorBoard."""

import json

import pytest

from vitprune import Recipe
from vitprune.cli.app import run
from vitprune.errors import OutputError, UsageError
from vitprune.training.progress import StepRecord, check_tracker, step_log, tracker_log


def record(step, total=1.5):
    return StepRecord(
        step=step,
        num_steps=4,
        phase="sampled",
        losses={"kl": 0.5 * step},
        total=total,
        kept_ratios=(0.7, 0.5),
        target_ratios=(0.7, 0.49),
        lr=1e-3 / step,
        images_per_s=20.0,
    )


def scalars(folder):
    """Values by name and step, of all event files in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once_also_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboard")
    with tracker_log("tensorboard", tmp_path, Recipe()) as log:
        for step in (1, 2, 3):
            log(record(step, total=9.0))
    with tracker_log("tensorboard", tmp_path, Recipe(), after=2) as log:  # step 3 came after the last checkpoint
        for step in (3, 4):
            log(record(step))
    shown = scalars(tmp_path / "tensorboard")
    assert shown["loss/total"] == {1: 9.0, 2: 9.0, 3: 1.5, 4: 1.5}
    assert shown["loss/kl"] == {step: 0.5 * step for step in (1, 2, 3, 4)}
    assert shown["kept/stage 2"][4] == 0.5
    assert shown["lr"] == pytest.approx({step: 1e-3 / step for step in (1, 2, 3, 4)})
    assert shown["skipped"][1] == 0


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["sparsify", "demo", "--report-to", "tensorbored"]) == 2
    err = capsys.readouterr().err
    assert "--report-to is 'tensorbored'" in err
    assert "tensorboard" in err.split("hint:")[1]
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_or_does_not_start_says_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "tensorboard").write_text("no folder")
    with (
        pytest.raises(UsageError, match="report_to tensorboard does not start"),
        tracker_log("tensorboard", tmp_path, Recipe()),
    ):
        pass
    monkeypatch.setattr("vitprune.training.progress.get_available_trackers", list)
    with pytest.raises(UsageError, match="not installed") as caught:
        check_tracker("tensorboard")
    assert "pip install tensorboard" in caught.value.hint


def test_a_line_is_on_disk_as_soon_as_its_step_is_done(tmp_path):
    path = tmp_path / "log.jsonl"
    with step_log(path) as write:
        for step in (1, 2, 3):
            write(record(step))
            assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, step + 1))
    with path.open("a") as file:
        file.write('{"step": 4, "half a li')
    with step_log(path, after=2) as write:
        write(record(3, total=float("inf")))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (lines[0]["total"], lines[2]["total"]) == (1.5, None), "JSON has no infinity"
    with step_log(path):
        pass
    assert path.read_text() == "", "a new run begins a new log"
    with pytest.raises(OutputError, match="cannot write"), step_log(tmp_path / "missing" / "log.jsonl"):
        pass
