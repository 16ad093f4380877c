"""Every architecture of the installed timm: what it costs dense and sparse, or why its tokens cannot be dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import timm
import torch

from vitprune.backbones import family_of, input_size, why_not, wrap
from vitprune.errors import UsageError
from vitprune.measure import count_macs, count_params
from vitprune.model import attach, attach_as
from vitprune.schedule import Sparsity


@dataclass(frozen=True)
class Entry:
    """One architecture at the input size of its default weights.

    Attributes:
        name: for timm.create_model.
        family: name of timm's module that defines its class.
        reason: why its tokens cannot be dropped; None if they can. Then the others say:
        num_patches: N.
        num_prefix_tokens: P.
        num_classes: of its default weights; 0 without a classifier, which training needs.
        input_size: (C, H, W).
        params_m: parameters of the dense model, in millions.
        gmacs: of the dense model.
        gmacs_sparse: with predictors.
    """

    name: str
    family: str
    reason: str | None = None
    num_patches: int | None = None
    num_prefix_tokens: int | None = None
    num_classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    params_m: float | None = None
    gmacs: float | None = None
    gmacs_sparse: float | None = None


def look_up(names: Sequence[str], sparsity: Sparsity) -> Iterator[Entry]:
    """Build each architecture without its weights and see."""
    for name in names:
        yield _entry(name, sparsity)


def _entry(name: str, sparsity: Sparsity) -> Entry:
    with torch.device("meta"):
        model = timm.create_model(name)
    family, reason = family_of(model), why_not(model)
    if reason is not None:
        return Entry(name, family, reason)
    backbone = wrap(model)
    try:
        sparse = attach_as(model, sparsity)
    except UsageError as error:  # stages that this depth does not have
        return Entry(name, family, error.message)
    size = input_size(model)
    return Entry(
        name,
        family,
        num_patches=backbone.num_patches,
        num_prefix_tokens=backbone.num_prefix_tokens,
        num_classes=backbone.num_classes,
        input_size=size,
        params_m=count_params(model) / 1e6,
        gmacs=count_macs(attach(model, keep=1.0), size) / 1e9,
        gmacs_sparse=count_macs(sparse, size) / 1e9,
    )
