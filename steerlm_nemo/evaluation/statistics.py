"""Correlations and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 500


def pearson(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Correlation; None where one side does not vary or there are fewer than two points."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None as for `pearson`."""
    return pearson(mean_ranks(x), mean_ranks(y))


def mean_ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of the ranks they cover."""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def bootstrap_interval(
    groups: Sequence[object], statistic: Callable[[list[object]], float | None], seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of a statistic when whole groups (here: prompts) are drawn again.

    Resamples without a value are left out; None if none has one.
    """
    rng = np.random.default_rng(seed)
    values = [
        value
        for _ in range(NUM_RESAMPLES)
        if (value := statistic([groups[i] for i in rng.integers(len(groups), size=len(groups))])) is not None
    ]
    if not values:
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
