"""What a sample says of all images: upper bounds that hold for small samples too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

_STEPS = 60
"""Halvings: to the last bits of a number in [0, 1]."""


def upper_bound(losses: np.ndarray[Any, Any], delta: float) -> float:
    """A bound on the mean loss of all images, wrong with probability at most `delta` over samples.

    Of losses that are 0 or 1 Clopper and Pearson's (1934), which is exact; else Hoeffding and Bentkus' (Bates et al.
    2021, https://arxiv.org/abs/2101.02703, section 3.1).

    Args:
        losses: of a sample drawn at random, each in [0, 1], (n,).
        delta: in (0, 1).

    Returns:
        In [0, 1]; 1 of no images.
    """
    n, total = len(losses), float(losses.sum())
    if n == 0:
        return 1.0
    if _counts(losses):
        count = round(total)
        return _largest(lambda share: _at_most(count, n, share) > delta)
    mean = total / n
    return _largest(lambda bound: bound <= mean or _p_value(mean, n, bound) > delta)


def holds(losses: np.ndarray[Any, Any], risk: float, delta: float) -> bool:
    """Whether `upper_bound` is at most `risk`; quicker."""
    n, total = len(losses), float(losses.sum())
    if _counts(losses):
        return n > 0 and _at_most(round(total), n, risk) <= delta
    return total / n < risk and _p_value(total / n, n, risk) <= delta


def images_needed(risk: float, delta: float) -> int:
    """How many images it takes to bound a mean by `risk` if none of them loses anything."""
    return math.ceil(math.log(delta) / math.log1p(-risk))


def _counts(losses: np.ndarray[Any, Any]) -> bool:
    """Whether every loss is 0 or 1."""
    return bool(np.isin(losses, (0, 1)).all())


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest number in [0, 1] for which a condition holds that fails from somewhere on."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _p_value(mean: float, n: int, risk: float) -> float:
    """Of the hypothesis that the mean loss is above `risk`, a sample's being `mean`."""
    low = min(mean, risk)
    hoeffding = math.exp(-n * (_xlog(low, risk) + _xlog(1 - low, 1 - risk)))
    return min(hoeffding, math.e * _at_most(math.ceil(n * mean), n, risk))


def _xlog(x: float, y: float) -> float:
    """X log(x / y), 0 for x = 0."""
    return 0.0 if x == 0 else math.inf if y == 0 else x * math.log(x / y)


def _at_most(count: int, n: int, share: float) -> float:
    """Probability of at most `count` successes in `n` trials."""
    if count >= n:
        return 1.0
    if share in (0, 1):
        return float(share == 0)
    k = np.arange(count + 1)
    ways = math.lgamma(n + 1) - np.array([math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in k])
    return min(1.0, float(np.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share)).sum()))
