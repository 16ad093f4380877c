"""The plan in a state dict: carried everywhere, compared, said in words, never in our file."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_model
from timm.utils import ModelEmaV2, ModelEmaV3

from vitprune import attach, load, save
from vitprune.errors import CheckpointError
from vitprune.model import SparseViT, attach_as
from vitprune.model.plan import PLAN_KEY, unpack
from vitprune.schedule import Sparsity


@pytest.fixture
def pair(make_vit):
    """Two models of one plan and other weights."""
    return tuple(attach(make_vit(img_size=96, seed=seed), 0.7) for seed in (0, 1))


def same(one, other, images):
    return torch.equal(one(images), other(images))


def test_state_dicts_carry_the_plan_through_files(pair, make_images, tmp_path):
    one, other = pair
    images = make_images(one)
    assert not same(one, other, images)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert same(one, other, images)
    assert str(unpack(one.state_dict()[PLAN_KEY])) == str(one.plan)


def test_safetensors_and_accelerate_carry_it(pair, make_images, tmp_path):
    one, other = pair
    images = make_images(one)
    save_model(one, tmp_path / "own.safetensors")
    assert load_model(other, tmp_path / "own.safetensors") == (set(), [])
    assert same(one, other, images)
    Accelerator(cpu=True).save_model(one, tmp_path / "accelerated")
    state = load_file(tmp_path / "accelerated" / "model.safetensors")
    third = attach(copy.deepcopy(one.model), 0.7)
    third.load_state_dict(state)
    assert same(one, third, images)
    with pytest.raises(CheckpointError, match="another plan"):
        load_model(attach(copy.deepcopy(one.model), 0.5), tmp_path / "own.safetensors")


@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3])
def test_averages_of_weights_keep_the_plan(pair, average):
    one, _ = pair
    ema = average(one, decay=0.9)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    for _ in range(3):
        ema.update(one)
    assert ema.module.plan == one.plan
    one.load_state_dict(ema.module.state_dict())
    mean = {name: sum(0.1 * t.double() for t in [tensor] * 10) for name, tensor in one.state_dict().items()}
    one.load_state_dict(mean)


def test_wrapped_in_parallel_it_is_there(pair):
    one, other = pair
    state = torch.nn.DataParallel(one).state_dict()
    assert f"module.{PLAN_KEY}" in state
    torch.nn.DataParallel(other).load_state_dict(state)


def test_our_file_has_it_in_the_header_alone(pair, tmp_path):
    file = save(pair[0], tmp_path)
    assert not [name for name in load_file(file) if PLAN_KEY in name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(file).plan == pair[0].plan


OTHERS = {
    "keep": {"keep": 0.5},
    "stages": {"prune_at": [1, 2, 3]},
    "schedule": {"token_schedule": "geometric"},
    "dropped": {"pruned": "drop"},
    "balance": {"balance": None},
    "beta": {"beta": 0.5},
    "aligned": {"align": 4},
    "predictor": {"predictor": "paper"},
    "keys": {"similarity": "keys"},
    "attention": {"predictor": "attention"},
    "dense": {"keep": 1.0},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_another_plan_are_refused_with_both_and_nothing_is_loaded(pair, make_vit, kind, strict):
    one = pair[0]
    other = attach(make_vit(img_size=96, seed=1), **OTHERS[kind])
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="another plan") as caught:
        other.load_state_dict(one.state_dict(), strict=strict)
    assert f"{one.plan}; here: {other.plan}" in caught.value.message
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_one_plan_by_other_words_or_at_another_size_is_the_same(make_vit):
    one = attach(make_vit(img_size=96), 0.7)
    shares = attach(make_vit(img_size=96), tokens_left=one.schedule.ratios)
    shares.load_state_dict(one.state_dict())
    larger = attach(make_vit(img_size=128), 0.7)
    state = one.state_dict() | {"model.pos_embed": larger.model.pos_embed}
    larger.load_state_dict(state)
    assert larger.schedule.num_tokens != one.schedule.num_tokens


def test_old_weights_load_with_a_warning_that_says_what_they_are_taken_for(pair, make_images):
    one, other = pair
    old = {name: tensor for name, tensor in one.state_dict().items() if name != PLAN_KEY}
    with pytest.warns(UserWarning, match="do not say for which plan") as caught:
        assert other.load_state_dict(old).missing_keys == []
    assert str(other.plan) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert same(one, other, make_images(one))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({PLAN_KEY: one.state_dict()[PLAN_KEY]})


@pytest.mark.parametrize(
    "packed", [torch.zeros(3, dtype=torch.uint8), torch.tensor([300.0]), torch.zeros(2, 2), {"stages": []}, None]
)
def test_what_is_no_plan_is_said(pair, packed):
    with pytest.raises(CheckpointError, match="cannot be read"):
        pair[0].load_state_dict(pair[0].state_dict() | {PLAN_KEY: packed})


def test_in_words_it_says_what_was_asked_for_and_what_that_is(make_vit):
    model = make_vit("deit_tiny_patch16_224")
    assert str(attach(model, 0.7).plan) == (
        "keep 0.7 (late), 148/100/52 of 196 patch tokens left by stages before blocks 3/6/9, pruned='merge', "
        "balance=0.1, beta=1, predictor='light'"
    )
    assert "ratios 0.5,0.2, 98/39 of" in str(attach(model, tokens_left=[0.5, 0.2], prune_at=[3, 6]).plan)
    assert "keep 0.5 (geometric), 98/49/24 of 196" in str(attach_as(model, Sparsity.as_published(0.5)).plan)
    assert "beta=1, similarity='keys', predictor" in str(attach(model, 0.7, similarity="keys").plan)
    assert attach(model, 0.7, pruned="drop", similarity="keys").plan == attach(model, 0.7, pruned="drop").plan
    assert str(attach(model, 1.0).plan) == "dense, all 196 patch tokens stay"
    shown = repr(attach(model, 0.5, align=8))
    assert "SparseViT(\n  deit_tiny_patch16_224: keep 0.5 align 8 (late), " in shown
    schedule = attach(model, 0.7).schedule
    assert SparseViT(model, schedule).plan == attach(model, 0.7).plan, "defaults are the same"
