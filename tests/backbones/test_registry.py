"""Which models are taken, and that the others are refused by name, with the reason."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprune.backbones import wrap
from vitprune.errors import UnsupportedModelError
from vitprune.model import attach

TINY = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 96}


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "convnext_atto", "mixer_s16_224", "tnt_s_patch16_224"]
)
def test_other_families_are_refused_by_name_with_the_reason(name):
    refused_for(name, "do not run over a plain sequence of tokens")


def test_an_encoder_that_pools_at_its_end_is_refused():
    refused_for("qwen3_vit_88m_merge", "encoder_pool='merge'")


def refused_for(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        wrap(model)
    assert f"'{name}'" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Flatten(), nn.Linear(2, 2))])
def test_a_module_that_is_not_timms_is_refused(model):
    with pytest.raises(UnsupportedModelError, match=type(model).__name__) as caught:
        attach(model)
    assert "only plain vision transformers" in caught.value.message


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    class Custom(VisionTransformer):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(UnsupportedModelError, match="Custom"):
        wrap(Custom(**TINY))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_a_model_that_returns_tokens_is_refused(name):
    with pytest.raises(UnsupportedModelError, match="global_pool=''") as caught:
        wrap(timm.create_model(name, **TINY, global_pool=""))
    assert f"'{name}'" in caught.value.message
    assert "global_pool=" in caught.value.hint


def test_the_model_is_used_as_it_is_not_copied(make_vit):
    model = make_vit("vit_tiny_patch16_224", **TINY)
    assert wrap(model).model is model
    assert attach(model).model is model
