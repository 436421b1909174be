"""Which keys and values are in the cache, and whose they are: the bookkeeping of rank 0.

A place holds the keys and values of one token, in all layers. What they are depends on that token and those before it
only, so rows that begin alike share places. A row's line in the tables stays when it has ended, until its line or its
places are needed: whatever begins like it takes its places over. Least recently used lines go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NO_TOKEN = -1


@dataclass
class Prefix:
    """The longest beginning of a prompt that some line has."""

    line: int
    length: int  # tokens whose keys and values are there
    expected: int  # tokens that will be there when the line's prompt is computed; >= length


class KVCache:
    """`num_lines` rows of at most `context_length` tokens, in `num_places` places shared by all."""

    def __init__(self, num_lines: int, num_places: int, context_length: int) -> None:
        self.tokens = np.full((num_lines, context_length), _NO_TOKEN, np.int32)
        self.places = np.zeros((num_lines, context_length), np.int64)
        self.lengths = np.zeros(num_lines, np.int64)  # tokens computed
        self._users = np.zeros(num_places, np.int32)  # lines that hold each place
        self._free = list(range(num_places - 1, -1, -1))
        self._promised = np.zeros(num_lines, np.int64)  # places that running rows may still ask for
        self._last_use = np.zeros(num_lines, np.int64)
        self._clock = 0
        self._running = np.zeros(num_lines, bool)
        self.num_evicted_tokens = 0

    def longest_prefix(self, prompt: np.ndarray) -> Prefix:
        """The last token of `prompt` is left to compute: its logits are wanted."""
        compared = prompt[:-1]
        if not len(compared):
            return Prefix(0, 0, 0)
        differs = self.tokens[:, : len(compared)] != compared
        same = np.where(differs.any(1), differs.argmax(1), len(compared))
        computed = np.minimum(same, self.lengths)
        line = int(computed.argmax())
        return Prefix(line, int(computed[line]), int(same[self._running].max(initial=0)))

    def open(self, prompt: np.ndarray, prefix: Prefix | None, max_length: int) -> int | None:
        """A line for a row that grows to `max_length`, beginning with the places of `prefix`. None: no room now."""
        shared = prefix.length if prefix else 0
        needed = max_length - shared
        keep = prefix.line if prefix and shared else None
        line = self._make_room(needed, keep)
        if line is None:
            return None
        if shared and prefix is not None:
            places = self.places[prefix.line, :shared].copy()
            self._users[places] += 1
            self._last_use[prefix.line] = self._tick()
        self._drop(line)
        if shared:
            self.places[line, :shared] = places
        self.tokens[line, : len(prompt)] = prompt
        self.lengths[line] = shared
        self._promised[line] = needed
        self._running[line] = True
        return line

    def extend(self, line: int, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Places for the next tokens of a line; they count as computed."""
        count, length = len(tokens), int(self.lengths[line])
        places = np.array(self._free[len(self._free) - count :], np.int64)
        del self._free[len(self._free) - count :]
        self._users[places] = 1
        self.tokens[line, length : length + count] = tokens
        self.places[line, length : length + count] = places
        self.lengths[line] = length + count
        self._promised[line] -= count
        return places

    def shrink(self, line: int, length: int) -> None:
        """Give back what a running row computed on trial, beyond its first `length` tokens."""
        dropped = self.places[line, length : self.lengths[line]]
        if not len(dropped):
            return
        self._users[dropped] -= 1
        self._free.extend(dropped[self._users[dropped] == 0].tolist())
        self._promised[line] += len(dropped)
        self.tokens[line, length : self.lengths[line]] = _NO_TOKEN
        self.lengths[line] = length

    def close(self, line: int) -> None:
        """The row has ended; what is computed stays for others until it is evicted."""
        self.tokens[line, self.lengths[line] :] = _NO_TOKEN
        self._promised[line] = 0
        self._running[line] = False
        self._last_use[line] = self._tick()

    def forget(self) -> None:
        """Drop everything that no running row holds."""
        for line in np.flatnonzero(~self._running):
            self._drop(int(line))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _make_room(self, needed: int, keep: int | None) -> int | None:
        """A line to use, with `needed` places free besides the promised ones; evicts, `keep` last of all."""
        idle = np.flatnonzero(~self._running)
        if not len(idle):
            return None
        # Lines without content first, then the least recently used.
        order = sorted(idle.tolist(), key=lambda line: (line == keep, self.lengths[line] > 0, self._last_use[line]))
        if order[0] == keep:
            return keep if self._has_room(needed) else None
        for line in order[:-1] if order[-1] == keep else order:
            if self._has_room(needed):
                break
            self._evict(line)
        return order[0] if self._has_room(needed) else None

    def _has_room(self, needed: int) -> bool:
        return len(self._free) - int(self._promised.sum()) >= needed

    def _evict(self, line: int) -> None:
        self.num_evicted_tokens += int(self.lengths[line])
        self._drop(line)

    def _drop(self, line: int) -> None:
        places = self.places[line, : self.lengths[line]]
        self._users[places] -= 1
        self._free.extend(places[self._users[places] == 0].tolist())
        self.tokens[line] = _NO_TOKEN
        self.lengths[line] = 0
