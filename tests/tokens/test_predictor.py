"""The token predictor: size, symmetry, the kept set, precision."""

import copy

import pytest
import torch

from vitprune.tokens.predictor import TokenPredictor
from vitprune.tokens.selection import keep_scores


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    return TokenPredictor(32)


@pytest.fixture
def tokens():
    return torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1))


def mask_of(*rows, width=20):
    kept = torch.zeros(len(rows), width)
    for row, indices in zip(kept, rows, strict=True):
        row[list(indices)] = 1
    return kept


@pytest.mark.parametrize(
    ("embed_dim", "count"), [(192, 60_722), (256, 107_586), (384, 241_250), (512, 428_162), (768, 961_730)]
)
def test_parameter_count_is_the_papers(embed_dim, count):
    with torch.device("meta"):
        predictor = TokenPredictor(embed_dim)
    assert sum(parameter.numel() for parameter in predictor.parameters()) == count


def test_output_is_the_formula_of_section_3_2(predictor, tokens):
    predictor, x = predictor.double(), tokens.double()
    kept = mask_of([0, 3, 4], range(20), [19]).double()
    norm, embed = predictor.in_proj[0], predictor.in_proj[1]
    first, second, third = (predictor.out_proj[index] for index in (0, 2, 4))

    def gelu(t):
        return t * 0.5 * (1 + torch.erf(t / 2**0.5))

    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    normed = (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
    z = gelu(normed @ embed.weight.T + embed.bias)
    local, shared = z[..., :16], z[..., 16:]
    pooled = torch.stack([shared[b, kept[b] == 1].mean(0) for b in range(3)])[:, None].expand(-1, 20, -1)
    z = torch.cat([local, pooled], dim=-1)
    z = gelu(z @ first.weight.T + first.bias)
    z = gelu(z @ second.weight.T + second.bias)
    z = z @ third.weight.T + third.bias
    torch.testing.assert_close(predictor(x, kept), z - z.exp().sum(-1, keepdim=True).log(), rtol=1e-12, atol=1e-12)


def test_scores_of_logits_and_of_log_probabilities_rank_alike(predictor, tokens):
    logits, log_pi = predictor.logits(tokens), predictor(tokens)
    torch.testing.assert_close(keep_scores(log_pi), keep_scores(logits))
    assert torch.equal(keep_scores(logits).argsort(dim=1), log_pi[..., 1].argsort(dim=1))


def test_certain_tokens_are_still_told_apart():
    logits = torch.tensor([[[-20.0, 20.0], [-30.0, 20.0], [-25.0, 20.0]]])
    log_pi = logits.log_softmax(dim=-1)
    assert log_pi[..., 1].unique().numel() == 1, "to fp32 all are certain"
    assert keep_scores(logits).argsort(dim=1).tolist() == keep_scores(log_pi).argsort(dim=1).tolist() == [[0, 2, 1]]


def test_masked_and_gathered_tokens_score_alike(predictor, tokens):
    chosen = [0, 2, 3, 11, 19]
    kept = mask_of(*[chosen] * 3)
    torch.testing.assert_close(predictor(tokens, kept)[:, chosen], predictor(tokens[:, chosen]))
    torch.testing.assert_close(predictor(tokens, torch.ones(3, 20)), predictor(tokens))
    assert torch.equal(predictor(tokens, kept.bfloat16()), predictor(tokens, kept))


def test_an_empty_set_gives_finite_scores_and_gradients(predictor, tokens):
    kept = mask_of([], [], [1]).requires_grad_()
    tokens.requires_grad_()
    log_pi = predictor(tokens, kept)
    log_pi[..., 1].sum().backward()
    assert log_pi.isfinite().all()
    for tensor in (tokens, kept, *predictor.parameters()):
        assert tensor.grad.isfinite().all()


def test_the_mask_receives_a_gradient(predictor, tokens):
    kept = mask_of(range(5), range(10), range(15)).requires_grad_()
    predictor(tokens, kept)[..., 1].sum().backward()
    assert (kept.grad != 0).all()


def test_scores_are_fp32_and_unchanged_under_bf16_autocast(predictor, tokens):
    expected = predictor(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(tokens, torch.ones(1, 32)).dtype == torch.bfloat16  # autocast is on
        log_pi = predictor(tokens)
    assert log_pi.dtype == torch.float32
    assert torch.equal(log_pi, expected)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_casting_a_model_to_half_precision_leaves_its_predictors_in_fp32(predictor, tokens, cast):
    before = copy.deepcopy(predictor.state_dict())
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), predictor)
    cast(model)
    assert model[0].weight.dtype.itemsize == 2
    for name, parameter in predictor.state_dict().items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name
    assert predictor(tokens).dtype == torch.float32
    predictor.to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in predictor.parameters()} == {("meta", torch.float32)}


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
def test_of_low_precision_tokens_only_the_inner_products_are_in_it(predictor, tokens, dtype, error):
    low = tokens.to(dtype)
    log_pi, expected = predictor(low), predictor(low.float())
    assert log_pi.dtype == torch.float32
    torch.testing.assert_close(log_pi, expected, atol=error, rtol=0)
    assert not torch.equal(log_pi, expected), "or nothing is gained"
    assert log_pi[..., 1].unique().numel() == expected[..., 1].unique().numel(), "scores do not tie"


def test_double_is_float64(predictor, tokens):
    reference = copy.deepcopy(predictor)
    predictor.double()
    assert {parameter.dtype for parameter in predictor.parameters()} == {torch.float64}
    log_pi = predictor(tokens.double())
    assert log_pi.dtype == torch.float64
    torch.testing.assert_close(log_pi.float(), reference(tokens))
    assert not torch.equal(log_pi, log_pi.float().double())  # not fp32 in disguise


@pytest.mark.parametrize("embed_dim", [1, 30, 193])
def test_a_width_that_is_no_multiple_of_4_is_refused(embed_dim):
    with pytest.raises(ValueError, match=f"multiple of 4, got {embed_dim}"):
        TokenPredictor(embed_dim)
