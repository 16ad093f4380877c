"""What a step minimises."""

import copy

import pytest
import torch

from vitprune import LossWeights, Objective, Recipe, attach
from vitprune.errors import UsageError
from vitprune.tokens.losses import distillation_loss, ratio_loss, token_loss

PAPER = LossWeights(ce=1, ratio=2, kl=0.5, pooled=0, token=0.5)


@pytest.fixture
def batch(make_images, make_vit):
    return make_images(make_vit(), count=4), torch.tensor([1, 2, 3, 4])


@pytest.fixture
def build(make_vit):
    def build(weights=None, pruned="drop", **settings):
        model = make_vit()
        recipe = Recipe(**{"weights": weights or PAPER, "train_trunk": True, **settings})
        return Objective(attach(copy.deepcopy(model), pruned=pruned), attach(model, 1.0), recipe)

    return build


def test_what_is_no_student_teacher_or_phase_is_said_at_once(build, batch, make_vit):
    model, recipe = make_vit(), Recipe()
    for student, teacher, words in (
        (attach(copy.deepcopy(model), 0.5), model, "the teacher is a VisionTransformer, not a SparseViT"),
        (model, attach(model, 1.0), "the student is a VisionTransformer"),
        (attach(model, 0.5), attach(model, 1.0), "student and teacher share a backbone"),
        (torch.compile(attach(copy.deepcopy(model), 0.5)), attach(model, 1.0), "the student is compiled"),
        (attach(copy.deepcopy(model)), torch.nn.DataParallel(attach(model, 1.0)), "teacher is wrapped in DataParallel"),
    ):
        with pytest.raises(UsageError, match=words):
            Objective(student, teacher, recipe)
    with pytest.raises(UsageError, match="phase is 'finetune'") as caught:
        build()(*batch, "finetune")
    assert "pretraining, sampled, deployed" in caught.value.hint


def test_the_teacher_is_no_part_of_it_but_moves_along(build):
    """Several processes must not wrap it."""
    objective = build()
    teachers = {id(parameter) for parameter in objective.teacher.parameters()}
    assert not teachers & {id(parameter) for parameter in objective.parameters()}
    assert not any("teacher" in name for name in objective.state_dict())
    objective.to(torch.float64)
    assert {parameter.dtype for parameter in objective.teacher.parameters()} == {torch.float64}
    assert objective.train().student.training
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())
    assert not objective.teacher.training


def test_pretraining_trains_predictors_alone(build, batch):
    objective = build()
    objective.student.model.requires_grad_(False)
    loss = objective(*batch, "pretraining")
    loss.total.backward()
    assert set(loss.components) == {"rank"}
    assert all(p.grad is not None for p in objective.student.predictors.parameters())
    assert all(p.grad is None for p in objective.student.model.parameters())


@pytest.mark.parametrize(
    ("phase", "names"),
    [("sampled", {"ce", "kl", "pooled", "token", "ratio"}), ("deployed", {"ce", "kl", "pooled", "token"})],
)
def test_total_is_the_weighted_sum_of_the_named_components(build, batch, phase, names):
    weights = LossWeights(ce=1.5, ratio=3, kl=0.7, pooled=0.4, token=0.2)
    loss = build(weights)(*batch, phase)
    assert set(loss.components) == names
    expected = sum(getattr(weights, name) * value for name, value in loss.components.items())
    torch.testing.assert_close(loss.total.detach(), expected)


def test_sampled_components_are_the_pure_losses(build, batch):
    objective = build()
    images, labels = batch
    torch.manual_seed(1)
    loss = objective(images, labels, "sampled")
    torch.manual_seed(1)
    out = objective.student.forward_masked(images, objective._decide(1.0, (0, 4)))
    teacher = objective.teacher.select(images)
    expected = {
        "ce": torch.nn.functional.cross_entropy(out.logits, labels),
        "kl": distillation_loss(out.logits, teacher.logits),
        "token": token_loss(out.features, teacher.features, out.kept[-1], relative=True),
        "ratio": ratio_loss(out.kept, objective.student.schedule.ratios),
    }
    for name, value in expected.items():
        torch.testing.assert_close(loss.components[name], value.detach())
    torch.testing.assert_close(loss.kept_ratios, torch.stack([mask.mean() for mask in out.kept]).detach())


