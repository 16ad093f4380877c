"""Each loss against its formula, written out in float64."""

import math

import pytest
import torch

from vitprune.tokens.losses import distillation_loss, ratio_loss, token_distillation_loss, token_loss

PER_TOKEN = [token_loss, token_distillation_loss]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, seed=0):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6).float()


# Ratio


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_ratio_loss_is_the_mean_over_stages_and_images(num_stages):
    kept = [random_mask(4, 10, seed=stage) for stage in range(num_stages)]
    ratios = [0.7**stage for stage in range(1, num_stages + 1)]
    total = sum(
        (sum(image) / 10 - ratio) ** 2 for mask, ratio in zip(kept, ratios, strict=True) for image in mask.tolist()
    )
    assert ratio_loss(kept, ratios).item() == pytest.approx(total / (num_stages * 4), rel=1e-5)


def test_ratio_loss_punishes_each_image_not_the_batch_mean_and_is_zero_on_target():
    uneven = torch.cat((torch.ones(1, 10), torch.zeros(1, 10)))  # half on average, yet no image keeps half
    assert ratio_loss([uneven], [0.5]).item() == pytest.approx(0.25)
    even = torch.cat((torch.ones(3, 7), torch.zeros(3, 3)), dim=1)
    assert ratio_loss([even], [0.7]).item() == pytest.approx(0, abs=1e-12)


def test_ratio_loss_pushes_every_token_towards_the_target():
    too_many = torch.ones(2, 10, requires_grad=True)
    ratio_loss([too_many], [0.5]).backward()
    assert (too_many.grad > 0).all()


@pytest.mark.parametrize(("stages", "targets"), [(2, 3), (3, 2), (1, 0)])
def test_ratio_loss_refuses_a_target_too_many_or_too_few(stages, targets):
    with pytest.raises(ValueError, match=f"got {stages} stages and {targets} targets"):
        ratio_loss([torch.ones(1, 4)] * stages, [0.5] * targets)


# Distillation


def divergence(student, teacher):
    """KL(teacher || student) of two lists of logits."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    return (p * (p / q).log()).sum().item()


def test_distillation_loss_is_the_divergence_from_teacher_to_student():
    student, teacher = randn(4, 7).requires_grad_(), 2 * randn(4, 7, seed=1)
    loss = distillation_loss(student, teacher)
    assert loss.item() == pytest.approx(sum(map(divergence, student, teacher)) / 4, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 4)
    assert distillation_loss(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-6)


def test_distillation_loss_stays_finite_for_certain_teachers():
    teacher = torch.tensor([[1e4, 0.0, -1e4]])
    assert distillation_loss(torch.zeros(1, 3), teacher).item() == pytest.approx(math.log(3), rel=1e-5)


# Tokens


def squared_error(student, teacher):
    return (student.double() - teacher.double()).square().mean().item()


@pytest.mark.parametrize(("loss", "term"), list(zip(PER_TOKEN, [squared_error, divergence], strict=True)))
def test_loss_per_token_is_the_mean_over_kept_tokens(loss, term):
    student, teacher, kept = randn(3, 8, 5), 2 * randn(3, 8, 5, seed=1), random_mask(3, 8)
    terms = [term(student[b, n], teacher[b, n]) for b, n in kept.nonzero().tolist()]
    assert 0 < len(terms) < 24
    assert loss(student, teacher, kept).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    every = [term(*pair) for pair in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)]
    assert loss(student, teacher).item() == pytest.approx(sum(every) / 24, rel=1e-5)
    torch.testing.assert_close(loss(student, teacher, torch.ones(3, 8)), loss(student, teacher))


@pytest.mark.parametrize("loss", PER_TOKEN)
def test_loss_per_token_ignores_pruned_tokens_and_does_not_reward_dropping(loss):
    student, teacher, kept = randn(3, 8, 5), randn(3, 8, 5, seed=1), random_mask(3, 8)
    for mask in (kept, torch.zeros(3, 8)):
        changed, mask = torch.where(mask[..., None] == 0, 1e3, student).requires_grad_(), mask.requires_grad_()
        value = loss(changed, teacher, mask)
        torch.testing.assert_close(value, loss(student, teacher, mask))
        value.backward()
        assert torch.equal(changed.grad != 0, (mask == 1)[..., None].expand_as(changed))
        assert mask.grad is None
    assert value.item() == 0, "nothing is kept"


# All


@pytest.mark.parametrize("loss", [distillation_loss, *PER_TOKEN])
def test_no_gradient_reaches_the_teacher_and_low_precision_is_compared_in_fp32(loss):
    shape = (2, 5) if loss is distillation_loss else (2, 5, 3)
    student, teacher = randn(*shape).requires_grad_(), randn(*shape, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()
    low = student.bfloat16(), teacher.bfloat16()
    assert loss(*low).dtype == torch.float32
    assert torch.equal(loss(*low), loss(low[0].float(), low[1].float()))
