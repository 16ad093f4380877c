"""Which adapter fits a model, or why none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deepseek_vit import DeepseekVitClassifier
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.gemma4_vit import Gemma4VitClassifier
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitClassifier
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from vitprune.backbones.base import Backbone
from vitprune.backbones.cait import CaitBackbone
from vitprune.backbones.lvvit import LvVitBackbone
from vitprune.backbones.lvvit_model import LvVit  # its import also makes the models known to timm
from vitprune.backbones.multimodal import AxialBackbone, GemmaBackbone
from vitprune.backbones.pairwise import BeitBackbone, RelPosBackbone
from vitprune.backbones.rotary import EvaBackbone, NaFlexBackbone
from vitprune.backbones.vision_transformer import VisionTransformerBackbone
from vitprune.errors import UnsupportedModelError

ADAPTERS: Mapping[type[nn.Module], Callable[[Any], Backbone]] = {
    VisionTransformer: VisionTransformerBackbone,
    VisionTransformerDistilled: VisionTransformerBackbone,
    Eva: EvaBackbone,
    NaFlexVit: NaFlexBackbone,
    Beit: BeitBackbone,
    VisionTransformerRelPos: RelPosBackbone,
    Cait: CaitBackbone,
    Qwen3VitClassifier: AxialBackbone,
    DeepseekVitClassifier: AxialBackbone,
    Gemma4VitClassifier: GemmaBackbone,
    LvVit: LvVitBackbone,
}
"""By exact type: a subclass may carry a forward of its own that an adapter would silently skip."""

_CONVOLUTIONAL = "it is convolutional: there are no tokens to drop"
_HIERARCHICAL = "it is hierarchical: its stages need a full grid of tokens, so single tokens cannot leave"
_GRID = "its blocks convolve or pool the grid of tokens, so single tokens cannot leave"
_MIXER = "its token-mixing layers have one weight per position, so tokens cannot leave"
_ENCODER = "it is an encoder whose projector joins neighbouring tokens, and has no classifier"

_FAMILIES_BY_REASON = {
    _CONVOLUTIONAL: """
        convmixer convnext cspnet cspnext densenet dla dpn efficientnet fasternet focalnet ghostnet hgnet hrnet
        inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 mambaout mobilenetv3 mobilenetv5 nasnet
        nfnet pnasnet rdnet regnet repghost repvit resnet resnetv2 rexnet selecsls senet starnet tresnet vgg vovnet
        xception xception_aligned
    """,
    _HIERARCHICAL: """
        coat cpubone davit edgenext efficientformer efficientformer_v2 efficientvim efficientvit_mit efficientvit_msra
        fastvit gcvit hiera hieradet_sam2 iformer levit lowformer maxxvit metaformer mvitv2 nest nextvit pit
        pvt_v2 shvit swiftformer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit twins volo
    """,
    _GRID: "csatv2 visformer xcit",
    _MIXER: "mlp_mixer",
    _ENCODER: "deepseek_vit gemma4_vit qwen3_vit",
    "its attention, where it has any, sits between convolutions that need the full grid": "byobnet",
    "its two branches of different patch sizes exchange tokens": "crossvit",
    "each of its tokens carries a sequence of pixel tokens of its own through the blocks": "tnt",
    "its gated attention mixes in positions after the softmax, and its class token joins half-way": "convit",
    "its windowed attention needs a full grid of tokens": "vision_transformer_sam",
    "its recurrent layers run along rows and columns of the full grid": "sequencer",
}
REASONS: Mapping[str, str] = {
    family: reason for reason, families in _FAMILIES_BY_REASON.items() for family in families.split()
}
"""Why the tokens of a family cannot be dropped, by the name of timm's module."""


def wrap(model: nn.Module) -> Backbone:
    """The adapter for a timm model.

    Raises:
        UnsupportedModelError: the model is not of a family whose tokens can be dropped; names it and says why.
    """
    reason = why_not(model)
    if reason is None:
        return ADAPTERS[type(model)](model)
    where = f" of timm's family '{family_of(model)}'" if _is_timms(model) else ", not a timm model"
    hint = "choose a model whose blocks run over a plain sequence of tokens; `vitprune models` lists them"
    if type(model) in ADAPTERS:
        hint = "create it with encoder_pool='' and global_pool='avg' or, where there is a class token, 'token'"
    raise UnsupportedModelError(f"{_architecture(model)}is a {type(model).__name__}{where}: {reason}", hint)


def why_not(model: nn.Module) -> str | None:
    """Why the tokens of a model cannot be dropped; None if they can."""
    if type(model) not in ADAPTERS:
        plain = "only plain vision transformers can lose single tokens"
        return REASONS.get(family_of(model), plain) if _is_timms(model) else plain
    inner, pool = getattr(model, "encoder_pool", ""), model.global_pool
    if inner not in ("", "none"):
        return f"encoder_pool='{inner}' joins neighbouring tokens, so single tokens cannot leave"
    if pool in ("", "none") and getattr(model, "attn_pool", None) is None:
        return f"with global_pool='{pool}' it returns tokens, not one vector per image"
    return None


def family_of(model: nn.Module) -> str:
    """The name of the module that defines the model's class, which is how timm groups its architectures."""
    return type(model).__module__.rpartition(".")[2]


def _is_timms(model: nn.Module) -> bool:
    return type(model).__module__.startswith("timm.")


def _architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else None
    return f"'{name}' " if name else "the model "
