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
from vitprune.backbones.lvvit_model import LvVit, LvVitBackbone  # its import also makes the models known to timm
from vitprune.backbones.multimodal import AxialBackbone, GemmaBackbone
from vitprune.backbones.pairwise import BeitBackbone, RelPosBackbone
from vitprune.backbones.rotary import EvaBackbone, NaFlexBackbone
from vitprune.errors import UnsupportedModelError

ADAPTERS: Mapping[type[nn.Module], Callable[[Any], Backbone]] = {
    VisionTransformer: Backbone,
    VisionTransformerDistilled: Backbone,
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

NO_SEQUENCE = (
    "its blocks do not run over a plain sequence of tokens from which single ones can be removed: they convolve, pool "
    "or window a full grid, or give every position weights of its own"
)


def wrap(model: nn.Module) -> Backbone:
    """The adapter for a timm model.

    Raises:
        UnsupportedModelError: the model is not of a family whose tokens can be pruned; names it and says why.
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
    """Why the tokens of a model cannot be pruned; None if they can."""
    if type(model) not in ADAPTERS:
        return NO_SEQUENCE if _is_timms(model) else "only plain vision transformers of timm can lose single tokens"
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
