"""The loop: phases, rates, non-finite steps, memory, and the same bits for the same seed."""

import pytest
import torch
from agreement import assert_trained_alike
from timm.utils import ModelEmaV3

from vitprune import Recipe
from vitprune.errors import TrainingError
from vitprune.training.objective import Objective


def test_phases_run_in_order_and_are_counted(run_training, monkeypatch):
    noises, real = [], Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda *args: noises.append(args[4]) or real(*args))
    trained = run_training(noise_end=0.25)
    records, progress = trained.records, trained.progress
    assert [record.phase for record in records] == ["pretraining"] * 3 + ["sampled"] * 4 + ["deployed"] * 4
    assert [record.step for record in records] == list(range(1, 12))
    assert progress.steps_done == progress.num_steps == 11
    assert progress.phases == {"pretraining": 3, "sampled": 4, "deployed": 4}
    assert progress.num_images == 44
    assert sum(progress.shown) == 32, "in pretraining the teacher is not asked"
    assert set(progress.seconds_split) == {"data", "compute"}
    assert all(seconds > 0 for seconds in progress.seconds_split.values())
    assert sum(progress.seconds_split.values()) == pytest.approx(progress.seconds)
    assert noises[3:7] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert not trained.student.training
    assert records[-1].kept_ratios == pytest.approx((11 / 16, 7 / 16, 5 / 16))
    assert records[0].target_ratios == pytest.approx((0.7, 0.49, 0.343))


def test_each_phase_trains_what_it_should(run_training, same_weights):
    warm = run_training(steps=0)
    assert same_weights(warm.student.model, warm.model)
    full = run_training(warm.model, deployed_share=1.0)
    assert same_weights(full.student.predictors, warm.student.predictors), "top-k passes no gradient to predictors"
    assert not torch.equal(full.student.model.blocks[0].mlp.fc1.weight, full.model.blocks[0].mlp.fc1.weight)


def test_frozen_backbone_stays_frozen(run_training, same_weights):
    trained = run_training(deployed_share=0.0, freeze_epochs=2.0, steps=6)
    assert [record.phase for record in trained.records] == ["pretraining"] * 3 + ["sampled"] * 6
    assert same_weights(trained.student.model, trained.model)


def test_a_frozen_trunk_is_kept_and_the_rest_moves(run_training):
    trained = run_training(train_trunk=False)
    student, model = trained.student, trained.model
    first = student.schedule.blocks[0]
    for index, (after, before) in enumerate(zip(student.model.blocks, model.blocks, strict=True)):
        assert torch.equal(after.mlp.fc1.weight, before.mlp.fc1.weight) == (index < first)
    assert torch.equal(student.model.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert torch.equal(student.model.pos_embed, model.pos_embed)
    assert not torch.equal(student.model.head.weight, model.head.weight)


def test_batch_larger_than_the_data_still_trains(run_training):
    trained = run_training(batch_size=64, steps=2)
    assert trained.progress.num_images == 12 * len(trained.records)


def test_same_seed_same_bits(run_training, same_weights):
    settings = {"num_workers": 1, "ema_decay": 0.9, "augmentation": {"mixup": 0.5}}
    one, other = (run_training(**settings, seed=3) for _ in range(2))
    assert [record.total for record in one.records] == [record.total for record in other.records]
    assert same_weights(one.student, other.student)
    third = run_training(**settings, seed=4)
    assert [record.total for record in one.records] != [record.total for record in third.records]


def test_pretraining_learns_the_ranking(run_training):
    records = run_training(pretraining_steps=60, steps=0, lr=3e-3).records
    losses = [record.losses["rank"] for record in records]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_bf16_trains_finite_weights(run_training):
    trained = run_training(precision="bf16")
    assert not any(record.skipped for record in trained.records)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trained.student.parameters())


