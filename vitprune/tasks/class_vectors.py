"""Vectors of classes by a text tower, out of a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitprune.errors import DataError

_NAMES = "class_names"


@dataclass(frozen=True)
class ClassVectors:
    """One vector a class, by name, of unit length: (num_classes, D)."""

    names: tuple[str, ...]
    vectors: Tensor


def read_class_vectors(path: Path, width: int) -> ClassVectors:
    """Read a .safetensors file with one tensor (num_classes, D), D the width, and the names as a list, "class_names".

    Raises:
        DataError: it cannot be read, has another shape, or not one name a class.
    """
    way = f"a .safetensors file with one tensor (classes, {width}) and its metadata's '{_NAMES}', a JSON list"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = (file.metadata() or {}).get(_NAMES)
        names = None if said is None else json.loads(said)
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"the class embeddings '{path}' cannot be read: {error}", way, exit_code=2) from error
    if len(tensors) != 1 or next(iter(tensors.values())).ndim != 2:
        shapes = [f"{name} {tuple(each.shape)}" for name, each in tensors.items()]
        held = shapes[0] if len(shapes) == 1 else f"{len(shapes)} tensors"
        raise DataError(f"'{path}' holds {held}, not one vector a class", way)
    (vectors,) = tensors.values()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"'{path}' does not say the classes' names", way)
    if len(names) != len(vectors) or len(set(names)) < len(names):
        raise DataError(f"'{path}' names {len(set(names))} different classes and has {len(vectors)} vectors", way)
    if vectors.shape[1] != width:
        raise DataError(
            f"'{path}' has vectors of {vectors.shape[1]} numbers, and the model's embedding has {width}",
            "take those of the text tower that was trained with it",
        )
    vectors = vectors.float()
    if not bool(vectors.isfinite().all()) or bool((vectors.norm(dim=1) == 0).any()):
        raise DataError(f"'{path}' has vectors that are not finite or zero", way)
    return ClassVectors(tuple(names), F.normalize(vectors, dim=1))
