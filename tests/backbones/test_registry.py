"""Which models are taken, and that the others are refused by name, with the reason."""

import pytest
import timm
import torch
from architectures import PLAIN, TINY
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprune.backbones import wrap
from vitprune.errors import UnsupportedModelError
from vitprune.model import attach

OTHERS = ("swin_tiny_patch4_window7_224", "convnext_atto", "mixer_s16_224", "tnt_s_patch16_224")
VITS = ("vit", "deit")


class Custom(VisionTransformer):
    """Of a forward of its own."""


@pytest.mark.parametrize(
    ("name", "settings", "reason", "hint"),
    [
        *((name, {}, "do not run over a plain sequence of tokens", "vitprune models") for name in OTHERS),
        ("qwen3_vit_88m_merge", {}, "encoder_pool='merge'", "encoder_pool=''"),
        *((f"{kind}_tiny_patch16_224", {"global_pool": ""}, "global_pool=''", "global_pool=") for kind in VITS),
    ],
)
def test_what_cannot_lose_tokens_is_refused_by_name_with_the_reason(name, settings, reason, hint):
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        wrap(model)
    assert f"'{name}'" in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), Custom(**TINY)])
def test_a_module_that_is_not_timms_is_refused(model):
    with pytest.raises(UnsupportedModelError, match=type(model).__name__) as caught:
        attach(model)
    assert "only plain vision transformers" in caught.value.message


def test_the_model_is_used_as_it_is_not_copied(make_vit):
    model = make_vit(**PLAIN)
    assert wrap(model).model is model
    assert attach(model).model is model
