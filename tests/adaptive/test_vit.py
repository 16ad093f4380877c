"""The cascade: each image gets what the pass it ends in gives, whatever batch it came in."""

import copy

import pytest
import torch

import vitprune
from vitprune.adaptive import AdaptiveViT, account
from vitprune.errors import UsageError
from vitprune.measure import count_macs
from vitprune.model import attach_as
from vitprune.schedule import Sparsity


@pytest.fixture
def dense(make_vit):
    return make_vit(num_classes=5).double()


@pytest.fixture
def sparse(dense):
    """A pruned model whose tail has moved from the dense one's, as after training."""
    sparse = vitprune.attach(copy.deepcopy(dense), (0.3, 0.8))
    with torch.no_grad():
        sparse.model.head.weight *= 1.3
    return sparse.double()


@pytest.fixture
def images(make_images, dense):
    return make_images(dense, count=12).double()


def certainties(model, images):
    best = model(images).softmax(dim=1).sort(dim=1, descending=True).values
    return best[:, 0] - best[:, 1]


def between(sure):
    """A threshold in the middle, at which no image lies."""
    return sure.sort().values[5:7].mean().item()


def test_between_none_and_all_go_on(sparse, dense, images):
    adaptive = AdaptiveViT([sparse, dense], threshold=0.0)
    torch.testing.assert_close(adaptive(images), sparse(images))
    adaptive.threshold = 2.0
    torch.testing.assert_close(adaptive(images), dense(images))


def test_every_image_gets_the_pass_that_it_ends_in(sparse, dense, images):
    passes = [sparse.at(0.3), sparse.at(0.8), dense]
    sure = [certainties(each, images) for each in passes[:2]]
    threshold = between(sure[0])
    adaptive = AdaptiveViT(passes, threshold)
    outputs, ended = adaptive.route(images)
    expected = torch.full((12,), 2)
    expected[sure[1] >= threshold] = 1
    expected[sure[0] >= threshold] = 0
    assert torch.equal(ended, expected)
    assert len(set(ended.tolist())) > 1
    by_hand = torch.stack([each(images) for each in passes])[expected, torch.arange(12)]
    torch.testing.assert_close(outputs, by_hand)

    adaptive.ended = []
    parts = torch.cat([adaptive(part) for part in images.split([1, 4, 7])])
    torch.testing.assert_close(parts, by_hand)
    assert adaptive.ended == expected.tolist()


def test_an_image_whose_first_pass_gives_no_numbers_goes_on(sparse, dense, images):
    with torch.no_grad():
        sparse.model.head.weight.fill_(float("nan"))
    outputs, ended = AdaptiveViT([sparse, dense], 0.0).route(images)
    assert ended.tolist() == [1] * 12
    torch.testing.assert_close(outputs, dense(images))


def test_costs_count_the_trunk_once(sparse, dense):
    size = (3, *dense.patch_embed.img_size)
    adaptive = AdaptiveViT([sparse.at(0.3), sparse.at(0.8), dense], 0.5)
    costs = adaptive.costs(size)
    whole = [count_macs(each, size) for each in adaptive.passes]
    assert costs[0] == whole[0]
    shared = whole[0] + whole[1] - costs[1]
    assert costs[2] == costs[1] + whole[2] - shared
    assert 0 < shared < min(whole)


def test_what_became_of_images_is_counted_by_the_pass_they_end_in():
    assert account([0, 0, 0, 2], [1_000_000_000, 2_000_000_000, 5_000_000_000]) == {
        "went_on_pct": 25.0,
        "gmacs_mean": 2.0,
        "gmacs_worst": 5.0,
    }


def test_another_threshold_is_another_model_than_was_promised(sparse, dense):
    adaptive = AdaptiveViT([sparse, dense], 0.3)
    adaptive.promise = {"bound": 0.01}
    adaptive.threshold = 0.2
    assert adaptive.promise is None


def test_a_model_that_prunes_by_its_attention_can_be_the_first_pass(dense, images):
    sparse = attach_as(copy.deepcopy(dense), Sparsity(0.5, predictor="attention"))
    adaptive = AdaptiveViT([sparse, dense], 0.0)
    torch.testing.assert_close(adaptive(images), sparse(images))
    adaptive.threshold = 2.0
    torch.testing.assert_close(adaptive(images), dense(images))


def test_several_labels_are_as_sure_as_the_least_sure(sparse, dense, images):
    sparse.task = "multilabel"
    sure = 2 * sparse(images).abs().amin(dim=1).sigmoid() - 1
    threshold = between(sure)
    assert torch.equal(AdaptiveViT([sparse, dense], threshold).route(images)[1] == 0, sure >= threshold)


def test_what_cannot_be_one_model_is_refused(sparse, dense, make_vit, images):
    for passes, words in (
        ([sparse], "two passes or more"),
        ([dense, sparse], "of which the first prunes"),
        ([sparse, make_vit(num_classes=5, seed=3).double()], "are no models of one trunk"),
        ([sparse, make_vit(num_classes=3).double()], "the passes have 5 and 3 outputs"),
        ([sparse.at(0.8), sparse.at(0.3), dense], "do not rise in cost: keep 0.8, then keep 0.3, then dense"),
    ):
        with pytest.raises(UsageError, match=words):
            AdaptiveViT(passes, 0.5)
    for threshold in (-0.1, float("nan")):
        with pytest.raises(UsageError, match="expected 0 or more"):
            AdaptiveViT([sparse, dense], threshold)
    for task in ("regression", "embedding", "dense"):
        sparse.task = task
        with pytest.raises(UsageError, match=f"the task is {task}, whose outputs do not say how sure"):
            AdaptiveViT([sparse, dense], 0.5)
