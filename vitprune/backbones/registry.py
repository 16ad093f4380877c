"""Which adapter fits a model, or why none does."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitprune.backbones.base import Backbone
from vitprune.backbones.vision_transformer import VisionTransformerBackbone
from vitprune.errors import UnsupportedModelError

_HIERARCHICAL = "it is hierarchical: its stages need a full grid of tokens, so single tokens cannot leave"
_CONVOLUTIONAL = "it is convolutional: there are no tokens to drop"
_POSITIONS = "its attention carries positions per token pair, which must be gathered with the tokens; not built yet"

_REASONS = {
    "beit": _POSITIONS,
    "cait": "its talking heads and separate class-attention layers are not built yet",
    "convit": "its gated attention carries positions per token pair and takes no mask",
    "convnext": _CONVOLUTIONAL,
    "efficientnet": _CONVOLUTIONAL,
    "eva": _POSITIONS,
    "hiera": _HIERARCHICAL,
    "maxxvit": _HIERARCHICAL,
    "metaformer": _HIERARCHICAL,
    "mlp_mixer": "its token-mixing layers have one weight per position, so tokens cannot leave",
    "mvitv2": _HIERARCHICAL,
    "naflexvit": "its variable-length batches are not built yet",
    "pvt_v2": _HIERARCHICAL,
    "regnet": _CONVOLUTIONAL,
    "resnet": _CONVOLUTIONAL,
    "swin_transformer": _HIERARCHICAL,
    "swin_transformer_v2": _HIERARCHICAL,
    "twins": _HIERARCHICAL,
    "vision_transformer_relpos": _POSITIONS,
    "vision_transformer_sam": "its windowed attention needs a full grid of tokens",
    "volo": _HIERARCHICAL,
    "xcit": "its attention is over channels and its blocks convolve the token grid",
}


def wrap(model: nn.Module) -> Backbone:
    """The adapter for a timm model.

    Raises:
        UnsupportedModelError: the model is not of a family whose tokens can be dropped; names it and says why.
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    # Exact types: a subclass may carry a forward of its own that this adapter would silently skip.
    if type(model) in (VisionTransformer, VisionTransformerDistilled):
        _check_pooling(model)
        return VisionTransformerBackbone(model)
    name, family = type(model).__name__, type(model).__module__.rpartition(".")[2]
    reason = _REASONS.get(family, "only plain vision transformers can lose single tokens")
    where = f" of timm's family '{family}'" if type(model).__module__.startswith("timm.") else ", not a timm model"
    raise UnsupportedModelError(
        f"{_architecture(model)}is a {name}{where}: {reason}",
        "choose a model that timm builds as VisionTransformer: ViT, DeiT, DeiT-III, CLIP, DINOv2 or SigLIP",
    )


def _check_pooling(model: Any) -> None:
    if not model.global_pool and model.attn_pool is None:
        raise UnsupportedModelError(
            f"{_architecture(model)}has global_pool='' and so returns tokens, not one vector per image",
            "create it with global_pool='token' or 'avg'",
        )


def _architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else None
    return f"'{name}' " if name else "the model "
