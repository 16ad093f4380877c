"""Models that the transformers library saved: ViT, DeiT, DINOv2, CLIP and SigLIP image towers, as timm's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vitprune.errors import CheckpointError
from vitprune.loading.preprocessor import PREPARED, Family, read_preprocessor
from vitprune.loading.task import PROBLEM_TYPES
from vitprune.model import TaskName


class _Kind(NamedTuple):
    """A class of transformers: what it is in timm, what it gives, and what of it is left out, for people.

    It gives classes, an embedding by a projection, or what the encoder pools; the anchor is a tensor of its files.
    """

    family: Family
    output: Literal["classes", "projection", "pooled", "classes of class token and patches"]
    anchor: str
    said: str | None = None


_ENCODER = "embeddings.cls_token"
_TEXT = "the text tower is left out"
_DINOV2_HEAD: Literal["classes of class token and patches"] = "classes of class token and patches"
KINDS = {
    "ViTForImageClassification": _Kind("vit", "classes", "vit.embeddings.cls_token"),
    "DeiTForImageClassification": _Kind("deit", "classes", "deit.embeddings.cls_token"),
    "DeiTForImageClassificationWithTeacher": _Kind("deit", "classes", "deit.embeddings.cls_token"),
    "ViTModel": _Kind("vit", "pooled", _ENCODER, "the embedding is the class token; a pooler behind it is left out"),
    "DeiTModel": _Kind("deit", "pooled", _ENCODER, "the embedding is the class token; a pooler behind it is left out"),
    "ViTMAEModel": _Kind("vit", "pooled", _ENCODER),
    "ViTMAEForPreTraining": _Kind("vit", "pooled", _ENCODER, "the encoder is read, which sees all patches"),
    "Dinov2Model": _Kind("dinov2", "pooled", _ENCODER),
    "Dinov2ForImageClassification": _Kind("dinov2", _DINOV2_HEAD, "dinov2.embeddings.cls_token"),
    "Dinov2WithRegistersModel": _Kind("dinov2", "pooled", _ENCODER),
    "Dinov2WithRegistersForImageClassification": _Kind(
        "dinov2", _DINOV2_HEAD, "dinov2_with_registers.embeddings.cls_token"
    ),
    "CLIPVisionModel": _Kind("clip", "pooled", "embeddings.class_embedding"),
    "CLIPVisionModelWithProjection": _Kind("clip", "projection", "vision_model.embeddings.class_embedding"),
    "CLIPModel": _Kind("clip", "projection", "vision_model.embeddings.class_embedding", _TEXT),
    "SiglipVisionModel": _Kind("siglip", "pooled", "embeddings.patch_embedding.weight"),
    "SiglipModel": _Kind("siglip", "pooled", "vision_model.embeddings.patch_embedding.weight", _TEXT),
}
"""Classes of transformers whose checkpoints can be read."""

_ARCHITECTURES: dict[Family, str] = {
    "vit": "vit_base_patch16_224",
    "deit": "vit_base_patch16_224",
    "dinov2": "vit_base_patch14_dinov2",
    "clip": "vit_base_patch16_clip_224",
    "siglip": "vit_base_patch16_siglip_224",
}
"""timm's, whose sizes are arguments."""
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "vit": {},
    "deit": {},
    "dinov2": {"patch_size": 14, "layer_norm_eps": 1e-6},
    "clip": {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "siglip": {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
}
"""What transformers leaves out of config.json, where it differs from ViT's."""
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python")),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **{name: name for name in ("quick_gelu", "relu", "relu6", "leaky_relu", "mish", "tanh", "sigmoid")},
}
"""transformers' name > timm's; None for what timm's ViT has by itself."""
_EPSILON = {"clip": 1e-5}
"""What norms of timm's architectures add, where it is not the usual."""
_USUAL_EPSILON = 1e-6


@dataclass(frozen=True)
class TransformersModel:
    """What timm needs to build a model of transformers: architecture, arguments, what differs in its configuration.

    The anchor is the name of a tensor in its file, `grid` the rows and columns of patches that position embeddings are
    resampled to (None for timm to do it), the task what config.json says, if it does, and `said` what was understood.
    """

    architecture: str
    arguments: dict[str, Any]
    overlay: dict[str, Any]
    anchor: str
    grid: tuple[int, int] | None
    task: TaskName | None
    said: list[str]


