"""A run in one sentence, which never flatters."""

from __future__ import annotations

from vitprune.common.formatting import number, signed
from vitprune.report.schema import Report


def verdict(report: Report) -> str:
    """What was lost and what was gained."""
    return f"{_speed(report)}; {_accuracy(report)}{_beside_random(report)}."


def _speed(report: Report) -> str:
    rows = report.delta.speedup
    largest = rows[-1]
    change = report.delta.gmacs_pct
    cost = f"{number(abs(change), 1)} % {'fewer' if change <= 0 else 'more'} GMACs"
    others = [f"{number(row.speedup)} x at batch {row.batch_size}" for row in rows[:-1]]
    also = f" ({', '.join(others)})" if others else ""
    if largest.slower:
        start = f"With {cost} it is slower than the dense model at batch {largest.batch_size}"
        return f"{start}: {number(largest.speedup)} x{also}"
    lead = (
        f"With {cost} it is {number(largest.speedup)} x as fast as the dense model at batch {largest.batch_size}{also}"
    )
    slow = [str(row.batch_size) for row in rows if row.slower]
    return f"{lead}, and slower at batch {', '.join(slow)}" if slow else lead


def _beside_random(report: Report) -> str:
    """Said at once where training has not paid."""
    points = report.delta.top1_points_over_random
    if points is None or points >= 0:
        return ""
    return f"; as many tokens at random, untrained, are {number(-points)} points better"


def _accuracy(report: Report) -> str:
    delta, images = report.delta, f"{report.sparse.num_images} images"
    if delta.top1_points is None or delta.top1_points_ci95 is None:
        return f"it gives the dense model's answer on {number(delta.agreement_pct, 1)} % of {images} without labels"
    low, high = delta.top1_points_ci95
    change = f"top-1 changes by {signed(delta.top1_points)} points on {images}"
    interval = f"(95 %: {signed(low)} to {signed(high)})"
    if high < 0:
        return f"{change} {interval}, a loss"
    if low > 0:
        return f"{change} {interval}, a gain"
    return f"{change} {interval}, which so many images cannot tell from no change"
