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


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_sampling_frequency_matches_pi_at_any_temperature(tau):
    keep = torch.tensor([0.02, 0.3, 0.5, 0.77, 0.99])
    samples = 100_000
    log_pi = torch.stack((1 - keep, keep), dim=-1).log().expand(samples, -1, -1)
    torch.manual_seed(0)
    frequency = gumbel_decision(log_pi, tau).mean(dim=0)
    assert ((frequency - keep).abs() < 5 * (keep * (1 - keep) / samples).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_values_are_exactly_zero_or_one(dtype, tau):
    torch.manual_seed(0)
    decision = gumbel_decision(random_log_pi(32, 500, dtype=torch.float64).to(dtype), tau)
    assert decision.dtype == dtype
    assert ((decision == 0) | (decision == 1)).all()
    assert 0 < decision.float().mean() < 1


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
    kept = torch.tensor(
        [[1, 0, 1, 1, 0, 0, 1, 0, 1], [1] * 9, [0] * 9],
        dtype=torch.float64,
    )
    return tuple(tensor.to(dtype) for tensor in (q, k, v, upstream, kept))


def gate_of(kept, eps, prefix=PREFIX):
    """G of section 3.3: 1 on the diagonal and for prefix tokens, else D-hat of the key; eps on what is gated."""
    batch, patches = kept.shape
    total = prefix + patches
    rows = torch.cat((torch.ones(batch, prefix, dtype=kept.dtype), kept), dim=1)[:, None, :].expand(-1, total, -1)
    return torch.where(torch.eye(total, dtype=torch.bool), torch.ones_like(rows), rows + eps)[:, None]


def papers_attention(q, k, v, gate):
    weight = (q @ k.transpose(-2, -1) / WIDTH**0.5).exp() * gate
    return weight / weight.sum(-1, keepdim=True) @ v


def output_and_gradient(attend, kept, upstream):
    kept = kept.clone().requires_grad_()
    out = attend(kept)
    (gradient,) = torch.autograd.grad((out * upstream).sum(), kept)
    return out.detach(), gradient


@pytest.fixture
def gated():
    """Output and gradient with respect to D-hat: ours through fused attention, and the paper's formula."""
    q, k, v, upstream, kept = attention_inputs()

    def ours(kept):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias(kept, PREFIX))

    def exact(kept):
        return papers_attention(q, k, v, gate_of(kept, GATE_EPS))

    def pure(kept):
        return papers_attention(q, k, v, gate_of(kept, 0.0))

    return kept, {
        name: output_and_gradient(attend, kept, upstream)
        for name, attend in {"ours": ours, "exact": exact, "pure": pure}.items()
    }


def test_gate_gives_the_output_of_the_papers_formula(gated):
    _, results = gated
    # A prefix key is biased by log(1 + eps) instead of 0, and the pure formula has no eps at all: both are 1e-6.
    torch.testing.assert_close(results["ours"][0], results["exact"][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results["ours"][0], results["pure"][0], rtol=1e-4, atol=1e-4)


def test_gate_gives_the_gradient_of_the_papers_formula_for_kept_and_dropped_tokens(gated):
    kept, results = gated
    for wanted in (kept == 1, kept == 0):
        assert wanted.any()
        torch.testing.assert_close(results["ours"][1][wanted], results["exact"][1][wanted], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(results["ours"][1][wanted], results["pure"][1][wanted], rtol=1e-3, atol=1e-4)
        assert (results["ours"][1][wanted].abs() > 1e-3).all()


def test_a_clamped_gate_would_leave_dropped_tokens_without_gradient():
    q, k, v, upstream, kept = attention_inputs()

    def clamped(kept):
        bias = F.pad(kept, (PREFIX, 0), value=1.0).clamp(min=GATE_EPS).log()[:, None, None, :]
        bias = bias.masked_fill(torch.eye(PREFIX + PATCHES, dtype=torch.bool), 0.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    out, gradient = output_and_gradient(clamped, kept, upstream)
    torch.testing.assert_close(out, papers_attention(q, k, v, gate_of(kept, 0.0)), rtol=1e-4, atol=1e-4)
    assert (gradient[kept == 0] == 0).all()  # so the two gradient tests above have teeth
    assert (gradient[kept == 1] != 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_gradient_survives_low_precision(gated, dtype, tolerance):
    kept, results = gated
    q, k, v, upstream, _ = attention_inputs(dtype)

    def ours(kept):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias(kept, PREFIX).to(dtype))

    _, gradient = output_and_gradient(ours, kept.to(dtype), upstream)
    expected = results["exact"][1]
    for wanted in (kept == 1, kept == 0):
        error = (gradient[wanted].double() - expected[wanted]).norm() / expected[wanted].norm()
        assert error < tolerance


def test_dropped_tokens_get_no_attention_from_others():
    q, k, _, _, kept = attention_inputs()
    total = PREFIX + PATCHES
    eye = torch.eye(total, dtype=torch.float64).expand(3, HEADS, -1, -1)
    attention = F.scaled_dot_product_attention(q, k, eye, attn_mask=attention_bias(kept, PREFIX))
    dropped = F.pad(kept, (PREFIX, 0), value=1.0) == 0
    columns = attention.transpose(2, 3).masked_fill(torch.eye(total, dtype=torch.bool), 0.0)  # (B, H, key, query)
    assert columns.transpose(1, 2)[dropped].max() < 1e-3
    assert columns.transpose(1, 2)[~dropped].amax(-1).min() > 1e-2


def test_a_dropped_token_still_attends_to_itself():
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
    assert (bias[:, :, :prefix, prefix:] < -10).all()  # the class token does not see dropped tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_is_computed_in_fp32_at_least(dtype):
    kept = torch.tensor([[1.0, 0.0]], dtype=dtype)
    assert key_bias(kept).dtype == torch.float32
    assert torch.equal(key_bias(kept.double()), (kept.double() + 1e-6).log())
    assert torch.equal(key_bias(kept), key_bias(kept.float()))
    assert attention_bias(kept.double()).dtype == torch.float64
