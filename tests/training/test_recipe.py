"""One settings object, checked when it is made."""

from importlib import resources

import pytest

from vitprune.data.transforms import Augmentation
from vitprune.errors import UsageError
from vitprune.training.recipe import DEFAULT_STEPS, RECIPES, LossWeights, Recipe, load_recipe, usual


def test_default_distils_and_leaves_labels_alone():
    weights = LossWeights()
    assert weights.ce == 0
    assert weights.kl > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr: expected greater than 0, got 0"),
        ({"batch_size": 0}, "batch_size: expected greater than or equal to 1, got 0"),
        ({"steps": -1}, "steps: expected greater than or equal to 0, got -1"),
        ({"precision": "int8"}, "precision: expected 'auto', 'fp32', 'bf16' or 'fp16', got 'int8'"),
        ({"weights": {"kl": -1}}, "weights.kl: expected greater than or equal to 0, got -1"),
        ({"weights": 3}, "weights: expected a valid dictionary"),
        ({"augmentation": {"mixup": "a"}}, "augmentation.mixup: expected a valid number"),
        ({"steps": 3, "epochs": 1}, "give steps or epochs, not both"),
        ({"predictor": "attention"}, "goes with no training"),
    ],
)
def test_impossible_settings_are_refused_in_the_words_of_the_command(settings, message):
    with pytest.raises(UsageError) as made:
        Recipe(**settings)
    with pytest.raises(UsageError) as loaded:
        load_recipe("short", **settings)
    assert message in made.value.message
    if "steps" not in settings:  # these replace the other one of a file
        assert made.value.message == loaded.value.message
    assert "help(vitprune.Recipe)" in str(made.value)
    assert "pydantic" not in str(made.value)


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda: LossWeights(kl=-1), "LossWeights: kl: expected greater than or equal to 0, got -1", "print-config"),
        (lambda: LossWeights(kll=1), "LossWeights has no setting 'kll'", "did you mean kl?"),
        (lambda: Augmentation(mix_up=1), "Augmentation has no setting 'mix_up'", "did you mean mixup?"),
        (lambda: Recipe(learning_rate=1), "recipe 'short' has no setting 'learning_rate'", "did you mean lr?"),
        (lambda: Recipe(weights={"lk": 1}), "no setting 'weights.lk'", "did you mean weights.kl?"),
        (lambda: Recipe(kl=1), "no setting 'kl'", "did you mean weights.kl?"),
        (lambda: Recipe(name="mine", qqq=1), "recipe 'mine' has no setting 'qqq'", "choose from augmentation, "),
        (lambda: setattr(Recipe(), "lr", 1.0), "lr of a Recipe cannot change", "with_settings"),
        (lambda: setattr(LossWeights(), "kl", 1.0), "kl of a LossWeights cannot change", "with_settings"),
    ],
)
def test_every_way_to_settings_refuses_them_alike(make, message, hint):
    with pytest.raises(UsageError) as caught:
        make()
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_settings_given_as_values_replace_others():
    changed = Recipe(weights=LossWeights(ce=1)).with_settings({"lr": 1e-4, "weights": {"kl": 2}, "clip_grad": None})
    assert changed == Recipe(lr=1e-4, weights=LossWeights(ce=1, kl=2), clip_grad=None)
    assert Recipe().with_settings({"weights": LossWeights(kl=2)}).weights == LossWeights(kl=2)
    assert Recipe().with_settings({"weights": "{kl: 2}", "weights.ce": 3}).weights == LossWeights(kl=2, ce=3)
    assert Recipe(epochs=1).with_settings({"steps": 5}) == Recipe(steps=5)


def test_epochs_become_steps():
    assert Recipe(epochs=1.5).num_steps(10) == 15
    assert Recipe(steps=7).num_steps(10) == 7
    assert Recipe(steps=0).num_steps(10) == 0


def test_settings_survive_json():
    recipe = Recipe(lr=3e-4, weights=LossWeights(ce=0), num_workers=2)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_documented_and_complete(name):
    text = resources.files("vitprune.training").joinpath("recipes", f"{name}.yaml").read_text()
    assert text.startswith(f"# {name}:")
    for word in ("Hardware and time:", "Expect"):
        assert word in text
    assert load_recipe(name).name == name


def test_short_is_the_default_in_python_too():
    assert load_recipe("short") == Recipe(steps=DEFAULT_STEPS)
    assert Recipe().num_steps(1) == DEFAULT_STEPS


