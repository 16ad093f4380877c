"""What a SparseViT says of itself stays true when its model, its layers or its place change."""

import warnings

import pytest
import timm
import torch
from architectures import ALL, LVVIT, OTHERS, VIT
from torch import nn

from vitprune import attach, load, save
from vitprune.errors import UsageError
from vitprune.measure import count_macs
from vitprune.model import AttentionViT, SparseViT
from vitprune.tokens.masking import gumbel_decision

KINDS = ["light", "paper"]


def sampled(log_pi, kept, stage):
    return gumbel_decision(log_pi)


# Another head, another image size


def test_another_head_counts_however_it_came(make_vit, make_images, tmp_path):
    sparse = attach(make_vit(img_size=96), 0.7)
    sparse.model.reset_classifier(5)
    assert sparse.num_classes == 5
    sparse.model.head = nn.Linear(64, 7)
    assert sparse.num_classes == sparse(make_images(sparse)).shape[1] == 7
    loaded = load(save(sparse, tmp_path, class_names=list("abcdefg")))
    assert (loaded.num_classes, len(loaded.class_names)) == (7, 7)
    sparse.model.head = nn.Identity()
    assert sparse.num_classes == 0


def test_no_pooling_is_no_classifier(make_vit):
    with pytest.raises(UsageError, match="would give tokens") as caught:
        attach(make_vit()).reset_classifier(0, "")
    assert "forward_features" in caught.value.hint


@pytest.mark.parametrize("pruned", ["merge", "drop"])
@pytest.mark.parametrize(
    "kind", ["class token", "attention pool with prefix", "average with prefix", "Perception Encoder", "BEiT"]
)
def test_another_pooling_is_the_one_that_a_fresh_model_would_have(make_vit, make_images, kind, pruned):
    sparse = attach(make_vit(**ALL[kind]), 0.6, pruned=pruned).eval()
    before = sparse.backbone.pooling
    pool = "token" if kind == "BEiT" else "max" if kind == "average with prefix" else "avg"
    sparse.reset_classifier(7, pool)
    sparse.model.get_classifier().requires_grad_(False).weight.normal_()
    fresh = SparseViT(sparse.model, sparse.schedule, sparse.predictors, pruned)
    images = make_images(sparse)
    assert sparse.model.global_pool == pool
    assert sparse.backbone.pooling != before or pool == "max"
    assert torch.equal(sparse(images), fresh(images))
    assert torch.equal(sparse.forward_masked(images).logits, fresh.forward_masked(images).logits)
    torch.testing.assert_close(sparse(images), sparse.forward_masked(images).logits, rtol=1e-3, atol=1e-3)


SIZED = {
    "class token": VIT["class token"],
    "rotary": OTHERS["EVA-02"],
    "relative positions": OTHERS["BEiT"],
}


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm's, of BEiT
@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("kind", SIZED)
def test_token_counts_follow_another_image_size(make_vit, make_images, tmp_path, kind, align):
    small = attach(make_vit(**SIZED[kind]), 0.7, align=align)
    sparse = attach(make_vit(**SIZED[kind]), 0.7, align=align)
    sparse.set_input_size((112, 224))
    rows, columns = sparse.grid_size
    assert (rows, columns) != small.grid_size
    expected = attach(make_vit(**SIZED[kind] | {"img_size": (112, 224)}), 0.7)
    images = make_images(expected)
    kept = [indices.shape[1] for indices in sparse.select(images).indices]
    assert tuple(kept) == sparse.schedule.num_tokens == tuple(stage.num_tokens for stage in sparse.plan.stages)
    assert sparse.schedule.num_patches == sparse.backbone.num_patches == rows * columns
    assert sparse.schedule.ratios == small.schedule.ratios
    if align == 1:
        assert sparse.schedule == expected.schedule
        assert count_macs(sparse, (3, 112, 224)) == count_macs(expected, (3, 112, 224))
    loaded = load(save(sparse, tmp_path))
    assert loaded.plan == sparse.plan
    assert torch.equal(loaded(images), sparse(images))


