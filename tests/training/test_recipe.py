"""One settings object, checked when it is made."""

import pytest
from pydantic import ValidationError

from vitprune.training import LossWeights, Recipe


def test_default_distils_and_leaves_labels_alone():
    weights = LossWeights()
    assert weights.ce == 0
    assert weights.kl > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0},
        {"batch_size": 0},
        {"steps": -1},
        {"precision": "int8"},
        {"weights": {"kl": -1}},
        {"learning_rate": 1e-3},
        {"steps": 3, "epochs": 1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        Recipe(**settings)


def test_epochs_become_steps():
    assert Recipe(epochs=1.5).num_steps(10) == 15
    assert Recipe(steps=7).num_steps(10) == 7
    assert Recipe(steps=0).num_steps(10) == 0
    assert Recipe().num_steps(10) > 0


def test_settings_survive_json():
    recipe = Recipe(lr=3e-4, weights=LossWeights(ce=0), num_workers=2)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
