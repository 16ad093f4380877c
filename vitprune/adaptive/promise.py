"""From what passes gave for some images to a threshold, and what can be promised of all images like them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vitprune.adaptive.bounds import holds, images_needed, upper_bound
from vitprune.errors import UsageError

_CHOOSING = 0.2
"""Share of the images that choose one of several cascades; the others test it."""


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


Cascade = Sequence[Watched]
"""Passes, cheapest first, of the same images, which are a random sample."""


class Promise(NamedTuple):
    """A threshold and what holds with it.

    Attributes:
        threshold: images of at least this certainty stop.
        loss: mean over the images that tested it.
        bound: on the mean loss of all images like these.
        confidence: with which the bound holds, over samples of such images.
        num_images: that tested it.
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


def cheapest_promise(cascades: Sequence[Cascade], risk: float, confidence: float = 0.95) -> tuple[int, Promise]:
    """The cascade that seems to cost least, and its `promise`.

    Of several a fifth of the images, drawn at random, choose, see `_expected_cost`. The others test that one alone, so
    that what is promised holds as if nobody had chosen. To test all of them on all images, each with a part of the
    error, costs more (simulated in tests/adaptive): for 99 % fidelity one of 480 images may lose something at 95 %
    confidence, but none of 600 at 99 %.

    Args:
        cascades: of the same images.
        risk: the largest mean loss, in (0, 1).
        confidence: with which it is to hold.

    Returns:
        The number of the cascade, and its promise.

    Raises:
        UsageError: see `promise`.
    """
    number, several = len(cascades[0][0].loss), len(cascades) > 1
    check_enough(number, risk, confidence, several=several)
    if not several:
        return 0, promise(cascades[0], risk, confidence)
    order = np.random.default_rng(0).permutation(number)
    choosing, testing = np.split(order, [int(_CHOOSING * number)])
    costs = [_expected_cost(_rows(cascade, choosing), risk) for cascade in cascades]
    chosen = int(np.argmin(costs))
    return chosen, promise(_rows(cascades[chosen], testing), risk, confidence)


def promise(passes: Cascade, risk: float, confidence: float = 0.95) -> Promise:
    """The threshold at which the passes cost least, of those whose mean loss is at most `risk`.

    Thresholds are tried from the most careful one down, and the last before the first that fails is taken: of such a
    sequence, fixed before it is tried, the bounds hold together (fixed sequence testing; Angelopoulos et al. 2021,
    https://arxiv.org/abs/2110.01052, section 2).

    Args:
        passes: see `Cascade`.
        risk: the largest mean loss, in (0, 1).
        confidence: with which it is to hold.

    Raises:
        UsageError: there are too few images to promise that, or even the last pass loses too much.
    """
    delta, number = 1 - confidence, len(passes[0].loss)
    check_enough(number, risk, confidence)
    kept = None
    for threshold in _thresholds(passes):
        found, losses = _decided(passes, threshold)
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
    gmacs = _mean_macs(passes, found) / 1e9
    return Promise(
        threshold, float(losses.mean()), upper_bound(losses, delta), confidence, number, tuple(shares), gmacs
    )


def check_enough(number: int, risk: float, confidence: float, *, several: bool = False) -> None:
    """Make sure that so many images can promise that; `several` cascades to choose from need a fourth more.

    Raises:
        UsageError: they are too few, whatever they show.
    """
    needed = images_needed(risk, 1 - confidence)
    needed = math.ceil(needed / (1 - _CHOOSING)) if several else needed
    if number < needed:
        fixed = ", or fix the keep ratio: --keep R" if several else ""
        raise UsageError(
            f"{number} images are too few to promise a loss of at most {100 * risk:g} % with {100 * confidence:g} % "
            f"confidence: it takes {needed} if none of them loses anything",
            f"--calibrate {2 * needed}, or promise less{fixed}",
        )


def ended(passes: Cascade, threshold: float) -> np.ndarray[Any, Any]:
    """The pass in which each image ends, (n,)."""
    found = np.full(len(passes[0].loss), len(passes) - 1)
    for number in reversed(range(len(passes) - 1)):
        found[passes[number].certainty >= threshold] = number
    return found


def _decided(passes: Cascade, threshold: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The pass in which each image ends, and what it loses there."""
    found = ended(passes, threshold)
    return found, np.choose(found, [each.loss for each in passes])


def _mean_macs(passes: Cascade, found: np.ndarray[Any, Any]) -> float:
    return float(np.array([each.macs for each in passes])[found].mean())


def _expected_cost(passes: Cascade, risk: float) -> float:
    """What these images say of a cascade: the least mean cost at which they lose at most `risk`, twice of it and so on.

    The mean of these: few images say little of the threshold for one risk, which hangs on one or two of them.
    """
    decided = [_decided(passes, threshold) for threshold in _thresholds(passes)]
    costs = np.array([_mean_macs(passes, found) for found, _ in decided])
    lost = np.array([losses.mean() for _, losses in decided])
    return float(np.mean([costs[lost <= times * risk].min(initial=np.inf) for times in range(1, 6)]))


def _rows(passes: Cascade, rows: np.ndarray[Any, Any]) -> Cascade:
    return [Watched(each.certainty[rows], each.loss[rows], each.macs) for each in passes]


def _thresholds(passes: Cascade) -> list[float]:
    """All that make a difference, the highest first: above 1 no image stops early."""
    seen = np.unique(np.concatenate([each.certainty for each in passes[:-1]]))
    return [2.0, *seen[::-1].tolist()]
