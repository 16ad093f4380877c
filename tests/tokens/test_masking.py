"""Sampled decisions and the attention gate, against the paper's formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from vitprune.tokens.masking import GATE_EPS, attention_bias, gumbel_decision, key_bias


def random_log_pi(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 2, generator=generator, dtype=dtype).log_softmax(-1)


# Sampling


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_decision_is_torchs_gumbel_softmax_bit_for_bit(tau):
    log_pi = random_log_pi(16, 196)
    torch.manual_seed(7)
    expected = F.gumbel_softmax(log_pi, tau=tau, hard=True)[..., 1]
    torch.manual_seed(7)
    assert torch.equal(gumbel_decision(log_pi, tau), expected.round())  # torch's own is off by an ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_exactly_zero_or_one(dtype):
    for tau in (0.1, 1.0, 5.0):
        decision = gumbel_decision(random_log_pi(32, 500, dtype=torch.float64).to(dtype), tau)
        assert decision.dtype == dtype
        assert decision.unique().tolist() == [0, 1]


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_gradient_is_that_of_the_soft_sample(tau):
    log_pi = random_log_pi(4, 30, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    (gradient,) = torch.autograd.grad((gumbel_decision(log_pi, tau) * upstream).sum(), log_pi)
    torch.manual_seed(5)
    gumbel = -torch.empty_like(log_pi).exponential_().log()
    soft = ((log_pi + gumbel) / tau).softmax(-1)[..., 1]
    (expected,) = torch.autograd.grad((soft * upstream).sum(), log_pi)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert (gradient != 0).all()


# The gate

PREFIX, PATCHES, HEADS, WIDTH = 2, 9, 2, 4


def attention_inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, upstream = torch.randn(4, 3, HEADS, PREFIX + PATCHES, WIDTH, generator=generator, dtype=torch.float64)
    kept = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1], [1] * 9, [0] * 9], dtype=torch.float64)
    return tuple(tensor.to(dtype) for tensor in (q, k, v, upstream, kept))


def papers_attention(q, k, v, kept, eps):
    """G of section 3.3: 1 on the diagonal and for prefix tokens, else D-hat of the key; eps on what is gated."""
    rows = F.pad(kept, (PREFIX, 0), value=1.0)[:, None, None, :] + eps
    gate = torch.where(torch.eye(PREFIX + PATCHES, dtype=torch.bool), 1.0, rows)
    weight = (q @ k.transpose(-2, -1) / WIDTH**0.5).exp() * gate
    return weight / weight.sum(-1, keepdim=True) @ v


def gated_attention(q, k, v, kept):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias(kept, PREFIX).to(q.dtype))


def output_and_gradient(attend, inputs, *eps):
    """Also the gradient with respect to D-hat."""
    q, k, v, upstream, kept = inputs
    kept = kept.clone().requires_grad_()
    out = attend(q, k, v, kept, *eps)
    (gradient,) = torch.autograd.grad((out * upstream).sum(), kept)
    return out.detach(), gradient


def test_gate_gives_output_and_gradient_of_the_papers_formula_for_kept_and_pruned_tokens():
    """A prefix key is biased by log(1 + eps) instead of 0, and the pure formula has no eps at all: both are 1e-6."""
    inputs = attention_inputs()
    kept, (out, gradient) = inputs[-1], output_and_gradient(gated_attention, inputs)
    for eps, strict, loose in ((GATE_EPS, 1e-12, 1e-10), (0.0, 1e-4, 1e-3)):
        expected, slopes = output_and_gradient(papers_attention, inputs, eps)
        torch.testing.assert_close(out, expected, rtol=strict, atol=strict)
        torch.testing.assert_close(gradient, slopes, rtol=loose, atol=strict)
    assert kept.unique().tolist() == [0, 1]
    assert (gradient.abs() > 1e-3).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_gradient_survives_low_precision(dtype, tolerance):
    _, gradient = output_and_gradient(gated_attention, attention_inputs(dtype))
    _, expected = output_and_gradient(papers_attention, attention_inputs(), GATE_EPS)
    kept = attention_inputs()[-1]
    for group in (kept == 1, kept == 0):
        error = (gradient[group].double() - expected[group]).norm() / expected[group].norm()
        assert error < tolerance


def test_a_pruned_token_still_attends_to_itself():
    bias = attention_bias(torch.zeros(1, 4), num_prefix_tokens=1)[0, 0]
    assert (bias.diagonal() == 0).all()
    off_diagonal = bias[1:, 1:][~torch.eye(4, dtype=torch.bool)]
    torch.testing.assert_close(off_diagonal, torch.full_like(off_diagonal, GATE_EPS).log())


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_prefix_tokens_are_never_masked_and_kept_ones_hardly(prefix):
    assert attention_bias(torch.ones(2, 6), prefix).abs().max() < 2 * GATE_EPS
    bias = attention_bias(torch.zeros(2, 6), prefix)
    assert bias.shape == (2, 1, 6 + prefix, 6 + prefix)
    assert bias[..., :prefix].abs().sum() <= prefix * 12 * 2e-6 * (6 + prefix)
    assert (bias[:, :, :prefix, prefix:] < -10).all()  # the class token does not see pruned tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_is_computed_in_fp32_at_least(dtype):
    kept = torch.tensor([[1.0, 0.0]], dtype=dtype)
    assert key_bias(kept).dtype == torch.float32
    assert torch.equal(key_bias(kept.double()), (kept.double() + 1e-6).log())
    assert torch.equal(key_bias(kept), key_bias(kept.float()))
    assert attention_bias(kept.double()).dtype == torch.float64
