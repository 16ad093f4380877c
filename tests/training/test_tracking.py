"""Steps go to TensorBoard too, by accelerate."""

import json

import pytest

from vitprune.cli.app import run
from vitprune.errors import UsageError
from vitprune.training import check_tracker, tracking


@pytest.fixture
def arguments(weights_file, image_folder, quick_bench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return [
        *("sparsify", "test_vit", "--checkpoint", str(weights_file), "--data", str(image_folder), "-o", "run"),
        *("--device", "cpu", "--precision", "fp32", "-b", "4", "-j", "0", "--warm-start-steps", "2", "--steps", "4"),
    ]


def scalars(folder):
    """Values by name and step, of all event files in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_shows_what_the_log_says(arguments, tmp_path):
    assert run([*arguments, "--track", "tensorboard"]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    shown = scalars(tmp_path / "run" / "tensorboard")
    assert shown["loss/total"] == pytest.approx({line["step"]: line["total"] for line in log})
    assert shown["loss/rank"].keys() == {1, 2}
    assert shown["loss/kl"].keys() == {3, 4, 5, 6}
    assert shown["kept/stage 3"][6] == pytest.approx(log[5]["kept_ratios"][2])
    assert shown["lr"] == pytest.approx({line["step"]: line["lr"] for line in log})


def test_it_is_off_unless_asked_for(arguments, tmp_path):
    assert run(arguments) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_an_unknown_tracker_is_refused_before_anything_is_written(arguments, tmp_path, capsys):
    assert run([*arguments, "--track", "tensorbored"]) == 2
    err = capsys.readouterr().err
    assert "--track is 'tensorbored'" in err
    assert "tensorboard" in err.split("hint:")[1]
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(UsageError, match="not installed") as caught:
        check_tracker("tensorboard")
    assert "vitprune[track]" in caught.value.hint
