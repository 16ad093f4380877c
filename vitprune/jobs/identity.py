"""What decides the result of a run: who resumes it must have the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.backbones import preprocessing
from vitprune.data import Data, Images, ImageStream
from vitprune.data.torch_data import TorchImages
from vitprune.loading.load import Loaded
from vitprune.schedule import Sparsity
from vitprune.training.recipe import Recipe

_MOST_FILES, _MOST_ROWS = 2000, 50
"""Whose size is asked for."""
_ROUNDING_ONLY = {"num_workers", "name", "grad_accum", "compile"}
"""Settings of a recipe that change at most the rounding."""


def identity(loaded: Loaded, data: Data, recipe: Recipe, sparsity: Sparsity) -> dict[str, Any]:
    """Model, weights, images, plan and recipe by name, in JSON's types; weights and images as fingerprints.

    Not in it is what may change between two parts of a run: the device, the number of processes, how it is measured.
    """
    return {
        **recipe.model_dump(mode="json", exclude=_ROUNDING_ONLY),
        **asdict(sparsity),  # after the recipe, which has defaults of the plan
        "model": loaded.name,
        "task": loaded.task,
        "model weights": fingerprint_of_weights(loaded.model),
        "preprocessing": preprocessing(loaded.model),
        "training images": None if data.train is None else fingerprint_of_images(data.train),
        "validation images": fingerprint_of_images(data.val),
    }


def fingerprint_of_weights(model: nn.Module) -> str:
    """Of every bit of them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def fingerprint_of_images(images: Images) -> str:
    """Of all names and classes, and of some sizes: of 2,000 files in bytes, of 50 rows of a table in pixels.

    Folders may have moved: of a path only the last folder counts. Of a stream only its name, shards and classes are
    known before it is read, of a torch Dataset its kind and length.
    """
    digest = hashlib.sha256()
    for part in _parts(images):
        digest.update(part + b"\0")
    number = f"{images.num_shards} shards" if isinstance(images, ImageStream) else f"{len(images)} images"
    return f"{number} ({digest.hexdigest()[:12]})"


def _parts(images: Images) -> Iterator[bytes]:
    if isinstance(images, ImageStream):
        yield os.fsencode(Path(images.source).name)
        yield repr(sorted((str(value), index) for value, index in images.labels.index.items())).encode()
        yield repr(images.labels.reading).encode()
        return
    if isinstance(images, TorchImages):  # what it gives may be random, and take long
        yield f"{type(getattr(images.read, '__self__', images.read)).__name__} {list(images.items)}".encode()
        return
    most = _MOST_FILES if len(images) and isinstance(images.items[0], Path) else _MOST_ROWS
    for item, label in zip(images.items, images.labels, strict=True):
        name = "/".join(item.parts[-2:]) if isinstance(item, Path) else str(item)
        yield os.fsencode(name) + (str(label.tolist()) if isinstance(label, Tensor) else str(label)).encode()
    for item in images.items[:: max(1, -(-len(images) // most))]:
        size: Any
        try:
            size = item.stat().st_size if isinstance(item, Path) else images.read(item).size
        except Exception as error:  # of a decoder, which raises anything
            size = type(error).__name__
        yield str(size).encode()
