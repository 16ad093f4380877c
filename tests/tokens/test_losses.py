"""Each loss against its formula, written out in float64."""

import math

import pytest
import torch

from vitprune.tokens import distillation_loss, ratio_loss, token_distillation_loss, token_loss


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


def test_ratio_loss_does_not_depend_on_the_number_of_equal_stages():
    mask = random_mask(4, 10)
    one = ratio_loss([mask], [0.3])
    torch.testing.assert_close(ratio_loss([mask] * 7, [0.3] * 7), one)


def test_ratio_loss_punishes_each_image_not_the_batch_mean():
    mask = torch.cat((torch.ones(1, 10), torch.zeros(1, 10)))  # half on average, yet no image keeps half
    assert ratio_loss([mask], [0.5]).item() == pytest.approx(0.25)


def test_ratio_loss_is_zero_on_target():
    mask = torch.zeros(3, 10)
    mask[:, :7] = 1
    assert ratio_loss([mask], [0.7]).item() == pytest.approx(0, abs=1e-12)


def test_ratio_loss_pushes_every_token_towards_the_target():
    too_many = torch.ones(2, 10, requires_grad=True)
    ratio_loss([too_many], [0.5]).backward()
    assert (too_many.grad > 0).all()


@pytest.mark.parametrize(("stages", "targets"), [(2, 3), (3, 2), (1, 0)])
def test_ratio_loss_refuses_a_target_too_many_or_too_few(stages, targets):
    with pytest.raises(ValueError, match=f"got {stages} stages and {targets} targets"):
        ratio_loss([torch.ones(1, 4)] * stages, [0.5] * targets)


# Distillation


def test_distillation_loss_is_the_divergence_from_teacher_to_student():
    student, teacher = randn(4, 7), 2 * randn(4, 7, seed=1)
    total = 0.0
    for s, t in zip(student.double(), teacher.double(), strict=True):
        q, p = s.exp() / s.exp().sum(), t.exp() / t.exp().sum()
        total += (p * (p / q).log()).sum().item()
    assert distillation_loss(student, teacher).item() == pytest.approx(total / 4, rel=1e-5)


def test_distillation_loss_is_zero_for_equal_logits_up_to_a_shift():
    logits = randn(4, 7)
    assert distillation_loss(logits + 3, logits).item() == pytest.approx(0, abs=1e-6)


def test_distillation_gradient_is_softmax_student_minus_softmax_teacher():
    student, teacher = randn(4, 7).requires_grad_(), randn(4, 7, seed=1)
    distillation_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 4)


def test_distillation_loss_stays_finite_for_certain_teachers():
    teacher = torch.tensor([[1e4, 0.0, -1e4]])
    assert distillation_loss(torch.zeros(1, 3), teacher).item() == pytest.approx(math.log(3), rel=1e-5)


# Tokens


def test_token_loss_is_the_mean_squared_error_over_kept_tokens():
    student, teacher, kept = randn(3, 8, 5), randn(3, 8, 5, seed=1), random_mask(3, 8)
    errors = [
        ((student[b, n].double() - teacher[b, n].double()) ** 2).mean().item()
        for b in range(3)
        for n in range(8)
        if kept[b, n]
    ]
    assert 0 < len(errors) < 24
    assert token_loss(student, teacher, kept).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_token_loss_without_mask_counts_every_token():
    student, teacher = randn(3, 8, 5), randn(3, 8, 5, seed=1)
    expected = ((student.double() - teacher.double()) ** 2).mean().item()
    assert token_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(token_loss(student, teacher, torch.ones(3, 8)), token_loss(student, teacher))


def test_token_loss_ignores_dropped_tokens():
    student, teacher, kept = randn(3, 8, 5), randn(3, 8, 5, seed=1), random_mask(3, 8)
    changed = torch.where(kept[..., None] == 0, 1e3, student).requires_grad_()
    loss = token_loss(changed, teacher, kept)
    torch.testing.assert_close(loss, token_loss(student, teacher, kept))
    loss.backward()
    assert (changed.grad[kept == 0] == 0).all()
    assert (changed.grad[kept == 1] != 0).all()


def test_token_loss_is_zero_and_finite_when_nothing_is_kept():
    student = randn(2, 4, 3).requires_grad_()
    loss = token_loss(student, randn(2, 4, 3, seed=1), torch.zeros(2, 4))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_token_loss_does_not_reward_dropping_tokens():
    student, kept = randn(2, 4, 3).requires_grad_(), torch.ones(2, 4, requires_grad=True)
    token_loss(student, randn(2, 4, 3, seed=1), kept).backward()
    assert kept.grad is None


# Tokens' own answers


def test_token_distillation_loss_is_the_mean_divergence_of_kept_tokens():
    student, teacher, kept = randn(3, 8, 5), 2 * randn(3, 8, 5, seed=1), random_mask(3, 8)
    terms = []
    for b, n in kept.nonzero().tolist():
        q, p = student[b, n].double().softmax(-1), teacher[b, n].double().softmax(-1)
        terms.append((p * (p / q).log()).sum().item())
    assert 0 < len(terms) < 24
    assert token_distillation_loss(student, teacher, kept).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_token_distillation_loss_without_mask_is_the_distillation_loss_of_all_rows():
    student, teacher = randn(3, 8, 5), randn(3, 8, 5, seed=1)
    expected = distillation_loss(student.flatten(0, 1), teacher.flatten(0, 1))
    torch.testing.assert_close(token_distillation_loss(student, teacher), expected)


def test_token_distillation_loss_ignores_dropped_tokens():
    student, teacher, kept = randn(3, 8, 5), randn(3, 8, 5, seed=1), random_mask(3, 8)
    changed = torch.where(kept[..., None] == 0, 1e3, student).requires_grad_()
    loss = token_distillation_loss(changed, teacher, kept)
    torch.testing.assert_close(loss, token_distillation_loss(student, teacher, kept))
    loss.backward()
    assert (changed.grad[kept == 0] == 0).all()
    assert token_distillation_loss(student, teacher, torch.zeros(3, 8)) == 0


# All


@pytest.mark.parametrize("loss", [distillation_loss, token_loss, token_distillation_loss])
def test_no_gradient_reaches_the_teacher(loss):
    shape = (2, 5) if loss is distillation_loss else (2, 5, 3)
    student, teacher = randn(*shape).requires_grad_(), randn(*shape, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


@pytest.mark.parametrize("loss", [distillation_loss, token_loss, token_distillation_loss])
def test_low_precision_inputs_are_compared_in_fp32(loss):
    shape = (2, 5) if loss is distillation_loss else (2, 5, 3)
    student, teacher = randn(*shape).bfloat16(), randn(*shape, seed=1).bfloat16()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student.float(), teacher.float()))