def test_the_average_of_the_weights_is_kept_not_the_last(run_training, monkeypatch):
    seen, real = [], ModelEmaV3.update

    def update(self, student, step=None):
        seen.append(student.model.head.weight.detach().clone())
        real(self, student, step=step)

    monkeypatch.setattr(ModelEmaV3, "update", update)
    averaged = run_training(ema_decay=0.9).student
    expected = seen[1]  # timm copies the weights in the first two steps
    for weight in seen[2:]:
        expected = 0.9 * expected + 0.1 * weight
    assert len(seen) == 8, "every step after pretraining"
    torch.testing.assert_close(averaged.model.head.weight.detach(), expected)
    assert not torch.equal(averaged.model.head.weight, seen[-1])


@pytest.mark.parametrize("labels", [True, False])
def test_mixed_images_train_with_and_without_labels(run_training, image_folder, labels):
    """Also where an unreadable image makes their number odd: timm mixes pairs."""
    (image_folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    mixing = {"augmentation": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}, "weights": {"ce": 1.0, "kl": 0.5}}
    trained = run_training(**mixing, labels=labels)
    assert ("ce" in trained.records[-1].losses) == labels
    assert not any(record.skipped for record in trained.records)
    progress = trained.progress
    assert progress.num_unreadable > 0
    assert progress.num_images == 4 * progress.steps_done - progress.num_unreadable


def test_drop_path_acts_in_training_alone(run_training):
    plain = run_training()
    pruned = run_training(plain.model, drop_path=0.5).student
    assert not torch.equal(plain.student.model.head.weight, pruned.model.head.weight)
    assert str(pruned.model) == str(plain.student.model), "nothing of it is left in the model"


def test_rates_are_the_recipes(run_training, monkeypatch):
    """The backbone's follows the divergence that pretraining leaves, up to half as much again and down to .3."""
    real = Objective.forward

    def forward(self, *args):
        loss = real(self, *args)
        return loss if self.training else loss._replace(components={"kl": torch.tensor(0.1)})

    monkeypatch.setattr(Objective, "forward", forward)
    short = {"pretraining_steps": 1, "steps": 1, "deployed_share": 1.0, "warmup_share": 0.0}
    fixed = run_training(**short)
    assert [record.lr for record in fixed.records] == pytest.approx([1e-3, 1e-3 * 0.02])
    assert fixed.progress.backbone_lr == pytest.approx(1e-3 * 0.02)
    for reference, factor in ((0.1, 1), (0.08, 1.25), (0.001, 1.5), (10.0, 0.3)):
        followed = run_training(fixed.model, **short, rate_reference_kl=reference)
        assert followed.progress.backbone_lr == pytest.approx(factor * 1e-3 * 0.02)
        assert followed.records[-1].lr == followed.progress.backbone_lr
    scaled = run_training(fixed.model, **short, lr_batch_size=16)
    assert scaled.records[0].lr == pytest.approx(fixed.records[0].lr / 4)


def _poison(monkeypatch, bad_steps):
    real, calls = Objective.forward, iter(range(10_000))

    def forward(self, *args):
        loss = real(self, *args)
        return loss._replace(total=loss.total * float("nan")) if next(calls) in bad_steps else loss

    monkeypatch.setattr(Objective, "forward", forward)


def test_non_finite_steps_are_skipped_and_counted(run_training, monkeypatch):
    _poison(monkeypatch, {1, 5})
    trained = run_training(max_skipped=2)
    skipped = [record.step for record in trained.records if record.skipped]
    assert skipped == [2, 6]
    assert trained.progress.num_skipped == 2
    assert trained.records[1].as_json()["total"] is None, "log.jsonl is JSON, which has no NaN"
    assert all(parameter.isfinite().all() for parameter in trained.student.parameters())


def test_many_non_finite_steps_in_a_row_stop_the_run_with_the_reason(run_training, make_vit, monkeypatch):
    _poison(monkeypatch, {3, *range(5, 100)})
    model = make_vit(num_classes=2, img_size=64)
    with pytest.raises(
        TrainingError, match=r"not finite for 4 steps in a row \(phase 'deployed', loss nan\)"
    ) as caught:
        run_training(model, max_skipped=4)
    assert "--set lr=" in caught.value.hint


