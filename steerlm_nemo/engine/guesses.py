"""What constrained rows chose lately, to guess what the next one will choose.

Guesses only decide what is computed together (speculative decoding, arXiv:2211.17192, with counts as the draft model):
a wrong one costs time, never a label.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

Options = tuple[tuple[int, ...], ...]
_MEMORY = 256  # choices after which older ones count half, so that guesses follow the data


class Guesses:
    """Counts per constraint step, its options, and the choice before: the attributes of a line go together."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, Options, int], Counter[int]] = {}

    def likeliest(self, step: int, options: Options, previous: int, taken: tuple[int, ...]) -> tuple[int, float]:
        """The likeliest option (its place) among those that begin with `taken`, and its share of what was seen."""
        seen = self._seen.get((step, options, previous))
        if seen is None:
            return 0, 0.0
        counts = {place: count for place, count in seen.items() if options[place][: len(taken)] == taken}
        best = max(counts, key=counts.__getitem__, default=0)
        return best, counts.get(best, 0) / (sum(counts.values()) + 1)

    def saw(self, step: int, options: Options, previous: int, place: int) -> None:
        seen = self._seen.setdefault((step, options, previous), Counter())
        seen[place] += 1
        if seen.total() > _MEMORY:
            for place in list(seen):
                seen[place] //= 2


@lru_cache(maxsize=4096)
def branches(options: Options, taken: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that may follow `taken`, lowest first: of equal ones the lowest is chosen."""
    return tuple(sorted({option[len(taken)] for option in options if option[: len(taken)] == taken}))
