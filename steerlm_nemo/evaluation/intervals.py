"""Bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 500


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
