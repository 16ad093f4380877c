"""One model for a range of keep ratios: the ratio is set, weights and file are one."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.checkpoint.sparse_file import describe, load_sparse, save
from vitprune.errors import CheckpointError, UsageError
from vitprune.model import attach_as
from vitprune.schedule import Sparsity


@pytest.fixture
def elastic(make_vit):
    return vitprune.attach(make_vit(), (0.5, 0.9))


def test_at_every_ratio_it_is_the_model_of_that_ratio(elastic, make_images):
    images, state = make_images(elastic), elastic.predictors.state_dict()
    for keep in (0.5, 0.62, 0.7, 0.9):
        alone = vitprune.attach(elastic.model, keep)
        alone.predictors.load_state_dict(state)
        elastic.keep = keep
        assert elastic.schedule == alone.schedule
        assert torch.equal(elastic(images), alone(images))
    assert elastic.keep == 0.9
    assert elastic.label == "keep 0.9"
    assert elastic.keep_range == (0.5, 0.9)


def test_a_view_has_its_own_ratio_and_the_same_weights(elastic, make_images):
    images, view = make_images(elastic), elastic.at(0.5)
    assert (view.keep, elastic.keep) == (0.5, 0.7)
    before = view(images)
    with torch.no_grad():
        elastic.model.head.weight.zero_()
    assert not torch.equal(view(images), before)
    assert next(view.to(torch.float64).parameters()).dtype == next(elastic.parameters()).dtype == torch.float64


@pytest.mark.parametrize("pruned", ["drop", "merge"])
def test_deployed_and_masked_passes_agree_at_every_ratio(make_vit, make_images, pruned):
    sparse = vitprune.attach(make_vit(), (0.4, 0.8), pruned=pruned, align=8).double()
    images = make_images(sparse).double()
    for keep in (0.4, 0.8):
        sparse.keep = keep
        masked = sparse.forward_masked(images)
        assert [mask.sum(dim=1).tolist() for mask in masked.kept] == [[k, k] for k in sparse.schedule.num_tokens]
        torch.testing.assert_close(sparse(images), masked.logits, atol=1e-4, rtol=1e-3)


def test_what_it_was_not_trained_for_is_refused(elastic, make_vit, make_sparse):
    for keep, words in (
        *((each, r"is outside of the range that the model was trained for, 0\.5 to 0\.9") for each in (0.49, 0.91, 1)),
        *((each, "expected a number in") for each in (float("nan"), "0.6", True, 60)),
    ):
        with pytest.raises(UsageError, match=words):
            elastic.keep = keep
    assert elastic.keep == 0.7
    with pytest.raises(UsageError, match=r"was trained for keep 0\.7 alone, and keep 0\.6 is asked for"):
        vitprune.attach(make_vit(), 0.7).keep = 0.6
    free = vitprune.attach(make_vit(), tokens_left=[0.8, 0.6, 0.4])
    assert free.keep is None
    with pytest.raises(UsageError, match=r"was trained for ratios 0.8,0.6,0.4 alone"):
        free.keep = 0.6
    same = vitprune.attach(make_vit(), 0.7)
    same.keep = 0.7  # changes nothing
    for wrong, words in (
        ((0.9, 0.5), "expected the lower one first"),
        ((0.5, 1), "expected two numbers in"),
        ((0.5, 0.6, 0.7), "expected its two ends"),
    ):
        with pytest.raises(UsageError, match=words):
            vitprune.attach(make_vit(), wrong)
    with pytest.raises(UsageError, match="mutually exclusive"):
        Sparsity(keep_range=(0.5, 0.9), tokens_left=[0.5])
    with pytest.raises(UsageError, match="outside of the range"):
        Sparsity(0.3, keep_range=(0.5, 0.9))


def test_weights_go_from_ratio_to_ratio_and_to_no_other_range(elastic, make_vit, make_images):
    other = vitprune.attach(make_vit(seed=1), (0.5, 0.9))
    other.keep = 0.5
    other.load_state_dict(elastic.state_dict())
    assert other.keep == 0.5, "weights do not set the ratio"
    assert torch.equal(other(make_images(other)), elastic.at(0.5)(make_images(other)))
    assert "trained for keep 0.5 to 0.9" in str(elastic.plan)
    for one in (vitprune.attach(make_vit(), (0.4, 0.9)), vitprune.attach(make_vit(), 0.7)):
        with pytest.raises(CheckpointError, match="another plan"):
            one.load_state_dict(elastic.state_dict())
    copied = copy.deepcopy(elastic)
    copied.keep = 0.8
    assert elastic.keep == 0.7


def test_a_file_opens_at_any_ratio_and_says_what_was_measured_of_it(elastic, make_images, tmp_path):
    row = {"keep": 0.5, "top1_pct": 60.0, "num_images": 9}
    metadata = describe(elastic)
    measured = {"dense": {}, "data": {"name": "x"}, "sparse": {"top1_pct": 70.0}, "fidelity": {}, "keeps": [row]}
    metadata.accuracy = measured
    save(elastic, tmp_path / "model.safetensors", metadata)
    images = make_images(elastic)
    for keep in (None, 0.5, 0.8):
        sparse = vitprune.load(tmp_path, keep=keep)
        assert sparse.keep == (keep or 0.7)
        assert torch.equal(sparse(images), elastic.at(keep or 0.7)(images))
        accuracy = describe(sparse).accuracy
        assert accuracy == (
            measured if keep is None else measured | {"sparse": row, "fidelity": row} if keep == 0.5 else None
        )
    vitprune.save(vitprune.load(tmp_path, keep=0.6), tmp_path / "again")
    again, metadata = load_sparse(tmp_path / "again" / "model.safetensors")
    assert (again.keep, metadata.keep, metadata.keep_range) == (0.6, 0.6, (0.5, 0.9))
    with pytest.raises(UsageError, match="outside of the range"):
        vitprune.load(tmp_path, keep=0.4)


@pytest.mark.parametrize("keep_range", [[0.9, 0.5], [0.1, 0.6], [0.5, 1.0], [0.0, 0.9], [0.7], "0.5-0.9"])
def test_a_header_with_an_impossible_range_is_refused(elastic, tmp_path, keep_range):
    path = tmp_path / "model.safetensors"
    save(elastic, path, describe(elastic))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    header["vitprune"] = json.dumps(json.loads(header["vitprune"]) | {"keep_range": keep_range})
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(CheckpointError, match="keep_range"):
        vitprune.load(path)


def test_without_a_range_a_plan_is_as_before(make_vit):
    sparse = attach_as(make_vit(), Sparsity(0.7))
    assert sparse.keep_range is None
    assert "trained for" not in str(sparse.plan)
    assert Sparsity(0.7).slug == "keep0.7"
    assert Sparsity(**Sparsity.asked((0.5, 0.9))).slug == "keep0.5-0.9"
    assert Sparsity(**Sparsity.asked((0.5, 0.9))).label == "keep 0.7"
    assert Sparsity.asked(0.5) == {"keep": 0.5}
