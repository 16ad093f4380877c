"""A run that is cut anywhere and resumed ends at the same bits as one that was not."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from vitprune import Recipe, attach
from vitprune.common.seeding import derive_seed, isolated_rng, seed_all
from vitprune.data import ModelClasses, open_data, train_transform
from vitprune.errors import OutputError, Preempted, UsageError
from vitprune.training import Checkpoints, Progress, State, train

SHORT = {
    "warm_start_steps": 3,
    "steps": 6,
    "deployed_share": 0.5,
    "batch_size": 4,
    "num_workers": 0,
    "lr": 1e-2,
}


class _Cut(Exception):
    """Stands for kill -9."""


class Recorder:
    """Keeps losses; cuts the run after a step."""

    def __init__(self, cut=None):
        self.cut = cut
        self.totals = {}

    def step(self, record):
        self.totals[record.step] = record.total
        if record.step == self.cut:
            raise _Cut


@pytest.fixture
def start(make_vit, image_folder, tmp_path):
    """`start(recipe, cut=None, checkpoints=None)`: student, recorder and progress of a run, resumed where it can be."""

    def start(recipe, cut=None, checkpoints=None):
        model = make_vit(num_classes=2)
        data = open_data(str(image_folder), ModelClasses(2), training=True)
        data.train.transform = train_transform(model, recipe.augmentation)
        seed_all(recipe.seed)
        student, recorder, progress = attach(copy.deepcopy(model)), Recorder(cut), Progress()
        train(
            student,
            attach(model, 1.0),
            data.train,
            recipe,
            device=torch.device("cpu"),
            precision="fp32",
            listener=recorder,
            progress=progress,
            checkpoints=checkpoints,
            resume=checkpoints and checkpoints.latest(),
        )
        return student, recorder, progress

    return start


@pytest.fixture
def checkpoints(tmp_path):
    (tmp_path / "run").mkdir()
    return Checkpoints(tmp_path / "run" / "checkpoints", {"lr": 1}, every=1)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(**SHORT),
        Recipe(**SHORT, ema_decay=0.9, drop_path=0.2, train_trunk=True),
        Recipe(
            **SHORT, augmentation={"mixup": 0.8, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5}
        ),
        Recipe(**SHORT, decision="gumbel", freeze_epochs=0.5, weights={"ce": 1.0}),
        Recipe(**SHORT | {"num_workers": 1}),
    ],
    ids=["short", "averaged", "augmented", "gumbel", "workers"],
)
def test_cut_after_every_third_step(start, checkpoints, recipe):
    expected, undisturbed, counted = start(recipe)
    totals = {}
    for cut in (1, 3, 5, 8):  # the step after which it is cut is lost: its checkpoint comes after it is told
        with pytest.raises(_Cut):
            start(recipe, cut, checkpoints)
    student, recorder, progress = start(recipe, None, checkpoints)
    totals |= recorder.totals
    assert same(student, expected)
    assert totals.items() <= undisturbed.totals.items()
    assert min(totals) == 8, "it went on, not anew"
    for name in ("steps_done", "num_images", "phases", "backbone_lr", "num_steps"):
        assert getattr(progress, name) == getattr(counted, name), name


def test_a_complete_run_is_not_trained_again(start, checkpoints):
    expected, *_ = start(Recipe(**SHORT), None, checkpoints)
    again, recorder, progress = start(Recipe(**SHORT), None, checkpoints)
    assert same(again, expected)
    assert recorder.totals == {}
    assert progress.steps_done == 9


def test_unreadable_images_are_counted_on(start, checkpoints, image_folder):
    (image_folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    recipe = Recipe(**SHORT)
    expected, _, counted = start(recipe)
    with pytest.raises(_Cut):
        start(recipe, 6, checkpoints)
    student, _, progress = start(recipe, None, checkpoints)
    assert same(student, expected)
    assert (progress.num_unreadable, progress.unreadable) == (counted.num_unreadable, counted.unreadable)
    assert progress.num_unreadable > 0


def test_told_to_stop_it_ends_the_step_saves_and_says_so(start, checkpoints):
    checkpoints.every, checkpoints.stop = None, True
    with pytest.raises(Preempted, match="told to stop") as caught:
        start(Recipe(**SHORT), None, checkpoints)
    assert "--resume" in caught.value.hint
    assert caught.value.exit_code == 143
    checkpoints.stop = False
    assert checkpoints.latest().about["progress"]["steps_done"] == 1


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
    assert checkpoints.latest().part("student.")["w"].tolist() == [2, 2]
    checkpoints.clear()
    assert not checkpoints.folder.exists()
    assert checkpoints.latest() is None


def test_other_settings_are_refused_by_name(checkpoints):
    checkpoints.save(State({}, {"step": 1}), 1)
    checkpoints.settings = {"lr": 2}
    with pytest.raises(UsageError, match="lr is 1 there, 2 now"):
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


def test_about_every_two_minutes_unless_told(checkpoints, monkeypatch):
    checkpoints.every = 5
    assert [checkpoints.due(step) for step in (4, 5, 6, 10)] == [False, True, False, True]
    checkpoints.every = None
    assert not checkpoints.due(5)
    now = checkpoints._saved_at
    monkeypatch.setattr("time.monotonic", lambda: now + 121)
    assert checkpoints.due(6)


def test_seeds_are_unlike_and_a_block_leaves_no_trace():
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with isolated_rng(3, 4):
        first = torch.rand(2)
    with isolated_rng(3, 4):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.rand(2), expected)


def test_state_is_json(checkpoints):
    checkpoints.save(State({}, {"step": 1, "progress": {"unreadable": ["ä"]}}), 1)
    assert json.dumps(checkpoints.latest().about)
