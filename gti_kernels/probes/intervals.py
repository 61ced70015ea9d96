"""Confidence intervals: of a mean, and of the slope of a line."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    from scipy import stats  # slow to import: only when an interval is asked for

    half = stats.t.ppf(0.5 + confidence / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    mean = float(np.mean(values))
    return mean - float(half), mean + float(half)


def slope_interval(
    x: Sequence[float], y: Sequence[float], confidence: float = 0.95
) -> tuple[float, Interval | None]:
    """Slope of the least-squares line through (x, y) and its t interval (n − 2 degrees of freedom).

    The slope is NaN for fewer than two points, the interval None for fewer than three.
    """
    n = len(x)
    if n < 2:
        return math.nan, None
    from scipy import stats

    fit = stats.linregress(x, y)
    slope = float(fit.slope)
    if n < 3:
        return slope, None
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 2) * fit.stderr)
    return slope, (slope - half, slope + half)