@pytest.fixture
def in_float64():
    """In fp32 products of another batch size round otherwise, and one token of a random model may change places."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SETTINGS = {
    "short": ({}, 2),
    "gumbel": ({"weights": {"ce": 1.0, "token": 0.0}}, 2),
    "mixed": ({"augmentation": {"mixup": 0.8}}, 4),
    "uneven": ({"batch_size": 5}, 3),
}


@pytest.mark.parametrize(("settings", "number"), SETTINGS.values(), ids=SETTINGS)
def test_microbatches_train_as_the_whole_batch(run_training, settings, number, in_float64):
    whole = run_training(**settings)
    split = run_training(whole.model, **settings, grad_accum=number)
    assert split.progress.num_microbatches == number
    for one, other in zip(split.records, whole.records, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-4)
        assert one.kept_ratios == pytest.approx(other.kept_ratios)
    assert_trained_alike(split.student.parameters(), whole.student.parameters())


def _no_memory_for(monkeypatch, more_than):
    real = Objective.forward

    def forward(self, images, *args):
        if len(images) > more_than:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, images, *args)

    monkeypatch.setattr(Objective, "forward", forward)


@pytest.mark.parametrize(("fits", "expected"), [(4, 1), (2, 2), (1, 4)])
def test_as_few_microbatches_as_fit_are_found(run_training, monkeypatch, fits, expected):
    """The loss that the backbone's rate follows is measured in one pass; here the rate is fixed."""
    _no_memory_for(monkeypatch, fits)
    trained = run_training(grad_accum="auto", pretraining_steps=1, steps=2)
    assert trained.progress.num_microbatches == expected
    assert trained.progress.num_images == 4 * 3


def test_looking_for_them_changes_nothing(run_training, same_weights):
    one = run_training()
    assert same_weights(one.student, run_training(one.model, grad_accum="auto").student)


def test_out_of_memory_says_what_to_lower(run_training, monkeypatch):
    _no_memory_for(monkeypatch, 2)
    with pytest.raises(
        TrainingError, match=r"out of memory while training on 4 images a step in 1 part\(s\)"
    ) as caught:
        run_training()
    assert "--grad-accum-steps 2" in caught.value.hint
    assert "--batch-size auto" in caught.value.hint
    _no_memory_for(monkeypatch, 0)
    with pytest.raises(TrainingError, match="out of memory with a single image"):
        run_training(grad_accum="auto")


def test_other_errors_are_not_taken_for_it(run_training, monkeypatch):
    monkeypatch.setattr(Objective, "forward", lambda *args: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_training(grad_accum="auto")


def test_a_plan_holds_a_list_of_steps_for_each_optimiser():
    recipe = Recipe(pretraining_steps=2, epochs=1.5, deployed_share=0.5, noise_end=0.0, freeze_epochs=0.5)
    pretraining, together = recipe.plan_steps(4, has_stages=True)
    assert pretraining == [("pretraining", 1.0, False)] * 2
    assert [step.phase for step in together] == ["sampled"] * 3 + ["deployed"] * 3
    assert [step.noise for step in together[:3]] == [1.0, 0.5, 0.0]
    assert [step.trains_backbone for step in together] == [False, False, True, True, True, True]
    without = recipe.model_copy(update={"backbone_lr_scale": 0.0}).plan_steps(4, has_stages=True)
    assert [step.phase for step in without[1]] == ["sampled"] * 3, "on the deployed path only the backbone can train"
    assert not any(step.trains_backbone for step in without[1])
    dense = recipe.plan_steps(4, has_stages=False)
    assert [[step.phase for step in steps] for steps in dense] == [["deployed"] * 3], "there is nothing to rank"
    assert Recipe(pretraining_steps=0, steps=0).plan_steps(4, has_stages=True) == []