def test_the_papers_recipe_is_the_papers():
    """DynamicViT section 4.1 and its public settings."""
    recipe = load_recipe("paper")
    assert recipe.weights == LossWeights(ce=1, ratio=2, kl=0.5, pooled=0, token=0.5)
    assert (recipe.epochs, recipe.freeze_epochs, recipe.pretraining_steps, recipe.deployed_share) == (30, 5, 0, 0)
    assert round(recipe.warmup_share * recipe.epochs, 3) == 5
    assert (recipe.weight_decay, recipe.backbone_lr_scale, recipe.ema_decay) == (0.05, 0.01, 0.9999)
    assert (recipe.batch_size, recipe.grad_accum) == (1024, "auto")
    assert recipe.peak_lr == pytest.approx(1e-3)
    assert recipe.model_copy(update={"batch_size": 128}).peak_lr == pytest.approx(1e-3 / 8)
    assert (recipe.token_schedule, recipe.pruned, recipe.noise_end) == ("geometric", "drop", 1)
    assert (recipe.predictor, recipe.balance, recipe.beta) == ("paper", None, 0), "importance alone, unweighted"
    augmentation = recipe.augmentation
    assert augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (augmentation.mixup, augmentation.cutmix) == (0.8, 1)
    assert (augmentation.re_prob, augmentation.smoothing) == (0.25, 0.1)


def test_settings_replace_those_of_the_file():
    recipe = load_recipe("paper", steps=7, weights={"ce": 0.0}, augmentation={"mixup": 0.0})
    assert (recipe.steps, recipe.epochs) == (7, None)
    assert recipe.weights == LossWeights(ce=0, ratio=2, kl=0.5, pooled=0, token=0.5)
    assert (recipe.augmentation.mixup, recipe.augmentation.cutmix) == (0, 1)


def test_a_wrong_setting_is_named():
    with pytest.raises(UsageError, match=r"(?m)recipe 'short': weights\.kl: .*greater than or equal to 0, got -1$"):
        load_recipe("short", weights={"kl": -1})


def test_settings_given_as_text_replace_others():
    updates = {"weights.kl": "1.5", "lr": "1e-2", "clip_grad": "null", "epochs": "2", "augmentation.mixup": "0.5"}
    expected = {"weights": {"kl": 1.5}, "lr": 1e-2, "clip_grad": None, "epochs": 2, "augmentation": {"mixup": 0.5}}
    assert load_recipe("short").with_settings(updates) == load_recipe("short", **expected)
    assert Recipe(epochs=1).with_settings({}).epochs == 1
    assert Recipe().with_settings({"grad_accum": "auto", "labels": "false"}) == Recipe(grad_accum="auto", labels=False)


@pytest.mark.parametrize(
    ("updates", "message", "hint"),
    [
        ({"weights.lk": "1"}, "no setting 'weights.lk'", "did you mean weights.kl?"),
        ({"kl": "1"}, "no setting 'kl'", "did you mean weights.kl?"),
        ({"backbone-lr-scale": "1"}, "no setting 'backbone-lr-scale'", "did you mean backbone_lr_scale?"),
        ({"weights": {"lk": 1}}, "no setting 'weights.lk'", "did you mean weights.kl?"),
        ({"lr": -1.0}, "lr: expected greater than 0, got -1.0", "--print-config"),
        ({"weights": "1"}, "no setting 'weights'", "did you mean weights."),
        ({"name": "mine"}, "no setting 'name'", ""),
        ({"qqq": "1"}, "no setting 'qqq'", "augmentation.crop_scale, "),
        ({"lr": "fast"}, "lr: expected a valid number", "--print-config"),
        ({"lr": "["}, "got '['", "--print-config"),
        ({"tau": "0"}, "tau: expected greater than 0, got 0", "--print-config"),
        ({"steps": "1", "epochs": "1"}, "give steps or epochs, not both", "--print-config"),
    ],
)
def test_settings_that_cannot_be_are_refused(updates, message, hint):
    with pytest.raises(UsageError) as caught:
        load_recipe("short").with_settings(updates)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("recipe", "model", "given", "ranged", "steps"),
    [
        ("short", "deit_tiny", {}, True, 600),
        ("short", "deit_tiny", {}, False, 300),
        ("short", "demo", {}, True, 20),
        ("short", "deit_tiny", {"steps": 40}, True, 40),
        ("dense", "deit_tiny", {}, True, load_recipe("dense").steps),
    ],
)
def test_the_demo_takes_fewer_steps_and_a_range_more_where_nothing_is_said(recipe, model, given, ranged, steps):
    assert load_recipe(recipe, **usual(recipe, model, given, ranged=ranged)).steps == steps
    by_passes = load_recipe(recipe, **usual(recipe, model, {"epochs": 2}, ranged=ranged))
    assert (by_passes.steps, by_passes.epochs) == (None, 2)
