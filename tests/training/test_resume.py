"""A run that is cut anywhere and resumed ends at the same bits as one that was not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vitprune.errors import OutputError, UsageError
from vitprune.training.checkpoints import Checkpoints, State
from vitprune.training.progress import Progress

RECIPES = {
    "averaged": {"ema_decay": 0.9, "drop_path": 0.2, "rate_reference_kl": 0.05},
    "augmented": {
        "augmentation": {"mixup": 0.8, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5},
        "grad_accum": 2,
        "num_workers": 1,
    },
    "a range of keep ratios": {"keep": (0.5, 0.9), "rate_reference_kl": 0.05},
    "gumbel": {"freeze_epochs": 0.5, "weights": {"ce": 1.0}, "train_trunk": False},
}


@pytest.fixture
def checkpoints(tmp_path):
    (tmp_path / "run").mkdir()
    return Checkpoints(tmp_path / "run" / "checkpoints", {"lr": 1}, every=1)


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_a_run_that_was_cut_ends_at_the_same_bits(run_training, checkpoints, same_weights, image_folder, settings):
    """Cut in pretraining, right after it, and in both phases that follow; one image cannot be read."""
    (image_folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    settings = settings | {"lr": 1e-2}
    whole = run_training(**settings)
    records, resume = [], None
    for cut in (1, 3, 5, 9, None):
        part = run_training(whole.model, **settings, resume=resume, stop_after=cut)
        records += part.records
        if cut is not None:
            checkpoints.save(part.state, cut)
            assert checkpoints.latest_step() == cut
            resume = checkpoints.latest()
    assert same_weights(part.student, whole.student)
    assert [(record.step, record.total) for record in records] == [(each.step, each.total) for each in whole.records]
    counted = (
        "steps_done",
        "num_images",
        "phases",
        "backbone_lr",
        "num_steps",
        "num_unreadable",
        "unreadable",
        "shown",
    )
    for name in counted:
        assert getattr(part.progress, name) == getattr(whole.progress, name), name
    assert part.progress.num_unreadable > 0


def test_a_complete_run_is_not_trained_again(run_training, same_weights):
    complete = run_training(stop_after=11)
    again = run_training(complete.model, resume=complete.state)
    assert same_weights(again.student, complete.student)
    assert again.records == []
    assert again.progress.steps_done == 11


def test_progress_of_other_versions_is_read():
    assert Progress.restored({"steps_done": 3, "num_restored": 1, "rate_scale": 0.1}) == Progress(steps_done=3)


def test_the_last_ones_are_kept_and_a_broken_one_is_passed_over(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(State({"student.w": torch.full((2,), float(step))}, {"step": step}), step)
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["step-000000002.safetensors", "step-000000003.safetensors"]
    newest = checkpoints.folder / names[-1]
    newest.write_bytes(newest.read_bytes()[:-4])
    (checkpoints.folder / ".step-000000004.safetensors.x.tmp").write_bytes(b"half")
    save_file({"w": torch.zeros(1)}, checkpoints.folder / "step-000000009.safetensors")
    assert checkpoints.latest().about["step"] == 2
    assert checkpoints.latest().under("student.")["w"].tolist() == [2, 2]
    (checkpoints.folder / "best.ckpt").write_bytes(b"of the user")
    checkpoints.clear()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["best.ckpt"]
    (checkpoints.folder / "best.ckpt").unlink()
    checkpoints.clear()
    assert not checkpoints.folder.exists()
    assert checkpoints.latest() is None
    assert checkpoints.latest_step() is None


def test_other_settings_are_refused_by_name(checkpoints):
    checkpoints.save(State({}, {"step": 1}), 1)
    checkpoints.settings = {"lr": 2}
    with pytest.raises(UsageError, match="lr is 1 there, 2 now"):
        checkpoints.latest()
    checkpoints.settings = {"lr": 1, "weights": "abc"}
    with pytest.raises(UsageError, match="weights is not known there"):
        checkpoints.latest()


def test_a_folder_that_cannot_be_written_loses_nothing(checkpoints, monkeypatch):
    checkpoints.save(State({"student.w": torch.ones(1)}, {"step": 1}), 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitprune.training.checkpoints.save_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        checkpoints.save(State({"student.w": torch.zeros(1)}, {"step": 2}), 2)
    assert checkpoints.latest().about["step"] == 1
    assert len(list(checkpoints.folder.iterdir())) == 1


def test_about_every_two_minutes_by_default(checkpoints, monkeypatch):
    checkpoints.every = 5
    assert [checkpoints.due(step) for step in (4, 5, 6, 10)] == [False, True, False, True]
    checkpoints.every = None
    assert not checkpoints.due(5)
    now = checkpoints._saved_at
    monkeypatch.setattr("time.monotonic", lambda: now + 121)
    assert checkpoints.due(6)


def test_state_is_json(checkpoints):
    checkpoints.save(State({}, {"step": 1, "progress": {"unreadable": ["ä"]}}), 1)
    assert json.dumps(checkpoints.latest().about)
