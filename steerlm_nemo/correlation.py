"""Pearson's and Spearman's correlation, the only ones here.

By numpy: scipy's take no counts (values of attributes are few and come in thousands, so pairs are counted), and scipy
would be a dependency of 40 MB for two formulas. The tests compare with scipy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Values = Sequence[float] | np.ndarray


def pearson(x: Values, y: Values, counts: Values | None = None) -> float | None:
    """Correlation; None where one side does not vary or there are fewer than two points.

    `counts` says how often each point occurs; without it, once.
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    times = np.ones(len(a)) if counts is None else np.asarray(counts, float)
    a, b, times = a[times > 0], b[times > 0], times[times > 0]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - np.average(a, weights=times), b - np.average(b, weights=times)
    return float((times * a * b).sum() / np.sqrt((times * a * a).sum() * (times * b * b).sum()))


def spearman(x: Values, y: Values) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None as for `pearson`."""
    return pearson(mean_ranks(x), mean_ranks(y))


def mean_ranks(values: Values) -> np.ndarray:
    """Ranks from 1; equal values get the mean of the ranks they cover."""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
