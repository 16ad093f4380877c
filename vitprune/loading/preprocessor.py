"""preprocessor_config.json of transformers' image processors, as timm's data configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vitprune.errors import CheckpointError

Family = Literal["vit", "deit", "dinov2", "clip", "siglip"]
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's numbers."""
_DEFAULTS = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
    "resample": 2,
}
_CROPPED = {"do_center_crop": True, "resample": 3, "crop_size": 224}
PREPARED: dict[Family, dict[str, Any]] = {
    "vit": {},
    "deit": {**_CROPPED, "size": 256},
    "dinov2": {
        **_CROPPED,
        "size": {"shortest_edge": 256},
        "image_mean": IMAGENET_DEFAULT_MEAN,
        "image_std": IMAGENET_DEFAULT_STD,
    },
    "clip": {
        **_CROPPED,
        "size": {"shortest_edge": 224},
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
    },
    "siglip": {"resample": 3},
}
"""What differs in transformers' processor for a family, at 224 pixels; for DINOv2, in the files of its authors."""
_SHORTER_SIDE: tuple[Family, ...] = ("dinov2", "clip")
"""Whose `size`, as a number, is that of the shorter side."""
_NO_MATTER = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "transformers_version"),
    *("do_convert_rgb", "default_to_square", "data_format", "input_data_format", "return_tensors", "device"),
    "disable_grouping",
}
"""Keys that do not change what the model sees; images always become RGB."""


def read_preprocessor(config: dict[str, Any], size: tuple[int, int], family: Family = "vit") -> dict[str, Any]:
    """Timm's data configuration for what transformers does with an image, but for the input size.

    Height and width that the model takes are in pixels. For what the file does not say, {} for all, the defaults of
    the family's processor hold.

    Raises:
        CheckpointError: it asks for something that timm's transforms cannot do; names it.
    """
    given = {key: value for key, value in config.items() if value is not None}
    what = _DEFAULTS | {"size": size} | _defaults_of(family, size) | given
    if family in _SHORTER_SIDE and isinstance(what["size"], int):
        what["size"] = {"shortest_edge": what["size"]}
    for key in given.keys() - _DEFAULTS.keys() - _NO_MATTER - {"size", "crop_size"}:
        if given[key]:
            raise _impossible(key, given[key])
    if not what["do_resize"]:
        raise _impossible("do_resize", what["do_resize"])
    if what["resample"] not in _FILTERS:
        raise _impossible("resample", what["resample"])
    return {**_colours(what), "interpolation": _FILTERS[what["resample"]], **_cropping(what, size)}


def _defaults_of(family: Family, size: tuple[int, int]) -> dict[str, Any]:
    """A family's defaults; those sizes of it that are for 224 pixels only, the model's own size else."""
    known = PREPARED[family]
    if size == (224, 224):
        return known
    known = {key: value for key, value in known.items() if key not in ("size", "crop_size")}
    if family in _SHORTER_SIDE:
        return {**known, "size": {"shortest_edge": min(size)}, "crop_size": {"height": size[0], "width": size[1]}}
    return {} if family == "deit" else known


def _colours(what: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation of pixels in [0, 1], which is what timm normalises: (255 f x - m) / s otherwise."""
    factor = what["rescale_factor"] if what["do_rescale"] else 1.0
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise _impossible("rescale_factor", factor)
    factor = 255 * factor
    mean, std = (what["image_mean"], what["image_std"]) if what["do_normalize"] else (0.0, 1.0)
    means, stds = _numbers(mean, "image_mean"), _numbers(std, "image_std")
    if min(stds) <= 0:
        raise _impossible("image_std", std)
    return {"mean": tuple(each / factor for each in means), "std": tuple(each / factor for each in stds)}


def _numbers(value: Any, key: str) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * 3
    if len(numbers) not in (1, 3) or not all(isinstance(each, (int, float)) for each in numbers):
        raise _impossible(key, value)
    return numbers


def _cropping(what: dict[str, Any], model: tuple[int, int]) -> dict[str, Any]:
    """How the image is brought to the model's size: stretched, or its shorter side scaled; then the middle is cut."""
    size, crop = what["size"], _sides(what.get("crop_size", model), "crop_size")
    shorter = size.get("shortest_edge") if isinstance(size, dict) else None
    if not what["do_center_crop"]:
        if shorter is not None or _sides(size, "size") != model:
            raise _impossible("size", size, f": the model takes {model[0]}x{model[1]}")
        return {"crop_pct": 1.0, "crop_mode": "squash"}
    if crop != model:
        raise _impossible("crop_size", what["crop_size"], f": the model takes {model[0]}x{model[1]}")
    scaled = _sides(size if shorter is None else shorter, "size")
    share = _share(crop[0], scaled[0])
    if math.floor(crop[1] / share) != scaled[1] or share > 1:
        raise _impossible("size", size, f" with a crop of {crop[0]}x{crop[1]}")
    return {"crop_pct": share, "crop_mode": "squash" if shorter is None else "center"}


def _share(crop: int, size: int) -> float:
    """`crop` of `size`, so that timm, which divides and rounds down, comes to `size` again."""
    share = crop / size
    while math.floor(crop / share) < size:
        share = math.nextafter(share, 0)
    return share


def _sides(size: Any, key: str) -> tuple[int, int]:
    sides = (size.get("height"), size.get("width")) if isinstance(size, dict) else size
    sides = (sides, sides) if isinstance(sides, int) else tuple(sides) if isinstance(sides, (list, tuple)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise _impossible(key, size)
    return sides


def _impossible(key: str, value: Any, why: str = "") -> CheckpointError:
    return CheckpointError(
        f"its preprocessor_config.json has {key} {value!r}{why}, which cannot be done with timm's transforms",
        "take the weights alone: a timm name with --checkpoint FILE, and say there how images are prepared",
    )
