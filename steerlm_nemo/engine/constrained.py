"""A row that is led: what it may choose at each step of a constraint, and what it has chosen.

It computes ahead: the options that rows like it chose lately are fed as if they had been chosen, and the logits of all
those places come from one forward pass. What the model then chooses decides; from the first option that differs, what
was computed is given back. So the line is the same, and takes a few passes instead of one per choice (speculative
decoding, arXiv:2211.17192, with counts as the draft model).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from steerlm_nemo.engine.protocol import Choice

# What is fed on trial is right at least so often.
_WORTH_GUESSING = 0.75
_MEMORY = 256  # choices after which older ones count half, so that guesses follow the data

Options = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Branching:
    """The tokens that may come next, lowest first (of equal ones the lowest is chosen), and where each leads."""

    tokens: tuple[int, ...]
    token_ids: np.ndarray  # the same
    options: tuple[tuple[int, ...], ...]  # places of the options that go on with each token


class Step:
    """Token sequences of which one is to be chosen."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._branchings: dict[tuple[int, ...], Branching] = {}

    def after(self, taken: tuple[int, ...]) -> Branching:
        """How the options go on that begin with `taken` and are longer."""
        if (branching := self._branchings.get(taken)) is None:
            leads: dict[int, list[int]] = {}
            for place, option in enumerate(self.options):
                if option[: len(taken)] == taken:
                    leads.setdefault(option[len(taken)], []).append(place)
            tokens = tuple(sorted(leads))
            places = tuple(tuple(leads[token]) for token in tokens)
            branching = self._branchings[taken] = Branching(tokens, np.array(tokens, np.int64), places)
        return branching


@lru_cache(maxsize=4096)
def _step(options: Options) -> Step:
    return Step(options)


@lru_cache(maxsize=1024)
def _steps(constraint: tuple[Options, ...]) -> tuple[Step, ...]:
    """Equal steps are the same object, whatever constraint they are from."""
    return tuple(map(_step, constraint))


class Guesses:
    """What rows chose lately: counts per step of a constraint and the choice before, as attributes go together."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, Step, int], Counter[int]] = {}

    def likeliest(self, number: int, step: Step, previous: int, taken: tuple[int, ...]) -> tuple[int, float]:
        """The likeliest option (its place) among those that begin with `taken`, and its share of what was seen."""
        seen = self._seen.get((number, step, previous))
        if seen is None:
            return 0, 0.0
        counts: dict[int, int] = seen
        if taken:
            counts = {place: n for place, n in seen.items() if step.options[place][: len(taken)] == taken}
        best = max(counts, key=counts.__getitem__, default=0)
        return best, counts.get(best, 0) / (sum(counts.values()) + 1)

    def saw(self, number: int, step: Step, previous: int, place: int) -> None:
        seen = self._seen.setdefault((number, step, previous), Counter())
        seen[place] += 1
        if seen.total() > _MEMORY:
            for place in list(seen):
                seen[place] //= 2


class Walk:
    """The way of one row through its constraint; `ids` are the row's tokens, which grow with every choice."""

    def __init__(self, constraint: tuple[Options, ...], ids: list[int], guesses: Guesses) -> None:
        self._steps = _steps(constraint)
        self._ids = ids
        self._guesses = guesses
        self._number = 0  # of the step
        self._taken: tuple[int, ...] = ()  # tokens of that step so far
        self._previous = -1  # what the last choice was, as a place among its options
        self._option_logprobs: list[float] = []  # of the step's options, as far as told apart
        self.guessed: list[int] = []  # tokens after `ids`, to be fed on trial
        self.asks: list[tuple[int, Branching]] = []  # position, what may come after it
        self.choices: list[Choice] = []
        self.num_overruled = 0
        self._follow_forced()

    @property
    def has_ended(self) -> bool:
        return self._number == len(self._steps)

    def ask(self, room: int) -> None:
        """Set `asks`, and `guessed`: how the line is likely to go on, as far as that is worth computing, and not
        longer than `room`."""
        number, taken, previous, chance = self._number, self._taken, self._previous, 1.0
        here = len(self._ids) - 1
        self.guessed = []
        self.asks = [(here, self._steps[number].after(taken))]
        while len(self.guessed) < room:
            step = self._steps[number]
            place, share = self._guesses.likeliest(number, step, previous, taken)
            chance *= share
            if chance < _WORTH_GUESSING:
                break
            option = step.options[place]
            for done in range(len(taken), len(option)):
                if done > len(taken) and len((branching := step.after(option[:done])).tokens) > 1:
                    self.asks.append((here + len(self.guessed), branching))
                self.guessed.append(option[done])
            number, taken, previous = number + 1, (), place
            while number < len(self._steps) and len(self._steps[number].options) == 1:
                self.guessed += self._steps[number].options[0]
                number += 1
            if number == len(self._steps):
                break
            self.asks.append((here + len(self.guessed), self._steps[number].after(())))
        self.asks = [ask for ask in self.asks if ask[0] <= here + room]
        del self.guessed[self.asks[-1][0] - here :]  # nothing is asked after these

    def choose(self, branching: Branching, logprobs: Sequence[float], best: int) -> None:
        """Take the likeliest of the tokens, `logprobs` being theirs and `best` the likeliest of the whole vocabulary,
        and all that must follow it."""
        chosen = logprobs.index(max(logprobs))
        self.num_overruled += best not in branching.tokens
        if not self._option_logprobs:
            self._option_logprobs = [0.0] * len(self._steps[self._number].options)
        for number, places in enumerate(branching.options):
            # Options that stay together behind a token that is not taken share its probability.
            logprob = logprobs[number] - (math.log(len(places)) if number != chosen else 0.0)
            for place in places:
                self._option_logprobs[place] += logprob
        self._ids.append(branching.tokens[chosen])
        self._taken += (branching.tokens[chosen],)
        self._follow_forced()

    def _follow_forced(self) -> None:
        while self._number < len(self._steps):
            step = self._steps[self._number]
            if self._taken in step.options:
                if len(step.options) > 1:
                    place = step.options.index(self._taken)
                    self._guesses.saw(self._number, step, self._previous, place)
                    self.choices.append(Choice(place, tuple(self._option_logprobs)))
                    self._previous = place
                self._number, self._taken, self._option_logprobs = self._number + 1, (), []
                continue
            tokens = step.after(self._taken).tokens
            if len(tokens) > 1:
                return
            self._ids.append(tokens[0])
            self._taken += tokens