def test_sampled_gradient_reaches_predictors_and_backbone(build, batch):
    objective = build()
    objective(*batch, "sampled").total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.student.predictors.parameters())
    assert all(b.attn.qkv.weight.grad.abs().sum() > 0 for b in objective.student.model.blocks)
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_deployed_tokens_are_compared_at_their_own_positions(build, batch):
    objective = build()
    images, labels = batch
    loss = objective(images, labels, "deployed")
    out = objective.student.select(images)
    teacher = objective.teacher.select(images).features
    rows = torch.stack([teacher[i, indices] for i, indices in enumerate(out.indices[-1])])
    expected = ((out.features - rows).square().mean(dim=(1, 2)) / rows.square().mean(dim=(1, 2))).mean()
    torch.testing.assert_close(loss.components["token"], expected.detach())


def test_token_loss_is_absolute_where_the_recipe_says_so(build, batch):
    objective = build()
    features = torch.randn(2, 5, 8)
    relative = objective._token_loss(30 * features, 10 * features)
    objective.recipe = Recipe(relative_token_loss=False)
    absolute = objective._token_loss(30 * features, 10 * features)
    torch.testing.assert_close(relative, torch.tensor(4.0))
    torch.testing.assert_close(absolute, 400 * features.square().mean())


def test_losses_of_weight_zero_are_not_computed(build, batch):
    for phase, expected in (("deployed", {"kl"}), ("sampled", {"kl", "ratio"})):
        assert set(build(LossWeights(ce=0, pooled=0, token=0))(*batch, phase).components) == expected


def test_pooled_loss_is_the_relative_error_of_what_the_classifier_reads(build, batch):
    objective = build(LossWeights(pooled=1))
    loss = objective(*batch, "deployed").components["pooled"]
    own, teachers = (model.select(batch[0]).pooled for model in (objective.student, objective.teacher))
    torch.testing.assert_close(
        teachers,
        objective.teacher.model.forward_head(objective.teacher.model.forward_features(batch[0]), pre_logits=True),
    )
    expected = ((own - teachers).square().sum(1) / teachers.square().sum(1)).mean()
    torch.testing.assert_close(loss, expected.detach())


def test_merged_tokens_are_compared_with_the_mean_of_those_that_they_stand_for(build, batch):
    objective = build(pruned="merge")
    loss = objective(*batch, "deployed").components["token"]
    out = objective.student.select(batch[0])
    teacher = objective.teacher.select(batch[0]).features
    owners, terms = out.owners(), []
    for image in range(4):
        for row in range(out.features.shape[1]):
            target = teacher[image, owners[image] == row].mean(dim=0)
            terms.append((out.features[image, row] - target).square().mean())
    counterparts = objective._counterparts(out, teacher)
    expected = torch.stack(terms).view(4, -1).mean(1) / counterparts.square().mean(dim=(1, 2))
    torch.testing.assert_close(loss, expected.mean().detach())
    members = [(owners == row).sum(1) for row in range(out.features.shape[1])]
    assert torch.equal(torch.stack(members, dim=1).float(), out.sizes), "each patch is part of one token"


def shaken(model, blocks, scale=0.3):
    """Other weights in the patch embedding and the blocks, past the versions of tensors."""
    generator = torch.Generator().manual_seed(3)
    for part in (model.patch_embed, *(model.blocks[block] for block in blocks)):
        for parameter in part.parameters():
            parameter.data += (
                scale * parameter.std().nan_to_num(0.1) * torch.randn(parameter.shape, generator=generator)
            )


@pytest.mark.parametrize("when", ["before", "later", "one number"])
@pytest.mark.parametrize("phase", ["sampled", "deployed"])
def test_a_student_with_another_trunk_is_measured_by_its_own(build, batch, phase, when):
    """By the divergence of what it answers from what the teacher does, which no trunk is shared in."""
    objective, (images, labels) = build(train_trunk=False), batch
    torch.manual_seed(1)
    taught = (objective if when == "later" else build(train_trunk=False))(images, labels, phase).components["kl"]
    if when == "one number":
        objective.student.model.pos_embed.data[0, 0, 5] += 100.0
    else:
        shaken(objective.student.model, [0])
    assert not objective.shares_trunk
    torch.manual_seed(1)
    loss = objective(images, labels, phase)
    torch.manual_seed(1)
    if phase == "sampled":
        logits = objective.student.forward_masked(images, objective._decide(1.0, (0, 4))).logits
    else:
        logits = objective.student(images)
    true = distillation_loss(logits, objective.teacher(images))
    torch.testing.assert_close(loss.components["kl"], true.detach())
    assert not torch.isclose(true, taught, rtol=0.05)
    loss.total.backward()
    assert objective.student.model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0, "its trunk may train"


