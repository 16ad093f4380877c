"""What every threshold would give for images whose passes are known: nothing has to run again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vitprune.adaptive.promise import Watched, ended


class Reached(NamedTuple):
    """What one threshold gives for some images.

    Attributes:
        threshold: images of at least this certainty stop; above 1 none does.
        went_on_pct: share that does not end in the first pass, in percent.
        loss: mean over the images.
        gmacs_mean: likewise.
        first: which model the first pass is, where there are several to choose from.
    """

    threshold: float
    went_on_pct: float
    loss: float
    gmacs_mean: float
    first: str = ""


def curve(passes: Sequence[Watched], first: str = "", most: int = 60) -> list[Reached]:
    """What thresholds give, the cheapest first: from all images ending in the first pass to none.

    It is of these images: a threshold that was picked from it promises nothing of others, see `promise`.

    Args:
        passes: cheapest first, of the same images.
        first: what to call the first pass.
        most: thresholds, evenly among those that make a difference.
    """
    seen = np.unique(np.concatenate([each.certainty for each in passes[:-1]]))
    some = np.unique(np.linspace(0, len(seen) - 1, min(most, len(seen))).round().astype(int))
    losses, macs = [each.loss for each in passes], np.array([each.macs for each in passes])
    points = []
    for threshold in [*seen[some].tolist(), 2.0]:
        found = ended(passes, threshold)
        loss, gmacs = float(np.choose(found, losses).mean()), float(macs[found].mean()) / 1e9
        points.append(Reached(threshold, 100 * float((found > 0).mean()), loss, gmacs, first))
    return points


def worthwhile(points: Iterable[Reached]) -> list[Reached]:
    """Those that lose less than every cheaper one, the cheapest first."""
    least, found = math.inf, []
    for each in sorted(points, key=lambda point: (point.gmacs_mean, point.loss)):
        if each.loss < least:
            least = each.loss
            found.append(each)
    return found
