"""LV-ViT (Jiang et al., "All Tokens Matter", NeurIPS 2021, https://arxiv.org/abs/2104.10858) as timm models.

timm has none. Importing this module registers lvvit_t, lvvit_s, lvvit_m and lvvit_l, so that `timm.create_model` builds
them; parameters and buffers carry the names of the published checkpoints, which load as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import DropPath, Mlp, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.layers.attention import Attention
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

__all__ = ["AUX_WEIGHT", "LvVit"]

AUX_WEIGHT = 0.5
"""What the best answer of a single patch token counts beside the class token's."""


class Stem(nn.Module):
    """Three convolutions, the first at half the resolution, then patches: 16 pixels of the image to a token.

    Args:
        img_size: (height, width) in pixels.
        in_chans: channels of the image.
        width: channels of the convolutions.
        embed_dim: C.
    """

    def __init__(self, img_size: tuple[int, int], in_chans: int, width: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = (16, 16)
        rows, columns = ((size + 1) // 2 // 8 for size in img_size)
        self.grid_size = (rows, columns)
        self.num_patches = rows * columns
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, 8, stride=8)

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


class Block(nn.Module):
    """Attention, then MLP, each normed before and divided by `skip_lam` before it joins the residual stream."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, skip_lam: float, drop_path: float) -> None:
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=False)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T, C) to the same; `attn_mask` is added to the attention logits."""
        return self.mlp_half(self.attention_half(x, attn_mask))

    def attention_half(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attention and its residual."""
        return x + self.drop_path1(self.attn(self.norm1(x), attn_mask=attn_mask)) / self.skip_lam

    def mlp_half(self, x: Tensor) -> Tensor:
        """MLP and its residual."""
        return x + self.drop_path2(self.mlp(self.norm2(x))) / self.skip_lam


class LvVit(nn.Module):
    """A vision transformer whose patch tokens answer too: logits = head(class token) + 0.5 max over aux_head(patch).

    Args:
        img_size: in pixels, one side or (height, width); fixed.
        in_chans: channels of the image.
        num_classes: of both heads; 0 for none, the class token is then what comes out.
        embed_dim: C.
        depth: number of blocks.
        num_heads: of attention.
        mlp_ratio: hidden width of the MLP over C.
        stem_width: channels of the stem's convolutions.
        skip_lam: what residuals are divided by.
        drop_path_rate: stochastic depth of the last block, rising from 0 at the first.
        global_pool: timm's name for reading the class token; there is no other choice.

    Raises:
        ValueError: another `global_pool`.
    """

    head: nn.Module
    aux_head: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        stem_width: int = 64,
        skip_lam: float = 2.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        if global_pool != "token":
            raise ValueError(f"LV-ViT reads its class token, expected global_pool='token', got '{global_pool}'")
        self.global_pool = global_pool
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False
        self.patch_embed = Stem(to_2tuple(img_size), in_chans, stem_width, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        rates = [drop_path_rate * index / max(1, depth - 1) for index in range(depth)]
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio, skip_lam, rate) for rate in rates))
        self.norm = nn.LayerNorm(embed_dim)
        self.reset_classifier(num_classes)
        self.apply(init_weights_vit_timm)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def forward_embed(self, images: Tensor) -> Tensor:
        """Images to tokens (B, 1 + N, C), class token first, ready for block 0."""
        patches = self.patch_embed(images)
        return torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1) + self.pos_embed

    def forward_features(self, images: Tensor) -> Tensor:
        """Images to normed tokens (B, 1 + N, C)."""
        x = self.forward_embed(images)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing and torch.is_grad_enabled() else self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens (B, 1 + N, C) to logits, or with `pre_logits` to the class token (B, C)."""
        if pre_logits or not self.num_classes:
            return x[:, 0]
        return self.head(x[:, 0]) + AUX_WEIGHT * self.aux_head(x[:, 1:]).amax(dim=1)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The class token's head and the patch tokens'."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int) -> None:
        """New heads for `num_classes` classes, 0 for none."""
        self.num_classes = num_classes
        like = self.norm.weight
        for name in ("head", "aux_head"):
            head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
            setattr(self, name, head.to(like.device, like.dtype))

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers do not decay."""
        return {"pos_embed", "cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for timm's layer-wise rates."""
        del coarse
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _resample_positions(state: dict[str, Tensor], model: LvVit) -> dict[str, Tensor]:
    """Position embeddings of a checkpoint for square images of any size, on the grid of `model`."""
    positions, grid = state.get("pos_embed"), model.patch_embed.grid_size
    num_patches = 0 if positions is None else positions.shape[1] - 1
    if math.isqrt(num_patches) ** 2 != num_patches:
        return state
    return state | {"pos_embed": resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=1)}


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
        LvVit, name, pretrained, pretrained_filter_fn=_resample_positions, **{**arguments, **given}
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
