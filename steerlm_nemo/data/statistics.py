"""How often each value of each attribute was given: what `-v` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class AttributeStatistics:
    """Counts of values. Memory grows with the number of different ones only."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.counts.setdefault(name, Counter())[value] += 1

    def table(self) -> str:
        """One line per attribute: how many, mean, range, and how many of each value."""
        rows = [f"{'attribute':18s} {'count':>8s} {'mean':>7s} {'min':>5s} {'max':>5s}  values"]
        for name, counts in self.counts.items():
            total = counts.total()
            mean = sum(value * count for value, count in counts.items()) / total
            values = "  ".join(f"{value:g}:{counts[value]}" for value in sorted(counts))
            rows.append(f"{name:18s} {total:8d} {mean:7.3f} {min(counts):5g} {max(counts):5g}  {values}")
        return "\n".join(rows)
