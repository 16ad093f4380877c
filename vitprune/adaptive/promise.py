"""From what passes gave for some images to a threshold, and what can be promised of all images like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vitprune.adaptive.bounds import holds, images_needed, upper_bound
from vitprune.errors import UsageError


class Watched(NamedTuple):
    """What one pass gave for every image.

    Attributes:
        certainty: how sure it was, in [0, 1], (n,).
        loss: what it loses against the dense model, in [0, 1], (n,): 1 for another answer, or the KL divergence.
        macs: multiply-accumulates of an image that ends there.
    """

    certainty: np.ndarray[Any, Any]
    loss: np.ndarray[Any, Any]
    macs: int


class Promise(NamedTuple):
    """A threshold and what holds with it.

    Attributes:
        threshold: images of at least this certainty stop.
        loss: mean over the calibration images.
        bound: on the mean loss of all images like these.
        confidence: with which the bound holds, over samples of calibration images.
        num_images: that it was chosen by.
        share_pct: of those that end in each pass, in percent.
        gmacs: mean over those images.
    """

    threshold: float
    loss: float
    bound: float
    confidence: float
    num_images: int
    share_pct: tuple[float, ...]
    gmacs: float


def promise(passes: Sequence[Watched], risk: float, confidence: float = 0.95) -> Promise:
    """The threshold at which the passes cost least, of those whose mean loss is at most `risk`.

    Thresholds are tried from the most careful one down, and the last before the first that fails is taken: of such a
    sequence, fixed before it is tried, the bounds hold together (fixed sequence testing; Angelopoulos et al. 2021,
    https://arxiv.org/abs/2110.01052, section 2).

    Args:
        passes: cheapest first, of the same images, which are a random sample.
        risk: the largest mean loss, in (0, 1).
        confidence: with which it is to hold.

    Raises:
        UsageError: there are too few images to promise that, or even the last pass loses too much.
    """
    delta, number = 1 - confidence, len(passes[0].loss)
    if (needed := images_needed(risk, delta)) > number:
        raise UsageError(
            f"{number} images are too few to promise a loss of at most {100 * risk:g} % with {100 * confidence:g} % "
            f"confidence: it takes {needed} if none of them loses anything",
            f"--calibrate {2 * needed}, or promise less",
        )
    kept = None
    for threshold in _thresholds(passes):
        found = ended(passes, threshold)
        losses = np.choose(found, [each.loss for each in passes])
        if not holds(losses, risk, delta):
            break
        kept = threshold, losses, found
    if kept is None:
        raise UsageError(
            f"with all images in the last pass the loss may be {100 * upper_bound(losses, delta):.2f} %, more than "
            f"{100 * risk:g} %",
            "promise less, or let the last pass be the dense model",
        )
    threshold, losses, found = kept
    shares = [100 * float((found == index).mean()) for index in range(len(passes))]
    gmacs = sum(share / 100 * each.macs for share, each in zip(shares, passes, strict=True)) / 1e9
    bound = upper_bound(losses, delta)
    return Promise(threshold, float(losses.mean()), bound, confidence, number, tuple(shares), gmacs)


def ended(passes: Sequence[Watched], threshold: float) -> np.ndarray[Any, Any]:
    """The pass in which each image ends, (n,)."""
    found = np.full(len(passes[0].loss), len(passes) - 1)
    for number in reversed(range(len(passes) - 1)):
        found[passes[number].certainty >= threshold] = number
    return found


def _thresholds(passes: Sequence[Watched]) -> list[float]:
    """All that make a difference, the highest first: above 1 no image stops early."""
    seen = np.unique(np.concatenate([each.certainty for each in passes[:-1]]))
    return [2.0, *seen[::-1].tolist()]
