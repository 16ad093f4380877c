"""The loop: phases, rates, non-finite steps, and the same bits for the same seed."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3

from vitprune import Recipe, attach
from vitprune.data import ModelClasses, open_data, train_transform
from vitprune.errors import TrainingError
from vitprune.training import Progress, loop, train
from vitprune.training.objective import Objective

SHORT = {
    "warm_start_steps": 3,
    "steps": 8,
    "deployed_share": 0.5,
    "batch_size": 4,
    "num_workers": 0,
    "train_trunk": True,
    "rate_reference_kl": None,
}


class Recorder:
    def __init__(self):
        self.records = []

    def step(self, record):
        self.records.append(record)


@pytest.fixture
def run_training(make_vit, image_folder):
    def run_training(recipe, model=None, precision="fp32"):
        model = model or make_vit(num_classes=2)
        data = open_data(str(image_folder), ModelClasses(2), training=True)
        data.train.transform = train_transform(model, recipe.augmentation)
        torch.manual_seed(recipe.seed)
        student, recorder, progress = attach(copy.deepcopy(model)), Recorder(), Progress()
        train(
            student,
            attach(model, 1.0),
            data.train,
            recipe,
            device=torch.device("cpu"),
            precision=precision,
            listener=recorder,
            progress=progress,
        )
        return student, recorder.records, progress

    return run_training


def test_phases_run_in_order_and_are_counted(run_training):
    student, records, progress = run_training(Recipe(**SHORT))
    assert [record.phase for record in records] == ["warm"] * 3 + ["sampled"] * 4 + ["deployed"] * 4
    assert [record.step for record in records] == list(range(1, 12))
    assert progress.steps_done == progress.num_steps == 11
    assert progress.phases == {"warm": 3, "sampled": 4, "deployed": 4}
    assert progress.num_images == 44
    assert set(progress.seconds_by_part) == {"data", "teacher", "student", "backward", "update"}
    assert all(seconds > 0 for seconds in progress.seconds_by_part.values())
    assert 0.5 * progress.seconds < sum(progress.seconds_by_part.values()) <= progress.seconds
    assert not student.training
    assert records[-1].kept_ratios == pytest.approx((0.70, 0.49, 0.34))
    assert records[0].target_ratios == pytest.approx((0.7, 0.49, 0.343))


def test_each_phase_trains_what_it_should(run_training, make_vit):
    model = make_vit(num_classes=2)
    warm, *_ = run_training(Recipe(**SHORT | {"steps": 0}), model)
    assert all(torch.equal(a, b) for a, b in zip(warm.model.parameters(), model.parameters(), strict=True))
    full, *_ = run_training(Recipe(**SHORT | {"deployed_share": 1.0}), model)
    for trained, start in zip(full.predictors.parameters(), warm.predictors.parameters(), strict=True):
        assert torch.equal(trained, start), "the deployed phase leaves predictors alone"
    assert not torch.equal(full.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_frozen_backbone_stays_frozen(run_training, make_vit):
    model = make_vit(num_classes=2)
    recipe = Recipe(**SHORT | {"deployed_share": 0.0, "freeze_epochs": 2.0, "steps": 6})
    student, records, _ = run_training(recipe, model)
    assert [record.phase for record in records] == ["warm"] * 3 + ["sampled"] * 6
    assert all(torch.equal(a, b) for a, b in zip(student.model.parameters(), model.parameters(), strict=True))
    run_training(recipe, model)


def test_zero_backbone_rate_runs_no_deployed_steps(run_training):
    _, records, _ = run_training(Recipe(**SHORT | {"backbone_lr_scale": 0.0}))
    assert {record.phase for record in records} == {"warm", "sampled"}


def test_epochs_count_passes_over_the_images(run_training):
    _, records, _ = run_training(Recipe(**SHORT | {"steps": None, "epochs": 2.0}))
    assert sum(record.phase != "warm" for record in records) == 2 * 3, "12 images in batches of 4"


def test_batch_larger_than_the_data_still_trains(run_training):
    _, records, progress = run_training(Recipe(**SHORT | {"batch_size": 64, "steps": 2}))
    assert progress.num_images == 12 * len(records)


@pytest.mark.parametrize("settings", [{}, {"num_workers": 1}, {"ema_decay": 0.9, "augmentation": {"mixup": 0.5}}])
def test_same_seed_same_bits(run_training, settings):
    recipe = SHORT | settings
    one, first, _ = run_training(Recipe(**recipe, seed=3))
    other, second, _ = run_training(Recipe(**recipe, seed=3))
    assert [record.total for record in first] == [record.total for record in second]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    _, third, _ = run_training(Recipe(**SHORT, seed=4))
    assert [record.total for record in first] != [record.total for record in third]


def test_warm_start_learns_the_ranking(run_training):
    _, records, _ = run_training(Recipe(**SHORT | {"warm_start_steps": 60, "steps": 0, "lr": 3e-3}))
    losses = [record.losses["rank"] for record in records]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_bf16_trains_finite_weights(run_training):
    student, records, _ = run_training(Recipe(**SHORT), precision="bf16")
    assert not any(record.skipped for record in records)
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in student.parameters())


def test_a_frozen_trunk_stays_and_the_rest_moves(run_training, make_vit):
    model = make_vit(num_classes=2)
    student, *_ = run_training(Recipe(**SHORT | {"train_trunk": False}), model)
    first = student.schedule.blocks[0]
    for index, (after, before) in enumerate(zip(student.model.blocks, model.blocks, strict=True)):
        assert torch.equal(after.mlp.fc1.weight, before.mlp.fc1.weight) == (index < first)
    assert torch.equal(student.model.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert torch.equal(student.model.pos_embed, model.pos_embed)
    assert not torch.equal(student.model.head.weight, model.head.weight)


def test_noise_fades_to_its_end(run_training, monkeypatch):
    noises = []
    real = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda *args: noises.append((args[3], args[4])) or real(*args))
    run_training(Recipe(**SHORT | {"noise_end": 0.25}))
    sampled = [noise for phase, noise in noises if phase == "sampled"]
    assert sampled == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_the_average_of_the_weights_is_kept_not_the_last(run_training, make_vit, monkeypatch):
    model, seen = make_vit(num_classes=2), []
    real = ModelEmaV3.update

    def update(self, student, step=None):
        seen.append(student.model.head.weight.detach().clone())
        real(self, student, step=step)

    monkeypatch.setattr(ModelEmaV3, "update", update)
    averaged, *_ = run_training(Recipe(**SHORT, ema_decay=0.9), model)
    expected = seen[1]  # timm copies the weights in the first two steps
    for weight in seen[2:]:
        expected = 0.9 * expected + 0.1 * weight
    assert len(seen) == 8, "every step after the warm start"
    torch.testing.assert_close(averaged.model.head.weight.detach(), expected)
    assert not torch.equal(averaged.model.head.weight, seen[-1])


def test_mixed_images_train_with_and_without_labels(run_training):
    mixing = {"augmentation": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}, "weights": {"ce": 1.0, "kl": 0.5}}
    _, records, _ = run_training(Recipe(**SHORT, **mixing))
    assert "ce" in records[-1].losses
    _, records, _ = run_training(Recipe(**SHORT, **mixing, labels=False))
    assert "ce" not in records[-1].losses
    assert not any(record.skipped for record in records)


def test_drop_path_acts_in_training_alone(run_training, make_vit):
    model = make_vit(num_classes=2)
    plain, *_ = run_training(Recipe(**SHORT), model)
    dropped, *_ = run_training(Recipe(**SHORT, drop_path=0.5), model)
    assert not torch.equal(plain.model.head.weight, dropped.model.head.weight)
    assert str(dropped.model) == str(plain.model), "nothing of it is left in the model"


def test_the_backbones_rate_follows_what_the_warm_start_leaves(run_training):
    """Up to fourfold and down to half."""

    def rate(reference):
        _, _, progress = run_training(Recipe(**SHORT | {"rate_reference_kl": reference, "warmup_share": 0.0}))
        return progress.backbone_lr

    fixed = rate(None)
    assert fixed == pytest.approx(1e-3 * 0.02)
    assert rate(1e-9) == pytest.approx(4 * fixed)
    assert rate(1e9) == pytest.approx(fixed / 2)
    reference = 1e-4
    for _ in range(60):  # this model's own loss is somewhere above
        factor = rate(reference) / fixed
        if 0.5 < factor < 4:
            break
        reference *= 1.5
    assert rate(reference * 1.2) == pytest.approx(fixed * factor / 1.2, rel=1e-5)


def test_rate_is_for_the_stated_batch_size(run_training):
    _, whole, _ = run_training(Recipe(**SHORT | {"warmup_share": 0.0}))
    _, scaled, _ = run_training(Recipe(**SHORT | {"warmup_share": 0.0}, lr_batch_size=16))
    assert scaled[0].lr == pytest.approx(whole[0].lr / 4)


def _poison(monkeypatch, bad_steps):
    real, calls = Objective.forward, iter(range(10_000))

    def forward(self, *args):
        loss = real(self, *args)
        return loss._replace(total=loss.total * float("nan")) if next(calls) in bad_steps else loss

    monkeypatch.setattr(Objective, "forward", forward)


def test_non_finite_steps_are_skipped_and_counted(run_training, monkeypatch):
    _poison(monkeypatch, {1, 5})
    student, records, progress = run_training(Recipe(**SHORT))
    assert [record.skipped for record in records].count(True) == progress.num_skipped == 2
    assert records[1].as_json()["total"] is None, "log.jsonl is JSON, which has no NaN"
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_too_many_non_finite_steps_put_an_earlier_state_back_at_a_lower_rate(run_training, make_vit, monkeypatch):
    """Once: the weights of the last part's beginning, and a tenth of the rate from then on."""
    model = make_vit(num_classes=2)
    recipe = Recipe(**SHORT | {"warmup_share": 0.0}, max_skipped=3)
    _, plain, _ = run_training(recipe, model)
    warm, *_ = run_training(Recipe(**SHORT | {"steps": 0, "warmup_share": 0.0}), model)
    seen, real = [], loop.Optimization.restore
    monkeypatch.setattr(loop.Optimization, "restore", lambda tools, state: seen.append(state) or real(tools, state))
    _poison(monkeypatch, {5, 6, 7})
    student, records, progress = run_training(recipe, model)
    assert [record.step for record in records] == list(range(1, 12)), "it goes on, not back"
    assert [record.step for record in records if record.restored] == [8]
    assert (progress.num_restored, progress.num_skipped, progress.rate_scale) == (1, 3, pytest.approx(0.1))
    assert [record.lr for record in records[8:]] == pytest.approx([0.1 * record.lr for record in plain[8:]])
    assert [record.lr for record in records[:8]] == [record.lr for record in plain[:8]]
    assert len(seen) == 1
    for name, tensor in seen[0].part("student.").items():
        assert torch.equal(tensor, warm.state_dict()[name]), name
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_many_non_finite_steps_a_second_time_stop_the_run_with_the_reason(run_training, monkeypatch):
    _poison(monkeypatch, range(2, 100))
    with pytest.raises(TrainingError, match=r"not finite for 4 steps in a row .* a second time") as caught:
        run_training(Recipe(**SHORT, max_skipped=4))
    assert "--set lr=" in caught.value.hint


