"""One forward pass as integers: what rank 0 decides and every rank carries out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """The same on every rank. All arrays are int64.

    The tables `line, position -> place` of the ranks take `table` [3, entries] first.
    """

    tokens: np.ndarray  # [T], row after row
    positions: np.ndarray  # [T]
    places: np.ndarray  # [T] where keys and values go
    lines: np.ndarray  # [rows] of the table
    num_new: np.ndarray  # [rows] tokens of each row in this step
    totals: np.ndarray  # [rows] length of each row after this step
    wanted: np.ndarray  # places in the step whose logits are wanted
    table: np.ndarray  # [3, entries] line, position, place

    def pack(self) -> np.ndarray:
        """Everything as one int64 array, its own length first."""
        parts = (self.tokens, self.positions, self.places, self.lines, self.num_new, self.totals, self.wanted)
        flat = np.concatenate([*parts, self.table.ravel()])
        sizes = [len(flat) + 4, len(self.tokens), len(self.lines), len(self.wanted)]
        return np.concatenate([np.array(sizes, np.int64), flat])

    @classmethod
    def unpack(cls, packed: np.ndarray) -> StepPlan:
        _, num_tokens, num_rows, num_wanted = packed[:4].tolist()
        counts = [num_tokens] * 3 + [num_rows] * 3 + [num_wanted]
        tokens, positions, places, lines, num_new, totals, wanted, table = np.split(packed[4:], np.cumsum(counts))
        return cls(tokens, positions, places, lines, num_new, totals, wanted, table.reshape(3, -1))
