"""What `import vitprune` offers."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import vitprune


def test_every_name_is_there_and_known_to_type_checkers():
    for name in vitprune.__all__:
        assert getattr(vitprune, name).__name__ == name
    assert set(vitprune.__all__) <= set(dir(vitprune))
    typed = re.findall(r"import (\w+) as \1$", Path(vitprune.__file__).read_text(), re.MULTILINE)
    assert sorted(typed) == sorted([*vitprune.__all__, "__version__"])


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sparsifi'"):
        vitprune.sparsifi  # noqa: B018


def test_import_and_cli_do_not_load_torch():
    code = "import sys, vitprune, vitprune.cli.app; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sparsify_without_data_warns_and_leaves_the_model_alone(make_vit, make_images):
    model = make_vit()
    images = make_images(model)
    before = model(images)
    with pytest.warns(UserWarning, match="not trained"):
        sparse = vitprune.sparsify(model, keep=0.5)
    assert len(sparse.predictors) == 3
    assert sparse(images).shape == before.shape
    assert sparse.model is not model
    assert torch.equal(model(images), before)


def test_sparsify_with_data_trains_and_writes_a_loadable_run(make_vit, make_images, image_folder, tmp_path):
    model = make_vit(num_classes=2, img_size=64, depth=3)
    images = make_images(model)
    before = model(images)
    recipe = vitprune.Recipe(pretraining_steps=1, steps=4, batch_size=4, num_workers=0, precision="fp32")
    output = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = vitprune.sparsify(model, keep=0.5, data=image_folder, recipe=recipe, device="cpu", output=output)
    assert torch.equal(model(images), before), "the teacher must not change"
    assert all(parameter.requires_grad for parameter in [*model.parameters(), *sparse.parameters()])
    assert not torch.equal(sparse.model.blocks[-1].mlp.fc2.weight, model.blocks[-1].mlp.fc2.weight)
    loaded = vitprune.load(output)
    assert torch.equal(loaded(images), sparse(images))