def test_pretraining_ranks_the_tokens_of_the_students_own_trunk(build, batch):
    objective = build(train_trunk=False)
    shared = objective(batch[0], phase="pretraining").total
    shaken(objective.student.model, [0])
    own = objective(batch[0], phase="pretraining").total
    scores = objective.student.select(batch[0]).scores
    seen = []
    objective.student.predictors[0].register_forward_hook(lambda *args: seen.append(args[2]))
    objective(batch[0], phase="pretraining").total.backward()
    torch.testing.assert_close(seen[0], scores[0])
    assert not torch.equal(shared, own)
    assert objective.student.model.patch_embed.proj.weight.grad is None


@pytest.mark.parametrize("change", ["loaded", "stepped", "teacher", "buffer", "dtype", "replaced"])
def test_whatever_changes_a_trunk_is_noticed(build, change):
    objective = build()
    assert objective.shares_trunk
    student, teacher = objective.student.model, objective.teacher.model
    if change == "loaded":
        state = student.state_dict()
        student.load_state_dict(state | {"cls_token": state["cls_token"] + 1})
    elif change == "stepped":
        student.blocks[0].norm1.bias.grad = torch.ones(64)
        torch.optim.SGD(student.blocks[0].norm1.parameters(), lr=1e-3).step()
    elif change == "teacher":
        teacher.blocks[0].mlp.fc2.weight.data.mul_(1.001)
    elif change == "buffer":
        student.blocks[0].register_buffer("more", torch.ones(1))
    elif change == "dtype":
        student.blocks[0].double()
    else:
        student.blocks[0].mlp.fc1 = torch.nn.Sequential(student.blocks[0].mlp.fc1)
    assert not objective.shares_trunk


def test_what_changes_behind_the_trunk_does_not_matter(build):
    objective = build()
    shaken_before = objective.first_block
    for block in objective.student.model.blocks[shaken_before:]:
        block.mlp.fc2.weight.data.mul_(2)
    objective.student.reset_classifier(7)
    assert objective.shares_trunk


@pytest.mark.parametrize("phase", ["sampled", "deployed"])
@pytest.mark.parametrize("pruned", ["drop", "merge"])
def test_a_trunk_that_does_not_train_is_computed_once_and_changes_nothing(build, batch, phase, pruned, monkeypatch):
    whole, shared = (build(pruned=pruned, train_trunk=trunk) for trunk in (True, False))
    shared.load_state_dict(whole.state_dict())
    calls = []
    embed = type(shared.teacher.backbone).embed
    monkeypatch.setattr(type(shared.teacher.backbone), "embed", lambda *args: calls.append(1) or embed(*args))
    torch.manual_seed(0)
    expected = whole(*batch, phase)
    assert len(calls) == 2
    torch.manual_seed(0)
    loss = shared(*batch, phase)
    assert len(calls) == 3
    torch.testing.assert_close(loss.total, expected.total)


def test_mixed_labels_are_probabilities(build, batch):
    images, labels = batch
    objective = build()
    hard = objective(images, labels, "deployed")
    soft = objective(images, torch.nn.functional.one_hot(labels, 1000).float(), "deployed")
    torch.testing.assert_close(hard.components["ce"], soft.components["ce"])


def test_without_labels_labels_do_not_matter(build, batch):
    images, labels = batch
    for objective in (build(labels=False), build(LossWeights(ce=0))):
        for phase in ("sampled", "deployed", "pretraining"):
            totals = []
            for given in (labels, torch.full_like(labels, -1), None):
                torch.manual_seed(0)
                loss = objective(images, given, phase)
                assert "ce" not in loss.components
                totals.append(loss.total.item())
            torch.manual_seed(0)
            totals.append(objective(images, phase=phase).total.item())
            assert len(set(totals)) == 1
    assert build()(images, phase="pretraining").total.isfinite()
    for phase in ("sampled", "deployed"):
        with pytest.raises(UsageError, match=r"labels are needed: weights\.ce is 1") as caught:
            build()(images, phase=phase)
        assert "labels=False" in caught.value.hint


@pytest.mark.parametrize("phase", ["sampled", "pretraining"])
@pytest.mark.parametrize("kind", ["attention", "dense"])
def test_a_phase_without_anything_to_train_is_refused(make_vit, batch, kind, phase):
    student = attach(make_vit(), 1.0) if kind == "dense" else attach(make_vit(), predictor="attention")
    objective = Objective(student, attach(make_vit(), 1.0), Recipe())
    with pytest.raises(UsageError, match=f"no predictors to train in the phase '{phase}'"):
        objective(batch[0], phase=phase)
    objective(batch[0], phase="deployed").total.backward()
    assert student.model.blocks[-1].mlp.fc2.weight.grad.abs().sum() > 0
