"""Weights of a range of keep ratios, between the dense model's and those trained for the lowest."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.load import load_dense, load_model
from vitprune.model.blend import Blend, tail_parameters


@pytest.fixture
def blended(make_vit):
    """A model for 0.5 to 0.9 at 0.7, whose tail was changed as training does."""
    sparse = vitprune.attach(make_vit(), (0.5, 0.9))
    dense = {
        name: each.detach().clone()
        for name, each in tail_parameters(sparse.backbone, sparse.schedule.blocks[0]).items()
    }
    torch.manual_seed(3)
    sparse.blend = Blend(dense, {name: each + 0.05 * torch.randn_like(each) for name, each in dense.items()}, 0.5)
    sparse.blend.fill(sparse.model, 0.7)
    return sparse.eval()


def test_the_further_from_1_the_further_from_the_dense_weights(blended):
    dense, tuned = blended.blend.dense, blended.blend.tuned
    for keep in (0.5, 0.6, 0.9):
        blended.keep = keep
        weights = dict(blended.model.named_parameters())
        for name in dense:
            there = dense[name].double() + (1 - keep) / 0.5 * (tuned[name].double() - dense[name].double())
            torch.testing.assert_close(weights[name].double(), there, atol=1e-6, rtol=0)
    assert "blocks.1.mlp.fc1.weight" in dense
    assert "head.weight" in dense
    assert not any(name.startswith(("patch_embed", "pos_embed", "blocks.0.")) for name in dense)


def test_views_differ_behind_the_trunk_that_they_share(blended, make_images):
    images, before = make_images(blended), blended(make_images(blended))
    mild, low = blended.at(0.9), blended.at(0.5)
    own, others = dict(blended.model.named_parameters()), dict(low.model.named_parameters())
    assert {name for name in own if own[name] is not others[name]} == blended.blend.dense.keys()
    assert not torch.equal(mild(images), low(images))
    assert torch.equal(blended(images), before), "making a view changes nothing"
    blended.keep = 0.5
    assert torch.equal(blended(images), low(images))
    adaptive = vitprune.AdaptiveViT([low, mild], threshold=2.0)
    torch.testing.assert_close(adaptive(images), mild(images))


def test_weights_of_another_ratio_of_the_range_fit(blended, make_images):
    other = copy.deepcopy(blended)
    other.keep = 0.9
    images, wanted = make_images(blended), other(make_images(blended))
    with torch.no_grad():
        other.blend.ends["tuned"].get_buffer("norm/weight").zero_()
    other.keep = 0.8
    other.load_state_dict(blended.state_dict())
    assert other.keep == 0.8, "weights do not set the ratio"
    other.keep = 0.9
    assert torch.equal(other(images), wanted)


def test_a_file_holds_both_ends_and_opens_at_any_ratio(blended, make_images, tmp_path):
    path = tmp_path / "model.safetensors"
    vitprune.save(blended, tmp_path)
    tensors = load_file(path)
    assert torch.equal(tensors["norm.weight"], blended.blend.tuned["norm.weight"])
    assert torch.equal(tensors["dense.norm.weight"], blended.blend.dense["norm.weight"])
    images = make_images(blended)
    for keep in (0.5, 0.7, 0.9):
        opened = vitprune.load(path, keep=keep)
        torch.testing.assert_close(opened(images), blended.at(keep)(images))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    said = json.loads(header["vitprune"])
    dense = load_dense(load_model(str(path)), None).model
    for name, weights in dense.named_parameters():
        assert torch.equal(weights, tensors.get(f"dense.{name}", tensors[name]))
    for change, words in (({"blended": False}, "'dense.blocks"), ({"keep_range": None}, "blended, but made for one")):
        save_file(tensors, path, metadata=header | {"vitprune": json.dumps(said | change)})
        with pytest.raises(CheckpointError, match=words):
            vitprune.load(path)


def test_a_file_of_before_has_the_same_weights_at_every_ratio(make_vit, tmp_path):
    sparse = vitprune.attach(make_vit(), (0.5, 0.9)).eval()
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    opened = vitprune.load(tmp_path)
    assert opened.blend is None
    assert not any(name.startswith("dense.") for name in load_file(tmp_path / "model.safetensors"))


def test_a_program_holds_the_weights_of_its_ratio_alone(blended, tmp_path):
    one = vitprune.attach(copy.deepcopy(blended.model), 0.7).eval()
    one.predictors.load_state_dict(blended.predictors.state_dict())
    sizes = [vitprune.export_model(each, tmp_path / f"{n}.pt2").size_mib for n, each in enumerate((one, blended))]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert blended.blend is not None


def test_it_is_not_trained_on_unknowingly(blended, make_vit):
    teacher = vitprune.attach(make_vit(), keep=1.0)
    with pytest.raises(UsageError, match="its weights lie between two ends") as error:
        vitprune.Objective(blended, teacher, vitprune.Recipe())
    assert "student.blend = None" in error.value.hint
    blended.blend = None
    vitprune.Objective(blended, teacher, vitprune.Recipe())