def read_config(
    config: dict[str, Any],
    preprocessor: dict[str, Any] | None,
    *,
    headless: bool = False,
    img_size: int | tuple[int, int] | None = None,
) -> TransformersModel:
    """The model that transformers' config.json and, where there is one, preprocessor_config.json describe.

    If `headless`, the encoder alone is wanted; `img_size` is another image size than theirs, in pixels.

    Raises:
        CheckpointError: a model of another kind, or something in it that timm cannot do; names it.
    """
    name = (config.get("architectures") or ["?"])[0]
    if name not in KINDS:
        raise CheckpointError(
            f"it holds a '{name}' of transformers, which cannot be read", f"these can: {', '.join(KINDS)}"
        )
    kind = KINDS[name]
    if kind.output == _DINOV2_HEAD and not headless:
        raise CheckpointError(
            f"the classifier of a '{name}' reads the class token beside the mean of the patches, which timm's cannot",
            "read the encoder alone: --model-kwargs num_classes=0",
        )
    tower = _DEFAULTS[kind.family] | _tower(config, kind.family)
    size, prepared = _sizes(tower.get("image_size", 224), preprocessor, kind.family)
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    outputs = {"classes": len(labels), "projection": config.get("projection_dim", 512)}.get(kind.output, 0)
    architecture, shape = _shape(name, kind.family, tower)
    arguments = {
        "img_size": size[0] if size[0] == size[1] else size,
        **shape,
        "num_classes": 0 if headless else outputs,
        **_activation(tower, kind.family),
    }
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    named = kind.output == "classes" and not all(re.fullmatch(r"LABEL_\d+", each) for each in names)  # nameless classes
    overlay: dict[str, Any] = {
        "input_size": (arguments["in_chans"], *size),
        **prepared,
        "num_classes": arguments["num_classes"],
        "label_names": names if named and not headless else None,
        "license": None,
        "hf_hub_id": None,
        "origin_url": None,
    }
    said = [kind.said] if kind.said else []
    said += [] if preprocessor is not None else ["no preprocessor_config.json: images as transformers prepares them"]
    said += [f"the head of the {name} is left out"] if headless and kind.output != "pooled" else []
    grid = _grid(size if img_size is None else img_size, shape["patch_size"]) if kind.family == "dinov2" else None
    trained = _grid(tower.get("image_size", 224), shape["patch_size"])
    if grid not in (None, trained):
        sizes = "position embeddings are resampled from {}x{} to {}x{} patches".format(*trained, *grid or ())
        said.append(f"{sizes}, as transformers does for its images")
    task = None if headless else "embedding" if kind.output == "projection" else _task(config)
    return TransformersModel(architecture, arguments, overlay, kind.anchor, grid, task, said)


def _tower(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The part of config.json that describes the image tower."""
    tower = config.get("vision_config", config)
    if not isinstance(tower, dict):
        raise CheckpointError(f"vision_config is {tower!r}, and should describe the image tower")
    if not tower.get("vision_use_head", True):
        raise CheckpointError("vision_use_head is false: a SigLIP tower without attention pool gives no embedding")
    return {key: value for key, value in tower.items() if value is not None}


def _shape(name: str, family: Family, tower: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Timm's architecture, and its arguments that say how large it is."""
    width = tower.get("hidden_size", 768)
    shape = {
        "patch_size": tower.get("patch_size", 16),
        "in_chans": tower.get("num_channels", 3),
        "embed_dim": width,
        "depth": tower.get("num_hidden_layers", 12),
        "num_heads": tower.get("num_attention_heads", 12),
        "mlp_ratio": _ratio(tower.get("intermediate_size", 3072), width),
        "qkv_bias": tower.get("qkv_bias", True),
    }
    if name == "DeiTForImageClassificationWithTeacher":
        return "deit_base_distilled_patch16_224", shape
    if family == "deit":
        shape["reg_tokens"] = 1
    if family != "dinov2":
        return _ARCHITECTURES[family], shape
    shape["init_values"] = tower.get("layerscale_value", 1.0) or 1.0  # the weights say
    shape["mlp_ratio"] = tower.get("mlp_ratio", 4)
    if "Registers" in name:
        shape |= {"reg_tokens": tower.get("num_register_tokens", 4), "no_embed_class": True}
    if not tower.get("use_swiglu_ffn", False):
        return _ARCHITECTURES[family], shape
    hidden = (int(int(width * shape["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8
    return "vit_giant_patch14_dinov2", shape | {"mlp_ratio": _ratio(2 * hidden, width)}


def _sizes(size: Any, preprocessor: dict[str, Any] | None, family: Family) -> tuple[tuple[int, int], dict[str, Any]]:
    """Height and width that the model takes, and how images are prepared for it."""
    own: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
    if family == "dinov2":  # made for 518 pixels, and used at what its processor cuts out: positions are resampled
        crop = (preprocessor or {}).get("crop_size") or (PREPARED["dinov2"]["crop_size"] if own == (518, 518) else own)
        sides: Any = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else crop
        own = (sides, sides) if isinstance(sides, int) else (int(sides[0]), int(sides[1]))
    return own, read_preprocessor(preprocessor or {}, own, family)


def _grid(size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch, width // patch


def _ratio(hidden: int, width: int) -> float:
    """`hidden` of `width`, so that timm, which multiplies and rounds down, comes to `hidden` again."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _task(config: dict[str, Any]) -> TaskName | None:
    kind = config.get("problem_type")
    if kind is not None and kind not in PROBLEM_TYPES:
        raise CheckpointError(f"problem_type is {kind!r}, which is no task", _known(PROBLEM_TYPES))
    return None if kind is None else PROBLEM_TYPES[kind]


def _activation(tower: dict[str, Any], family: Family) -> dict[str, Any]:
    """Argument of timm's for the MLP's activation; the epsilon of norms has none, and must be about timm's."""
    activation, epsilon = tower.get("hidden_act", "gelu"), tower.get("layer_norm_eps", 1e-12)
    most = _EPSILON.get(family, _USUAL_EPSILON)
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"hidden_act is '{activation}', which timm's ViT does not have", _known(_ACTIVATIONS))
    if not 0 <= epsilon <= most:
        raise CheckpointError(
            f"layer_norm_eps is {epsilon:g}, and norms of timm's ViT add {most:g}", "at most that can be read"
        )
    layer = _ACTIVATIONS[activation]
    return {} if layer is None or tower.get("use_swiglu_ffn", False) else {"act_layer": layer}


def _known(names: Iterable[Any]) -> str:
    return f"known are {', '.join(map(str, names))}"
