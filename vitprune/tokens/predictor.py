"""Token predictors: small networks that give each patch token a keep score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitprune.common.own_members import PublicModule
from vitprune.tokens.precision import is_autocast, without_autocast


class Predictor(PublicModule):
    """What gives patch tokens their keep scores.

    Scores are fp32 whatever the model runs in: in bf16 those of weakly trained predictors tie, and top-k then takes the
    first rows of the image. So parameters stay in fp32 when the module is cast to less, and so do the last layer
    and, under autocast, all of it. Of bf16 or fp16 tokens the inner products are taken in their precision: on real
    images that moves a tenth to four tenths of a token an image, where the tokens' own rounding moves about one.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Keep scores: log-odds of keeping a token, higher is more important.

        Args:
            x: patch tokens of the residual stream (B, N, C), without prefix tokens.
            kept: D-hat (B, N), 1 where a token is still there; None when all are.

        Returns:
            (B, N) in fp32 (float64 for a float64 predictor). Finite also when no token is kept.
        """
        dtype: torch.dtype = self.first.weight.dtype
        low = x.dtype in (torch.bfloat16, torch.float16) and not is_autocast(x)
        with without_autocast(x):
            return self._scores(x.to(dtype), x.dtype if low else dtype, kept)

    @property
    def first(self) -> Any:
        """The layer that sees the tokens first; its weights say the precision, also where `parameters` is empty."""
        raise NotImplementedError

    def _scores(self, x: Tensor, inner: torch.dtype, kept: Tensor | None) -> Tensor:
        """Scores (B, N) of tokens in the module's precision, inner products in another."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Predictor:
        # Every .to(), .half(), .cuda() comes through here: follow the device, never go below fp32.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


class LightPredictor(Predictor):
    """The default: LayerNorm > Linear C>C/8 > GELU > [own half, mean of the other half over the tokens] > Linear C/8>1.

    5,041 parameters at C = 192, 19,297 at 384: a twelfth of the paper's predictor. Twice as wide ranks no better.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        width = 2 * max(1, embed_dim // 16)
        self.norm = nn.LayerNorm(embed_dim)
        self.hidden = nn.Linear(embed_dim, width)
        self.act = nn.GELU()
        self.score = nn.Linear(width, 1)

    @property
    def first(self) -> Any:
        """The norm."""
        return self.norm

    def _scores(self, x: Tensor, inner: torch.dtype, kept: Tensor | None) -> Tensor:
        hidden = self.act(_called(self.hidden, self.norm(x), inner))
        local, shared = hidden.to(x.dtype).chunk(2, dim=-1)  # (B, N, C/16) each
        scores: Tensor = self.score(torch.cat((local, _mean(shared, kept).expand_as(local)), dim=-1))
        return scores.squeeze(-1)


class TokenPredictor(Predictor):
    """DynamicViT's (section 3.2), for its recipe, its checkpoints and files of earlier versions.

    LayerNorm > Linear C>C > GELU, whose first half is the token's local feature and whose second half, averaged
    over the tokens still kept, is the global one; then Linear C>C/2 > GELU > Linear C/2>C/4 > GELU > Linear C/4>2, the
    logits of dropping and of keeping. The score is keep less drop: the order of the log-probability of keeping, but
    finer where that rounds. 60,722 parameters at C = 192, 241,250 at 384, 961,730 at 768.

    Args:
        embed_dim: C, a multiple of 4.
    """

    def __init__(self, embed_dim: int) -> None:
        if embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4, got {embed_dim}")
        super().__init__(embed_dim)
        self.in_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, embed_dim), nn.GELU())
        self.out_proj = nn.Sequential(
            nn.Linear(embed_dim, embed_dim // 2),
            nn.GELU(),
            nn.Linear(embed_dim // 2, embed_dim // 4),
            nn.GELU(),
            nn.Linear(embed_dim // 4, 2),
        )

    @property
    def first(self) -> Any:
        """The norm."""
        return self.in_proj[0]

    def _scores(self, x: Tensor, inner: torch.dtype, kept: Tensor | None) -> Tensor:
        norm, first, act = self.in_proj
        hidden = act(_called(first, norm(x), inner))
        local, shared = hidden.chunk(2, dim=-1)  # (B, N, C/2) each
        pooled = _mean(shared.to(x.dtype), kept)
        # Splitting the next layer would save half of its products, and make MACs differ from the published ones.
        features = torch.cat((local, pooled.to(inner).expand_as(local)), dim=-1)
        second, act_second, third, act_third, last = self.out_proj
        features = act_third(_called(third, act_second(_called(second, features, inner)), inner))
        logits: Tensor = last(features.to(x.dtype))
        return logits[..., 1] - logits[..., 0]


class NormPredictor(nn.Module):
    """A token's L2 norm in the place of a score: nothing to train. Where redundancy alone decides, it says which of two
    alike tokens stays.
    """

    def __init__(self, embed_dim: int = 0) -> None:
        super().__init__()

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Norms (B, N) of patch tokens (B, N, C), in fp32."""
        del kept
        norms: Tensor = x.float().norm(dim=-1)
        return norms


PREDICTORS: dict[Literal["light", "paper", "norm"], type[nn.Module]] = {
    "light": LightPredictor,
    "paper": TokenPredictor,
    "norm": NormPredictor,
}
"""By name."""


def is_trained(predictor: nn.Module) -> bool:
    """Whether something in it waits for a gradient; of DataParallel's replicas `parameters` is empty."""
    if any(parameter.requires_grad for parameter in predictor.parameters()):
        return True
    return isinstance(predictor, Predictor) and bool(predictor.first.weight.requires_grad)


def _mean(x: Tensor, kept: Tensor | None) -> Tensor:
    """Mean over the tokens still kept, (B, N, C) to (B, 1, C)."""
    if kept is None:
        return x.mean(dim=1, keepdim=True)
    weight = kept.to(x.dtype).unsqueeze(-1)
    # The clamp guards an empty set (0/0); it never binds otherwise, as one kept token already sums to 1.
    return (x * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)


def _called(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer, in another precision than its own where it has weights to cast.

    Called as a module, never by its weights: adapters (LoRA), quantised layers and hooks act.
    """
    weights = {name: weight for name, weight in layer.named_parameters() if weight.is_floating_point()}
    if not weights or all(weight.dtype == dtype for weight in weights.values()):
        out: Tensor = layer(x)
    else:
        out = functional_call(layer, {name: weight.to(dtype) for name, weight in weights.items()}, (x.to(dtype),))
    return out
