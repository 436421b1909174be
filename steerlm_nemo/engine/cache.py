"""Which keys and values are in the cache, and whose they are: the bookkeeping of rank 0.

A place holds the keys and values of one token, in all layers. What they are depends on that token and those before it
only, so rows that begin alike share places. A row's line in the tables stays when it has ended, until its line or its
places are needed: whatever begins like it takes its places over. Least recently used lines go first.

Places are written before they are read in every layer of a forward pass, so a row may also take over what another one
computes in the same step, logits included. Log-probabilities that were asked for are kept beside the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NO_TOKEN = -1


@dataclass(frozen=True)
class Prefix:
    """The longest beginning of a row that some line has."""

    line: int
    length: int  # tokens whose keys and values are there, or will be at the end of this step
    expected: int  # tokens that a running row will have computed at last; >= length where waiting is worth anything
    remembered: int  # positions at the beginning whose next token's log-probability is known


class KVCache:
    """`num_lines` rows of at most `context_length` tokens, in `num_places` places shared by all."""

    def __init__(self, num_lines: int, num_places: int, context_length: int) -> None:
        self.tokens = np.full((num_lines, context_length), _NO_TOKEN, np.int32)
        self.places = np.zeros((num_lines, context_length), np.int64)
        self.lengths = np.zeros(num_lines, np.int64)  # tokens computed
        self.logprobs = np.zeros((num_lines, context_length), np.float32)  # of the token after each position
        self._remembered = np.zeros(num_lines, np.int64)  # positions at the beginning of which these are known
        self._lengths_before = self.lengths.copy()  # the step under way
        self._users = np.zeros(num_places, np.int32)  # lines that hold each place
        self._free = list(range(num_places - 1, -1, -1))
        self._promised = np.zeros(num_lines, np.int64)  # places that running rows may still ask for
        self._last_use = np.zeros(num_lines, np.int64)
        self._clock = 0
        self._running = np.zeros(num_lines, bool)
        self.num_evicted_tokens = 0

    @property
    def num_places(self) -> int:
        return len(self._users)

    def begin_step(self) -> None:
        """From now on, what `extend` adds is computed in one forward pass."""
        self._lengths_before = self.lengths.copy()

    def longest_prefix(self, ids: np.ndarray, first_wanted: int, *, takes_remembered: bool) -> Prefix:
        """What a row of `ids` can take over that wants the logits of every position from `first_wanted` on.

        Those it can have from a row that computes them in this step; where log-probabilities are enough
        (`takes_remembered`), from a line that has them.
        """
        differs = self.tokens[:, : len(ids)] != ids
        same = np.where(differs.any(1), differs.argmax(1), len(ids))
        computed = np.minimum(same, self.lengths)
        # The log-probability of the last token that is the same stands at the position before it.
        known = np.maximum(np.minimum(same - 1, self._remembered), 0) if takes_remembered else np.zeros_like(same)
        from_memory = np.maximum(first_wanted, known)
        keeps_up = self._lengths_before <= from_memory  # nothing that is wanted was computed in a step before
        usable = np.where(keeps_up, computed, np.minimum(computed, from_memory))
        coming = np.where(keeps_up, same, np.minimum(same, from_memory))
        line = int(usable.argmax())
        expected = int(coming[self._running].max(initial=0))
        return Prefix(line, int(usable[line]), expected, int(min(known[line], usable[line])))

    def open(self, ids: np.ndarray, prefix: Prefix | None, max_length: int) -> int | None:
        """A line for a row that grows to `max_length`, beginning with the places of `prefix`. None: no room now."""
        if prefix is not None and not prefix.length:
            prefix = None
        needed = max_length - (prefix.length if prefix else 0)
        line = self._make_room(needed, prefix.line if prefix else None)
        if line is None:
            return None
        if prefix is None:
            self._drop(line)
            self._lengths_before[line] = 0
        else:
            shared, known = prefix.length, prefix.remembered
            places, logprobs = self.places[prefix.line, :shared].copy(), self.logprobs[prefix.line, :known].copy()
            before = min(self._lengths_before[prefix.line], shared)
            self._users[places] += 1
            self._last_use[prefix.line] = self._tick()
            self._drop(line)
            self.places[line, :shared], self.logprobs[line, :known] = places, logprobs
            self.lengths[line], self._remembered[line], self._lengths_before[line] = shared, known, before
        self.tokens[line, : len(ids)] = ids
        self._promised[line] = needed
        self._running[line] = True
        return line

    def extend(self, line: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Find places for the next tokens of a line; they count as computed."""
        count, length = len(tokens), int(self.lengths[line])
        if not count:
            return
        places = self._free[-count:]
        del self._free[-count:]
        self._users[places] = 1
        self.tokens[line, length : length + count] = tokens
        self.places[line, length : length + count] = places
        self.lengths[line] = length + count
        self._promised[line] -= count

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

    def remember(self, line: int, first: int, logprobs: Sequence[float]) -> None:
        """Keep the log-probabilities of the tokens after positions first, first + 1, ... of a line.

        Only a beginning without gaps is of use to others.
        """
        if first <= self._remembered[line]:
            self.logprobs[line, first : first + len(logprobs)] = logprobs
            self._remembered[line] = max(self._remembered[line], first + len(logprobs))

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
        order = idle[np.lexsort((self._last_use[idle], self.lengths[idle] > 0, idle == keep))].tolist()
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
        self.lengths[line] = self._remembered[line] = 0