@pytest.mark.parametrize("name", ["CaiT", "NaFlex, average", "Gemma 4", "LV-ViT, skip_lam 1"])
def test_where_the_size_is_fixed_it_says_how(make_vit, name):
    with pytest.raises(UsageError, match="keeps the image size it was built for") as caught:
        attach(make_vit(**ALL[name])).set_input_size(128)
    assert "timm.create_model" in caught.value.hint


@pytest.mark.parametrize("size", [100, (96, 100), (0, 96)])
def test_a_size_that_patches_do_not_fill_is_refused_and_nothing_changes(make_vit, size):
    sparse = attach(make_vit(img_size=96))
    with pytest.raises(UsageError, match="no multiple of the patch size 16x16"):
        sparse.set_input_size(size)
    assert sparse.grid_size == (6, 6)


# Replicas


def replica_of(module):
    """As torch.nn.parallel.replicate makes it, which wants CUDA: shallow copies whose tensors are no leaves."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replica_of(child))
    for name, parameter in module._parameters.items():
        replica._parameters.pop(name, None)
        setattr(replica, name, None if parameter is None else parameter * 1.0)
    return replica


@pytest.mark.parametrize("predictor", [*KINDS, "attention"])
@pytest.mark.parametrize("name", ["class token", "CaiT", "EVA-02", "lvvit"])
def test_replicas_run_on_their_own_weights(make_vit, make_images, name, predictor):
    sparse = attach(make_vit(**(VIT | OTHERS | {"lvvit": LVVIT})[name]), 0.6, predictor=predictor).eval()
    images, replica = make_images(sparse), replica_of(sparse)
    assert list(replica.parameters()) == []
    assert replica.backbone.model is replica.model
    assert sparse.backbone.model is sparse.model
    assert torch.equal(replica(images), sparse(images))
    if isinstance(sparse, AttentionViT):
        assert replica._recorder is not sparse._recorder
        return
    replica.forward_masked(images, sampled).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in sparse.predictors.parameters()), "of the original"
    for block in replica.model.modules():
        for key, tensor in list(vars(block).items()):
            if torch.is_tensor(tensor):
                setattr(block, key, torch.zeros_like(tensor))
    assert not torch.equal(replica(images), sparse(images)), "its weights count, not the original's"


def test_replicas_warn_as_the_model_does_and_once_together(make_vit, make_images):
    sparse = attach(make_vit()).train()
    images = make_images(sparse)
    with pytest.warns(UserWarning, match="no gradient") as caught:
        [replica_of(sparse)(images) for _ in range(2)]
    assert len(caught) == 1


# Layers that were replaced


@pytest.mark.parametrize("predictor", KINDS)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor")
def test_quantised_layers_are_called(make_vit, make_images, tmp_path, predictor):
    sparse = attach(make_vit(), 0.6, predictor=predictor).eval()
    images = make_images(sparse)
    quantised = torch.ao.quantization.quantize_dynamic(sparse, {nn.Linear})
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert any(isinstance(module, kind) for module in quantised.predictors.modules())
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    expected, scores = sparse.select(images), quantised.select(images).scores
    torch.testing.assert_close(scores[0], expected.scores[0], rtol=0.1, atol=0.1)
    assert not torch.equal(scores[0], expected.scores[0])
    logits = quantised(images)
    assert torch.nn.functional.cosine_similarity(logits, expected.logits).min() > 0.9
    assert quantised.num_classes == 1000
    with pytest.raises(UsageError, match="quantised") as caught:
        save(quantised, tmp_path / "m.safetensors")
    assert "before" in caught.value.hint
    assert not list(tmp_path.iterdir())


class Adapted(nn.Module):
    """A frozen layer with a low-rank addition, as LoRA makes it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def adapt(module):
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Adapted(child))
        else:
            adapt(child)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("predictor", KINDS)
