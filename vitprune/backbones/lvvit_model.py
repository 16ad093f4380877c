"""LV-ViT (Jiang et al., "All Tokens Matter", NeurIPS 2021, https://arxiv.org/abs/2104.10858) as timm models.

timm has none. Importing this module registers lvvit_t, lvvit_s, lvvit_m and lvvit_l, so that `timm.create_model` builds
them; parameters and buffers carry the names of the published checkpoints, which load as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitprune.backbones.base import Backbone

AUX_WEIGHT = 0.5
"""What the best logit of a single patch token counts beside the class token's."""


class Stem(nn.Module):
    """Three convolutions, the first at half the resolution, then patches: 16 pixels of the image to a token.

    Args:
        img_size: side or (height, width) in pixels.
        in_chans: channels of the image.
        embed_dim: C.
        width: channels of the convolutions.
        device: of the weights.
        dtype: of the weights.
        **_: what else timm gives its patch embeddings.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        width: int,
        device: Any = None,
        dtype: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.patch_size = (16, 16)
        rows, columns = ((size + 1) // 2 // 8 for size in self.img_size)
        self.grid_size = (rows, columns)
        self.num_patches = rows * columns
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, 8, stride=8)
        self.to(device=device, dtype=dtype)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of patches, by timm's name for it; there is one image size."""
        del img_size
        return self.grid_size

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to patch tokens (B, N, C).

        Raises:
            ValueError: the images are not of the size the model was built for.
        """
        if tuple(images.shape[-2:]) != self.img_size:
            expected, got = ("x".join(map(str, size)) for size in (self.img_size, images.shape[-2:]))
            raise ValueError(f"expected images of {expected} pixels, got {got}")
        x = self.bn1(self.conv1(images)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)


class Divided(nn.Module):
    """A residual over a constant, in the place of timm's layer scale."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x / self.by


class LvVit(VisionTransformer):  # type: ignore[misc]  # timm is untyped
    """A ViT whose patch tokens are classified too: logits = head(class token) + 0.5 max over aux_head(patch).

    Args:
        stem_width: channels of the stem's convolutions.
        skip_lam: what residuals are divided by.
        global_pool: timm's name for reading the class token; there is no other choice.
        **arguments: of timm's VisionTransformer. The image size is fixed.

    Raises:
        ValueError: another `global_pool`.
    """

    aux_head: nn.Module

    def __init__(
        self, stem_width: int = 64, skip_lam: float = 2.0, global_pool: str = "token", **arguments: Any
    ) -> None:
        if global_pool != "token":
            raise ValueError(f"LV-ViT reads its class token, expected global_pool='token', got '{global_pool}'")
        fixed = {"embed_layer": partial(Stem, width=stem_width), "norm_layer": nn.LayerNorm, "qkv_bias": False}
        super().__init__(**{"mlp_ratio": 3.0, **fixed, **arguments})
        for block in self.blocks:
            block.ls1 = block.ls2 = Divided(skip_lam)
        self.reset_classifier(self.num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens (B, 1 + N, C) to logits, or with `pre_logits` to the class token (B, C)."""
        if pre_logits or not self.num_classes:
            return x[:, 0]
        return self.head(x[:, 0]) + AUX_WEIGHT * self.aux_head(x[:, 1:]).amax(dim=1)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The class token's head and the patch tokens'."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` classes, 0 for none."""
        super().reset_classifier(num_classes)
        self.aux_head = self.head
        super().reset_classifier(num_classes)


class LvVitBackbone(Backbone):
    """LvVit: with `kept`, the best logit of a patch token is taken among kept tokens only."""

    def token_logits(self, features: Tensor) -> Tensor | None:
        """What the auxiliary head says of each patch token."""
        return self.model.aux_head(features) if self.num_classes else None

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """The model's own head, or with `kept` the same one over kept tokens; a maximum does not heed `sizes`."""
        answers = None if kept is None else self.token_logits(self.token_features(x))  # (B, N, num_classes)
        if kept is None or answers is None:
            return self.model.forward_head(x)
        gone = (kept < 0.5).unsqueeze(-1)
        best = answers.masked_fill(gone, torch.finfo(answers.dtype).min).amax(dim=1)
        # Of an image without a kept token the class token alone decides.
        return self.model.head(x[:, 0]) + AUX_WEIGHT * best.masked_fill(gone.all(dim=1), 0.0)

    def pool(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """The class token; patch tokens are classified each by itself."""
        return x[:, 0]


def _cfg(crop_pct: float) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
        "origin_url": "https://github.com/zihangJiang/TokenLabeling",
        "paper_ids": "arXiv:2104.10858",
    }


default_cfgs = generate_default_cfgs(
    {"lvvit_t": _cfg(0.9), "lvvit_s": _cfg(0.9), "lvvit_m": _cfg(1.0), "lvvit_l": _cfg(1.0)}
)


def _create(name: str, pretrained: bool, arguments: dict[str, Any], given: dict[str, Any]) -> LvVit:
    return build_model_with_cfg(
        LvVit, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**arguments, **given}
    )


@register_model  # type: ignore[untyped-decorator]
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LvVit:
    """8.5 M parameters, 79.1 % top-1 on ImageNet-1k (published)."""
    return _create("lvvit_t", pretrained, {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0}, kwargs)


@register_model  # type: ignore[untyped-decorator]
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LvVit:
    """26.2 M parameters, 83.3 % top-1 on ImageNet-1k (published)."""
    return _create("lvvit_s", pretrained, {"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0}, kwargs)


@register_model  # type: ignore[untyped-decorator]
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LvVit:
    """55.8 M parameters, 84.0 % top-1 on ImageNet-1k (published)."""
    return _create("lvvit_m", pretrained, {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0}, kwargs)


@register_model  # type: ignore[untyped-decorator]
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LvVit:
    """150.0 M parameters, 150.5 M at 448 pixels."""
    arguments = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_width": 128}
    return _create("lvvit_l", pretrained, arguments, kwargs)
