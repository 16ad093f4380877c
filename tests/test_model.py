"""SparseViT: selection, gradients, precision, copying."""

import copy
import warnings

import pytest
import timm
import torch
from agreement import assert_masked_is_gathered

from vitprune.checkpoint.sparse_file import describe, load_sparse, save
from vitprune.errors import UsageError
from vitprune.model import SparseViT, attach
from vitprune.model.plan import PLAN_KEY
from vitprune.schedule import Sparsity, make_schedule
from vitprune.tokens.masking import gumbel_decision
from vitprune.tokens.predictor import TokenPredictor
from vitprune.tokens.selection import topk_decision

NANO = {"name": "test_vit", "img_size": 96}  # 6 blocks, 36 patches, class token
KINDS = {
    "class token": NANO,
    "average": {"name": "test_vit2", "img_size": 96},
    "attention pool": {"name": "test_vit3", "img_size": 96},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def sparse(make_sparse):
    return make_sparse(**NANO)


@pytest.fixture
def images(sparse, make_images):
    return make_images(sparse, count=3)


def test_selected_tokens_are_the_planned_number_of_highest_scores_of_those_present(sparse, images):
    selection = sparse.select(images)
    assert [chosen.shape for chosen in selection.indices] == [(3, 25), (3, 17), (3, 12)]
    present = torch.arange(36).expand(3, -1)
    for scores, chosen in zip(selection.scores, selection.indices, strict=True):
        assert scores.shape == (3, present.shape[1])
        best = scores.argsort(dim=1, descending=True)[:, : chosen.shape[1]]
        present = present.gather(1, best.sort(dim=1).values)
        assert torch.equal(present, chosen)
    assert torch.equal(selection.logits, sparse(images))
    assert not torch.equal(present[0], present[1]), "every image has its own"
    assert torch.equal(sparse.select(images[1:2]).indices[-1], present[1:2]), "whatever else is in the batch"


def test_masked_pass_reports_the_decisions_of_the_gathered_pass(sparse, images):
    assert_masked_is_gathered(sparse, images)
    selection, masked = sparse.select(images), sparse.forward_masked(images)
    previous = torch.arange(36).expand(3, -1)
    for gathered, full, indices in zip(selection.scores, masked.log_pi, selection.indices, strict=True):
        assert full.shape == (3, 36, 2)
        torch.testing.assert_close(full.exp().sum(-1), torch.ones(3, 36))
        log_odds = (full[..., 1] - full[..., 0]).gather(1, previous)
        torch.testing.assert_close(log_odds, gathered, rtol=0, atol=1e-4)
        previous = indices


def test_a_predictor_sees_patch_tokens_only_and_what_is_left_of_them(make_vit, make_images):
    seen = []

    class Recording(TokenPredictor):
        def forward(self, x, kept=None):
            seen.append((x.shape[1], kept))
            return super().forward(x, kept)

    model = make_vit(**NANO)
    schedule = make_schedule(6, 36, Sparsity(0.5, [1, 3], "geometric"))
    sparse = SparseViT(model, schedule, [Recording(64), Recording(64)], "drop")
    images = make_images(model)
    lengths = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    sparse(images)
    assert lengths == [1 + count for count in schedule.tokens_per_block()] == [37, 19, 19, 10, 10, 10]
    assert seen == [(36, None), (18, None)]
    seen.clear()
    sparse.forward_masked(images)
    assert [shape for shape, _ in seen] == [36, 36]
    assert torch.equal(seen[0][1], torch.ones(2, 36))
    assert (seen[1][1].sum(1) == 18).all()


def test_what_a_pruned_token_holds_changes_nothing_for_the_others(sparse, images):
    """The definition of the masked pass: overwrite pruned tokens on the way, and the answer stays."""
    stage = sparse.schedule.blocks[0]
    expected = sparse.forward_masked(images)

    def overwrite(block, inputs):
        x = inputs[0].clone()
        patches = x[:, 1:]
        pruned = expected.kept[0] == 0
        patches[pruned] = patches[pruned].flip(-1)
        return x, *inputs[1:]

    handle = sparse.model.blocks[stage + 1].register_forward_pre_hook(overwrite)
    fixed = iter(expected.kept)
    changed = sparse.forward_masked(images, lambda log_pi, kept, stage: next(fixed))
    handle.remove()
    torch.testing.assert_close(changed.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_sampled_d_hat_only_falls_and_each_stage_decides_from_the_one_before(sparse, images, seed):
    seen = []

    def decide(log_pi, kept, stage):
        seen.append((kept, stage))
        return gumbel_decision(log_pi)

    torch.manual_seed(seed)
    masks = sparse.train().forward_masked(images, decide).kept
    assert [stage for _, stage in seen] == list(sparse.schedule.stages)
    assert len(masks) == 3
    for (earlier, _), later in zip(seen, masks, strict=True):
        assert ((later == 0) | (later == 1)).all()
        assert (later <= earlier).all()
        assert later.sum() < earlier.sum()
    expected = (torch.ones(3, 36), *masks[:2])
    assert all(torch.equal(before, mask) for (before, _), mask in zip(seen, expected, strict=True))


def test_dropping_everything_by_mask_stays_finite(sparse, images):
    masked = sparse.forward_masked(images, lambda log_pi, kept, stage: 0 * log_pi[..., 1])
    masked.logits.square().sum().backward()
    assert masked.logits.isfinite().all()
    gradients = [parameter.grad for parameter in sparse.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@by_kind
@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast"])
def test_gradient_reaches_every_parameter_of_predictors_and_blocks(make_sparse, make_images, kind, precision):
    sparse = make_sparse(**KINDS[kind]).train()
    images = make_images(sparse)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        logits = sparse.forward_masked(images, lambda log_pi, kept, stage: gumbel_decision(log_pi)).logits
        torch.nn.functional.cross_entropy(logits.float(), torch.tensor([1, 2])).backward()
    for part in (sparse.predictors, sparse.model.blocks):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@by_kind
def test_pruned_tokens_decisions_receive_gradient_through_the_whole_model(make_sparse, make_images, kind):
    sparse = make_sparse(**KINDS[kind])
    images = make_images(sparse)
    decisions = []

    def decide(log_pi, kept, stage):
        decision = topk_decision(log_pi[..., 1], stage.num_tokens, kept).detach().requires_grad_()
        decisions.append(decision)
        return decision

    logits = sparse.forward_masked(images, decide).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    first = decisions[0]
    pruned, stays = first.grad[first == 0].abs(), first.grad[first == 1].abs()
    assert (pruned > 0).float().mean() > 0.99
    # A token pruned at the first stage could come back only for the blocks up to the second, so its gradient is
    # that of D at stage 1 times D = 0 at stages 2 and 3: smaller than a kept token's, never negligible.
    assert pruned.median() > 0.01 * stays.median()


@pytest.mark.parametrize(("size", "total"), [("tiny", 5_899_582), ("small", 22_774_414), ("base", 89_452_846)])
def test_parameters_with_three_predictors_are_the_published_number(size, total):
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224")
    sparse = attach(model, predictor="paper")
    assert len(sparse.predictors) == 3
    assert {parameter.device.type for parameter in sparse.parameters()} == {"meta"}, "where the model is"
    assert sum(parameter.numel() for parameter in sparse.parameters()) == total


def test_casting_the_model_keeps_the_scores_in_fp32(sparse, images):
    sparse.bfloat16()
    assert {parameter.dtype for parameter in sparse.model.parameters()} == {torch.bfloat16}
    for scores in sparse.select(images.bfloat16()).scores:
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.bfloat16().float())


def test_float64_agrees_with_fp32(sparse, images):
    expected, masked = sparse(images), sparse.forward_masked(images).logits
    sparse.double()
    assert sparse(images.double()).dtype == torch.float64
    torch.testing.assert_close(sparse(images.double()).float(), expected, rtol=0, atol=1e-4)
    exact = sparse.forward_masked(images.double())
    torch.testing.assert_close(exact.logits.float(), masked, rtol=0, atol=1e-4)
    assert {kept.dtype for kept in exact.kept} == {torch.float64}


def test_deepcopy_is_independent_and_consistent(sparse, images):
    expected = sparse(images)
    twin = copy.deepcopy(sparse)
    assert twin.backbone.model is twin.model
    assert twin.model is not sparse.model
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert torch.equal(twin(images), expected)
    assert not torch.equal(sparse(images), expected)


def test_state_dict_round_trip(sparse, images, make_sparse):
    other = make_sparse(**NANO, seed=5)
    assert not torch.equal(other(images), sparse(images))
    state = sparse.state_dict()
    own = {name.removeprefix("model.") for name in state if not name.startswith("predictors.")}
    assert own - {PLAN_KEY} == set(sparse.model.state_dict()), "timm's names"
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other(images), sparse(images))
    assert torch.equal(other.forward_masked(images).logits, sparse.forward_masked(images).logits)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_predictors_is_refused(make_vit, count):
    with pytest.raises(ValueError, match=f"got {count} predictors and 3 stages"):
        SparseViT(make_vit(**NANO), make_schedule(6, 36), [TokenPredictor(64) for _ in range(count)])


def test_keep_1_attaches_no_predictors_and_masks_nothing(make_vit, make_images):
    model = make_vit(**NANO)
    dense, images = attach(model, keep=1.0), make_images(model)
    assert len(dense.predictors) == 0
    masked = dense.forward_masked(images)
    assert masked.kept == masked.log_pi == dense.select(images).indices == ()
    assert torch.equal(masked.logits, model(images))
    assert dense.pretrained_cfg["architecture"] == "test_vit"
    assert dense.num_classes == 1000


@pytest.mark.parametrize("arguments", [{"token_schedule": "latee"}, {"pruned": "blend"}, {"pruned": "Merge"}])
def test_unknown_schedule_or_fate_of_tokens_is_an_error(make_vit, arguments):
    with pytest.raises(UsageError, match="is unknown"):
        attach(make_vit(), **arguments)
    if "pruned" in arguments:
        with pytest.raises(UsageError, match="is unknown"):
            SparseViT(make_vit(), attach(make_vit()).schedule, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"keep": 0.5}, {"keep": 0.7}, {"token_schedule": "geometric"}, {"token_schedule": "late"}, {"keep": 1.0}],
)
def test_two_answers_to_how_much_is_kept_are_an_error(make_vit, arguments):
    with pytest.raises(UsageError, match=f"{next(iter(arguments))} and tokens_left are mutually exclusive"):
        attach(make_vit(), tokens_left=[0.5, 0.25, 0.2], **arguments)
    with pytest.raises(UsageError, match="keep and tokens_left are mutually exclusive"):
        Sparsity(0.5, tokens_left=[0.5])
    assert attach(make_vit(), None, tokens_left=[0.5, 0.25, 0.2]).schedule.num_tokens == (50, 25, 20)


