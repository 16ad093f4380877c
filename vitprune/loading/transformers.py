"""Models that the transformers library saved: ViT and DeiT image classifiers, as timm's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vitprune.errors import CheckpointError
from vitprune.loading.preprocessor import read_preprocessor

KINDS = ("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
"""Classes of transformers whose checkpoints can be read."""
ANCHORS: tuple[str, ...] = ("vit.embeddings.cls_token", "deit.embeddings.cls_token")
"""Names that tensors of theirs have."""

_RENAMED = (
    (r"^(vit|deit)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^(classifier|cls_classifier)\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python")),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **{name: name for name in ("quick_gelu", "relu", "relu6", "leaky_relu", "mish", "tanh", "sigmoid")},
}
"""transformers' name > timm's; None for what timm's ViT has by itself."""
_EPSILON = 1e-6
_QKV = re.compile(r"\.attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.")


def is_transformers_state(state: dict[str, Tensor]) -> bool:
    """Whether tensors carry the names that transformers gives a ViT or DeiT classifier."""
    return not state.keys().isdisjoint(ANCHORS)


def convert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ViT or DeiT classifier of transformers under timm's names, queries, keys and values joined.

    A DeiT without its second classifier keeps its distillation token: a register token, to timm.
    """
    two_heads = "distillation_classifier.weight" in state
    converted: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(("vit.pooler.", "deit.pooler.")) or name.endswith("embeddings.mask_token"):
            continue  # of pretraining; the classifier does not see it
        if name.endswith("embeddings.distillation_token"):
            converted["dist_token" if two_heads else "reg_token"] = tensor
            continue
        new = name
        for pattern, replacement in _RENAMED:
            new = re.sub(pattern, replacement, new)
        part = _QKV.search(new)
        if part:
            parts.setdefault(new.replace(part[0], ".attn.qkv."), {})[part[1][0]] = tensor
        else:
            converted[new] = tensor
    for name, by_letter in parts.items():
        converted[name] = torch.cat([by_letter[letter] for letter in "qkv"])
    return converted


def read_config(
    config: dict[str, Any], preprocessor: dict[str, Any] | None
) -> tuple[str, dict[str, Any], dict[str, Any], list[str]]:
    """What timm needs to build the model that transformers' config.json and preprocessor_config.json describe.

    Returns:
        timm architecture, its arguments, what differs in its preprocessing, and what was understood, a line each.

    Raises:
        CheckpointError: a model of another kind, or something in it that timm cannot do; names it.
    """
    kind = (config.get("architectures") or ["?"])[0]
    if kind not in KINDS:
        raise CheckpointError(
            f"it holds a '{kind}' of transformers, which cannot be read", f"these can: {', '.join(KINDS)}"
        )
    # What transformers leaves out of config.json is its default.
    width, size = config.get("hidden_size", 768), config.get("image_size", 224)
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    arguments = {
        "img_size": size,
        "patch_size": config.get("patch_size", 16),
        "in_chans": config.get("num_channels", 3),
        "embed_dim": width,
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "mlp_ratio": config.get("intermediate_size", 3072) / width,
        "qkv_bias": config.get("qkv_bias", True),
        "num_classes": len(labels),
        **_activation(config),
    }
    architecture = "vit_base_patch16_224"
    if kind == "DeiTForImageClassification":
        arguments["reg_tokens"] = 1
    if kind == "DeiTForImageClassificationWithTeacher":
        architecture = "deit_base_distilled_patch16_224"
    height, width_px = (size, size) if isinstance(size, int) else size
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    named = not all(re.fullmatch(r"LABEL_\d+", name) for name in names)  # what transformers calls nameless classes
    prepared = read_preprocessor(preprocessor or {}, (height, width_px), is_deit=kind.startswith("DeiT"))
    said = [] if preprocessor is not None else ["no preprocessor_config.json: images as transformers prepares them"]
    overlay: dict[str, Any] = {
        "input_size": (arguments["in_chans"], height, width_px),
        **prepared,
        "num_classes": len(labels),
        "label_names": names if named else None,
        "license": None,
        "hf_hub_id": None,
        "origin_url": None,
    }
    return architecture, arguments, overlay, said


def _activation(config: dict[str, Any]) -> dict[str, Any]:
    """Argument of timm's for the MLP's activation; the epsilon of norms has none, and must be about timm's."""
    activation, epsilon = config.get("hidden_act", "gelu"), config.get("layer_norm_eps", 1e-12)
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"hidden_act is '{activation}', which timm's ViT does not have", _known(_ACTIVATIONS))
    if not 0 <= epsilon <= _EPSILON:
        raise CheckpointError(
            f"layer_norm_eps is {epsilon:g}, and norms of timm's ViT add {_EPSILON:g}", "at most that can be read"
        )
    layer = _ACTIVATIONS[activation]
    return {} if layer is None else {"act_layer": layer}


def _known(names: Iterable[Any]) -> str:
    return f"known are {', '.join(map(str, names))}"
