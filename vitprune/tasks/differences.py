"""How far outputs are from a reference's, in units of how far the reference's lie apart: what a check can bound."""

from __future__ import annotations

import torch
from torch import Tensor

_OFFSET = 0.01
"""Units are at least this share of the outputs' size: rounding follows the size, and outputs that hardly vary from
image to image are known no better than their digits. In fp16 one digit is 0.001."""


def of_numbers(outputs: Tensor, reference: Tensor, unit: Tensor) -> Tensor:
    """The greatest difference of any number of an image, (N, ...) to (N,); `unit` is broadcast against them."""
    return ((outputs - reference).abs() / unit).flatten(1).amax(dim=1)


def of_vectors(outputs: Tensor, reference: Tensor) -> Tensor:
    """How long the difference of an image's vector is, of several their mean, over how long the reference's vectors are
    less their mean over the images: (N, ..., C) to (N,).

    Not number by number: of the features of 196 patches the one that is furthest off says little, and in fp16 nothing.
    And not the mean square: where rounding prunes one token instead of another, a few patches are far off.
    """
    apart = (reference - reference.mean(dim=0)).square().mean().sqrt()
    lengths = (outputs - reference).square().mean(dim=-1).sqrt()
    return lengths.reshape(len(lengths), -1).mean(dim=1) / _at_least(apart, reference.square().mean().sqrt())


def spread(reference: Tensor) -> Tensor:
    """The standard deviation of all numbers, a scalar."""
    return _at_least(reference.std(correction=0), reference.square().mean().sqrt())


def spread_of_each(reference: Tensor) -> Tensor:
    """The standard deviation of each number over the images, (N, L) to (L,)."""
    return _at_least(reference.std(dim=0, correction=0), reference.square().mean(dim=0).sqrt())


def _at_least(unit: Tensor, size: Tensor) -> Tensor:
    """A unit, but not less than rounding to the outputs' size allows."""
    return torch.maximum(unit, _OFFSET * size).clamp(min=torch.finfo(torch.float32).tiny)
