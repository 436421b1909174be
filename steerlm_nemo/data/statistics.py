"""How often each grade of each attribute was given: what `-v` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class AttributeStatistics:
    """Counts of grades. Memory grows with the number of different grades only."""

    def __init__(self) -> None:
        self.grades: dict[str, Counter[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.grades.setdefault(name, Counter())[value] += 1

    def table(self) -> str:
        """One line per attribute: how many, mean, range, and how many of each grade."""
        rows = [f"{'attribute':18s} {'count':>8s} {'mean':>7s} {'min':>5s} {'max':>5s}  grades"]
        for name, counts in self.grades.items():
            total = counts.total()
            mean = sum(value * count for value, count in counts.items()) / total
            grades = "  ".join(f"{value:g}:{counts[value]}" for value in sorted(counts))
            rows.append(f"{name:18s} {total:8d} {mean:7.3f} {min(counts):5g} {max(counts):5g}  {grades}")
        return "\n".join(rows)