@pytest.mark.parametrize(("keep", "left"), [(0.01, "1/1/1"), (0.2, "20/4/1")])
def test_a_plan_that_starves_the_model_is_said(make_vit, keep, left):
    with pytest.warns(UserWarning, match=f"keep {keep} leaves {left} of 100 patch tokens") as caught:
        attach(make_vit(), keep, token_schedule="geometric" if keep < 0.1 else "late", prune_at=[1, 2, 5])
    assert "it is a single one" in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attach(make_vit(), 0.3).schedule.num_tokens[-1] >= 2


def test_fold_is_the_old_word_for_merge(make_vit):
    assert attach(make_vit(), pruned="fold").pruned == "merge"
    assert SparseViT(make_vit(), attach(make_vit()).schedule, pruned="fold").pruned == "merge"


def test_speaks_as_a_timm_model(make_sparse, make_images):
    sparse = make_sparse(num_classes=5)
    images = make_images(sparse)
    features = sparse.forward_features(images)
    assert features.shape == sparse.model.forward_features(images).shape
    assert torch.equal(sparse.forward_head(features), sparse(images))
    pooled = sparse.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, sparse.num_features)
    assert torch.equal(sparse.get_classifier()(pooled), sparse(images))
    assert sparse.default_cfg == sparse.pretrained_cfg == sparse.model.pretrained_cfg
    assert sparse.get_classifier() is sparse.model.head


def test_reset_classifier_changes_what_the_model_says_of_itself(make_sparse, make_images, tmp_path):
    sparse = make_sparse(num_classes=5)
    sparse.class_names = tuple("abcde")
    sparse.reset_classifier(3)
    images = make_images(sparse)
    assert sparse.num_classes == sparse(images).shape[1] == 3
    assert sparse.class_names is None
    save(sparse, tmp_path / "model.safetensors", describe(sparse, class_names=("a", "b", "c")))
    loaded, _ = load_sparse(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), sparse(images))
    assert loaded.class_names == ("a", "b", "c")
    sparse.reset_classifier(0)
    assert sparse(images).shape == (2, sparse.num_features)
