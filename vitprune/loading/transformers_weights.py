"""Tensors of transformers' vision transformers under timm's names."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

ANCHORS: tuple[str, ...] = (
    "vit.embeddings.cls_token",
    "deit.embeddings.cls_token",
    "dinov2.embeddings.cls_token",
    "dinov2_with_registers.embeddings.cls_token",
    "vision_model.embeddings.patch_embedding.weight",
    "embeddings.cls_token",
    "embeddings.patch_embedding.weight",
)
"""Names that tensors of theirs have: of whole models, then of encoders that were saved alone."""

_PREFIX = re.compile(r"^(vit|deit|dinov2|dinov2_with_registers|vision_model)\.")
_LEFT_OUT = re.compile(
    r"^(text_model|text_projection|logit_scale|logit_bias|decoder|pooler)(\.|$)|(^|\.)(mask_token|position_ids)$"
)
"""Of pretraining and of text towers: the image's embedding does not depend on it."""
_RENAMED = (
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?(\.projection)?\.", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^(classifier|cls_classifier|visual_projection)\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
_QKV = re.compile(r"\.(?:attention\.(?:attention\.)?|self_attn\.)(query|key|value|q_proj|k_proj|v_proj)\.")
_POOL_QKV = re.compile(r"^head\.attention\.in_proj_(weight|bias)$")


def is_transformers_state(state: dict[str, Tensor]) -> bool:
    """Whether tensors carry the names that transformers gives those of a vision transformer."""
    return not state.keys().isdisjoint(ANCHORS)


def convert_state(
    state: dict[str, Tensor], *, headless: bool = False, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Tensors of a model of transformers under timm's names, queries, keys and values joined.

    A DeiT without its second classifier keeps its distillation token: a register token, to timm. If `headless`, a
    classifier or projection is left out; position embeddings are resampled to the rows and columns of `grid`, as
    transformers' DINOv2 does.
    """
    two_heads = "distillation_classifier.weight" in state
    converted: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        bare = _PREFIX.sub("", name)
        if _LEFT_OUT.search(bare):
            continue
        if bare in ("embeddings.distillation_token", "embeddings.register_tokens"):
            converted["dist_token" if two_heads else "reg_token"] = tensor
        elif pool := _POOL_QKV.match(bare):
            query, key, value = tensor.chunk(3)
            converted |= {f"attn_pool.q.{pool[1]}": query, f"attn_pool.kv.{pool[1]}": torch.cat([key, value])}
        elif part := _QKV.search(bare):
            parts.setdefault(_renamed(bare.replace(part[0], ".attn.qkv.")), {})[part[1][0]] = tensor
        else:
            converted[_renamed(bare)] = tensor
    for name, by_letter in parts.items():
        converted[name] = torch.cat([by_letter[letter] for letter in "qkv"])
    if headless:
        converted = {name: tensor for name, tensor in converted.items() if not name.startswith(("head.", "head_dist."))}
    elif "visual_projection.weight" in state:
        converted["head.bias"] = torch.zeros(len(converted["head.weight"]))
    return _shaped(converted, grid, registers=any(name.endswith("register_tokens") for name in state))


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _shaped(state: dict[str, Tensor], grid: tuple[int, int] | None, *, registers: bool) -> dict[str, Tensor]:
    """Class token and position embeddings as timm has them: (1, 1, C) and (1, P + N, C)."""
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "pos_embed" not in state:
        return state
    positions = state["pos_embed"].reshape(1, -1, state["pos_embed"].shape[-1])
    if grid is not None:
        positions = _resampled(positions, grid, antialias=registers)
    if registers:  # timm's DINOv2 with registers has no position for its class token
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        positions = positions[:, 1:]
    return state | {"pos_embed": positions}


def _resampled(positions: Tensor, grid: tuple[int, int], *, antialias: bool) -> Tensor:
    """(1, 1 + N, C) of a square grid to (1, 1 + rows * columns, C), as transformers' `interpolate_pos_encoding`."""
    side = int((positions.shape[1] - 1) ** 0.5)
    if (side, side) == grid:
        return positions
    patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