def test_adapters_in_the_place_of_layers_get_gradients(make_vit, make_images, tmp_path, predictor, dtype):
    torch.manual_seed(0)
    sparse = attach(make_vit(), 0.6, predictor=predictor)
    images = make_images(sparse)
    before = sparse.select(images).scores[0]
    adapt(sparse.predictors)
    assert not torch.equal(sparse.select(images).scores[0], before)
    sparse.to(dtype).forward_masked(images.to(dtype), sampled).logits.float().square().sum().backward()
    adapted = [module for module in sparse.predictors.modules() if isinstance(module, Adapted)]
    assert len(adapted) == 3 * (2 if predictor == "light" else 4)
    for layer in adapted:
        assert layer.up.weight.grad.abs().max() > 0
        assert layer.down.weight.grad.abs().max() > 0
        assert layer.base_layer.weight.grad is None
    with pytest.raises(UsageError, match="base_layer") as caught:
        save(sparse, tmp_path / "m.safetensors")
    assert "merge_and_unload" in caught.value.hint


@pytest.mark.parametrize("predictor", KINDS)
def test_hooks_on_a_predictors_layers_act(make_vit, make_images, predictor):
    sparse, called = attach(make_vit(), predictor=predictor), []
    layers = [module for module in sparse.predictors[0].modules() if not list(module.children())]
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    sparse(make_images(sparse))
    assert called == layers


# Training and eval mode, and what a pass can train


@pytest.mark.parametrize("predictor", [*KINDS, "attention"])
@pytest.mark.parametrize("training", [True, False])
def test_attach_keeps_the_mode(make_vit, training, predictor):
    model = make_vit().train(training)
    model.blocks[0].train(not training)
    sparse = attach(model, 0.7, predictor=predictor)
    assert sparse.training is training
    assert all(module.training is training for module in sparse.predictors.modules())
    assert model.blocks[0].training is not training, "what was set apart stays so"


def passes(sparse):
    return [sparse, sparse.forward_masked]


@pytest.mark.parametrize("number", [0, 1])
def test_a_pass_that_cannot_train_predictors_says_so_once_and_how(make_vit, make_images, number):
    sparse = attach(make_vit()).train()
    images = make_images(sparse)
    with pytest.warns(UserWarning, match="gives its predictors no gradient") as caught:
        [passes(sparse)[number](images) for _ in range(3)]
    assert len(caught) == 1
    for way in ("Objective", "forward_masked(images, decide)", "gumbel_decision", ".eval()", "requires_grad_(False)"):
        assert way in str(caught[0].message)
    assert caught[0].filename == __file__ or number


@pytest.mark.parametrize("kind", ["eval", "no grad", "frozen predictors", "sampled", "dense", "attention"])
def test_a_pass_that_is_right_says_nothing(make_vit, make_images, kind):
    model = make_vit()
    sparse = attach(model, 1.0 if kind == "dense" else 0.7, predictor="attention" if kind == "attention" else "light")
    sparse.train(kind != "eval")
    if kind == "frozen predictors":
        sparse.predictors.requires_grad_(False)
    with warnings.catch_warnings(), torch.set_grad_enabled(kind != "no grad"):
        warnings.simplefilter("error")
        if kind == "sampled":
            sparse.forward_masked(make_images(sparse), sampled)
        else:
            sparse(make_images(sparse))


def test_the_sentence_is_true(make_vit, make_images):
    """No gradient by forward; one by what it names."""
    sparse = attach(make_vit()).train()
    images = make_images(sparse)
    with pytest.warns(UserWarning, match="no gradient"):
        sparse(images).sum().backward()
    assert all(parameter.grad is None for parameter in sparse.predictors.parameters())
    sparse.forward_masked(images, sampled).logits.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in sparse.predictors.parameters())


def test_a_model_straight_from_timm_trains(make_images):
    sparse = attach(timm.create_model("test_vit"))
    assert sparse.training