@pytest.mark.parametrize(
    "settings",
    [{}, {"decision": "gumbel", "weights": {"ce": 1.0, "token": 0.0}}, {"augmentation": {"mixup": 0.8}}],
    ids=["short", "gumbel", "mixed"],
)
@pytest.mark.parametrize("num_parts", [2, 3])
def test_a_batch_in_parts_trains_as_the_whole(run_training, make_vit, settings, num_parts):
    model = make_vit(num_classes=2)
    whole, expected, _ = run_training(Recipe(**SHORT | settings), model)
    parted, records, progress = run_training(Recipe(**SHORT | settings, grad_accum=num_parts), model)
    assert progress.num_parts == num_parts
    for one, other in zip(records, expected, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-5)
        assert one.kept_ratios == pytest.approx(other.kept_ratios)
    for one, other in zip(parted.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def _no_memory_for(monkeypatch, more_than):
    real = Objective.forward

    def forward(self, images, *args):
        if len(images) > more_than:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, images, *args)

    monkeypatch.setattr(Objective, "forward", forward)


@pytest.mark.parametrize(("fits", "expected"), [(4, 1), (2, 2), (1, 4)])
def test_as_few_parts_as_fit_are_found(run_training, monkeypatch, fits, expected):
    """The loss that the backbone's rate follows is measured in one pass; here the rate is fixed."""
    _no_memory_for(monkeypatch, fits)
    _, records, progress = run_training(Recipe(**SHORT, grad_accum="auto"))
    assert progress.num_parts == expected
    assert progress.num_images == 4 * len(records)


def test_looking_for_them_changes_nothing(run_training, make_vit):
    model = make_vit(num_classes=2)
    one, *_ = run_training(Recipe(**SHORT), model)
    other, *_ = run_training(Recipe(**SHORT, grad_accum="auto"), model)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_out_of_memory_says_what_to_lower(run_training, monkeypatch):
    _no_memory_for(monkeypatch, 2)
    with pytest.raises(
        TrainingError, match=r"out of memory while training on 4 images a step in 1 part\(s\)"
    ) as caught:
        run_training(Recipe(**SHORT))
    assert "--grad-accum 2" in caught.value.hint
    assert "--batch-size auto" in caught.value.hint
    _no_memory_for(monkeypatch, 0)
    with pytest.raises(TrainingError, match="out of memory with a single image"):
        run_training(Recipe(**SHORT, grad_accum="auto"))


def test_other_errors_are_not_taken_for_it(run_training, monkeypatch):
    monkeypatch.setattr(Objective, "forward", lambda *args: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_training(Recipe(**SHORT, grad_accum="auto"))
