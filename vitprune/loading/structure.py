"""A timm architecture with arguments of one's own, built without weights to see whether it can be used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from vitprune.backbones import check_whole_patches, input_size, wrap
from vitprune.checkpoint.metadata import REACHES_OUT
from vitprune.common.formatting import close_match, first_line
from vitprune.errors import UsageError, VitpruneError


def structure(name: str, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> nn.Module:
    """The model that timm builds with arguments, of which the user gave some, on the meta device.

    Raises:
        UnsupportedModelError: its tokens cannot be pruned.
        UsageError: an argument that it does not have, or a value that it cannot have.
    """
    for key in given.keys() & REACHES_OUT:
        raise UsageError(f"--model-kwargs {key} is no argument of a model's structure", "leave it out")
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, **arguments)
            wrap(model)
    except VitpruneError:
        raise
    except Exception as error:  # timm may stumble over a value in any way
        if not given:
            raise
        raise _refused(name, given, error) from error
    return model


def check_size(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Make sure that an image or patch size asked for leaves no pixels: timm leaves out what fills no patch.

    Raises:
        UsageError: the one is no multiple of the other.
    """
    if not arguments.keys().isdisjoint(("img_size", "patch_size")):
        check_whole_patches(model, input_size(model)[1:])


def _refused(name: str, given: Mapping[str, Any], error: Exception) -> UsageError:
    text = " ".join(f"{key}={value}" for key, value in given.items())
    unknown = next((key for key in given if f"'{key}'" in str(error) and "unexpected keyword" in str(error)), None)
    if unknown is None:
        return UsageError(f"timm cannot build '{name}' with --model-kwargs {text}: {first_line(error)}")
    with torch.device("meta"):
        known = [*inspect.signature(type(timm.create_model(name)).__init__).parameters]
    near = close_match(unknown, known)
    return UsageError(
        f"--model-kwargs {unknown}: '{name}' has no such argument",
        f"did you mean {near}?" if near else f"it has {', '.join(known[1:])}",
    )
