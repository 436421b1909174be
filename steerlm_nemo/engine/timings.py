"""How long requests took, as counts by size: cheap enough to be kept for every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Histogram:
    """Of seconds, by upper bounds that belong to what they bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # the last: beyond all bounds
        self.total = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.total += seconds * times


@dataclass
class Timings:
    """Since the start. The time of a request, and of its rows, begins when it is put in the queue."""

    queue: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))  # of each row, until the engine took it
    first_token: Histogram = field(default_factory=lambda: Histogram(_TOKEN_S))  # of each row
    between_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_S))  # of each further token of a row
    request: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))  # answered in full
    prompt_tokens: int = 0  # of rows that the engine took
