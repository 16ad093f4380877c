"""The token predictor: size, symmetry, the kept set, precision."""

import copy

import pytest
import torch

from vitprune.tokens.predictor import PREDICTORS, LightPredictor, TokenPredictor
from vitprune.tokens.selection import log_probabilities


@pytest.fixture(params=[name for name in PREDICTORS if name != "norm"])  # which has nothing to train
def predictor(request):
    torch.manual_seed(0)
    return PREDICTORS[request.param](32)


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


def gelu(t):
    return t * 0.5 * (1 + torch.erf(t / 2**0.5))


def normed(x, norm):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def own_and_mean(z, kept):
    """[own half, mean of the other half over the tokens kept]."""
    local, shared = z.chunk(2, dim=-1)
    pooled = torch.stack([shared[b, kept[b] == 1].mean(0) for b in range(3)])[:, None]
    return torch.cat([local, pooled.expand_as(local)], dim=-1)


KEPT = [0, 3, 4], range(20), [19]


def test_the_papers_scores_are_keep_less_drop_of_section_3_2(tokens):
    predictor, x, kept = TokenPredictor(32).double(), tokens.double(), mask_of(*KEPT).double()
    first, second, third = (predictor.out_proj[index] for index in (0, 2, 4))
    z = gelu(normed(x, predictor.in_proj[0]) @ predictor.in_proj[1].weight.T + predictor.in_proj[1].bias)
    z = gelu(own_and_mean(z, kept) @ first.weight.T + first.bias)
    z = gelu(z @ second.weight.T + second.bias)
    z = z @ third.weight.T + third.bias
    scores = predictor(x, kept)
    torch.testing.assert_close(scores, z[..., 1] - z[..., 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_probabilities(scores), z.log_softmax(-1), rtol=1e-12, atol=1e-12)


def test_light_scores_are_the_formula(tokens):
    predictor, x, kept = LightPredictor(32).double(), tokens.double(), mask_of(*KEPT).double()
    z = gelu(normed(x, predictor.norm) @ predictor.hidden.weight.T + predictor.hidden.bias)
    assert z.shape[-1] == 4
    z = own_and_mean(z, kept) @ predictor.score.weight.T + predictor.score.bias
    torch.testing.assert_close(predictor(x, kept), z.squeeze(-1), rtol=1e-12, atol=1e-12)


def test_certain_tokens_are_still_told_apart():
    scores = torch.tensor([[40.0, 50.0, 45.0]])
    log_pi = log_probabilities(scores)
    assert log_pi[..., 1].unique().numel() == 3
    assert log_pi.isfinite().all()


def test_masked_and_gathered_tokens_score_alike(predictor, tokens):
    chosen = [0, 2, 3, 11, 19]
    kept = mask_of(*[chosen] * 3)
    torch.testing.assert_close(predictor(tokens, kept)[:, chosen], predictor(tokens[:, chosen]))
    torch.testing.assert_close(predictor(tokens, torch.ones(3, 20)), predictor(tokens))
    assert torch.equal(predictor(tokens, kept.bfloat16()), predictor(tokens, kept))


def test_an_empty_set_gives_finite_scores_and_gradients(predictor, tokens):
    kept = mask_of([], [], [1]).requires_grad_()
    tokens.requires_grad_()
    scores = predictor(tokens, kept)
    scores.sum().backward()
    assert scores.isfinite().all()
    for tensor in (tokens, kept, *predictor.parameters()):
        assert tensor.grad.isfinite().all()


def test_the_mask_receives_a_gradient(predictor, tokens):
    kept = mask_of(range(5), range(10), range(15)).requires_grad_()
    predictor(tokens, kept).sum().backward()
    assert (kept.grad != 0).all()


def test_scores_are_fp32_and_unchanged_under_bf16_autocast(predictor, tokens):
    expected = predictor(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(tokens, torch.ones(1, 32)).dtype == torch.bfloat16  # autocast is on
        scores = predictor(tokens)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


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
    scores, expected = predictor(low), predictor(low.float())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=error, rtol=0)
    assert not torch.equal(scores, expected), "or nothing is gained"
    assert scores.unique().numel() == expected.unique().numel(), "scores do not tie"


def test_double_is_float64(predictor, tokens):
    reference = copy.deepcopy(predictor)
    predictor.double()
    assert {parameter.dtype for parameter in predictor.parameters()} == {torch.float64}
    scores = predictor(tokens.double())
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores.float(), reference(tokens))
    assert not torch.equal(scores, scores.float().double())  # not fp32 in disguise


@pytest.mark.parametrize("embed_dim", [1, 30, 193])
def test_a_width_that_is_no_multiple_of_4_is_refused(embed_dim):
    with pytest.raises(ValueError, match=f"multiple of 4, got {embed_dim}"):
        TokenPredictor(embed_dim)
