"""Rank 0's plan of each forward pass: which rows take part, with which tokens, and what their logits mean.

Rows join and leave between steps. A step takes the pending tokens of every row (the one just drawn, with the forced
ones after it), and fills up with pieces of prompts, so that a long prompt does not stall the rows that generate.

A constrained row computes ahead: the values that rows like it chose lately are fed as if they had been chosen, and the
logits of all those places come from one forward pass. What the model then chooses decides; from the first value that
differs, what was computed is given back. So the line is the same, and takes a few passes instead of one per value.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from steerlm_nemo.engine.cache import KVCache
from steerlm_nemo.engine.draw import drawn_tokens, greedy_tokens
from steerlm_nemo.engine.guesses import Guesses, branches
from steerlm_nemo.engine.protocol import (
    Choice,
    Completion,
    EngineCounters,
    Event,
    Failed,
    Finished,
    ModelInfo,
    Sample,
    TokenMade,
)
from steerlm_nemo.engine.text import last_text

# A row waits for a neighbour that is about to compute so many more tokens of its prompt than the cache has.
_WORTH_WAITING_FOR = 8
# What is fed on trial is right at least so often.
_WORTH_GUESSING = 0.75


class DrawError(RuntimeError):
    """The model's logits are no numbers, so no token can be drawn; the row is given up."""


@dataclass(frozen=True)
class StepPlan:
    """One forward pass, the same on every rank. All arrays are int64.

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


@dataclass(eq=False)
class _Row:
    """One prompt while it is being continued."""

    number: int
    sample: Sample
    ids: list[int]  # prompt, what was drawn, and what is forced after it
    generator: torch.Generator | None
    line: int = -1  # of the cache
    fed: int = 0  # tokens whose keys and values are in the cache
    num_fed_now: int = 0  # in the step under way, guessed ones included
    wanted: range | list[int] = field(default_factory=list)  # positions whose logits the step under way is to give
    num_told: int = 0  # generated tokens in events
    ends: str | None = None  # finish_reason; only log-probabilities are still to come
    step: int = 0  # of the constraint
    taken: tuple[int, ...] = ()  # tokens of that step so far
    previous: int = -1  # what the last choice was, as a place among its options
    guessed: list[int] = field(default_factory=list)  # tokens after `ids`, fed on trial
    asks: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # position, tokens permitted after it
    option_logprobs: list[float] = field(default_factory=list)  # of the step's options, as far as told apart
    choices: list[Choice] = field(default_factory=list)
    num_overruled: int = 0
    logprob: list[float] = field(default_factory=list)
    full_logprob: list[list[float]] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.ids) - len(self.sample.prompt_ids)

    @property
    def first_scored(self) -> int | None:
        """The first position whose logits are asked for as such; None: only the last one's, to draw."""
        sample = self.sample
        if sample.compute_logprob or sample.all_probs:
            return 0
        if sample.token_logprobs or sample.top_logprobs:
            return len(sample.prompt_ids) - 1
        return None

    def completion(self) -> Completion:
        sample, num_prompt = self.sample, len(self.sample.prompt_ids)
        before = num_prompt - 1 if self.first_scored == 0 else 0  # scores of the prompt in `logprob`
        return Completion(
            token_ids=tuple(self.ids),
            num_prompt_tokens=num_prompt,
            finish_reason=self.ends or "length",
            logprob=tuple(self.logprob) if sample.compute_logprob else None,
            full_logprob=self.full_logprob if sample.all_probs else None,
            num_overruled=self.num_overruled,
            token_logprobs=tuple(self.logprob[before:]) if sample.token_logprobs else None,
            top_logprobs=tuple(self.top_logprobs) if sample.top_logprobs else None,
            choices=tuple(self.choices),
        )


class Scheduler:
    """Rows from `add` to their last event; the forward passes themselves are the caller's."""

    def __init__(
        self, cache: KVCache, info: ModelInfo, max_rows: int, max_step_tokens: int, prefix_reuse: bool
    ) -> None:
        self._cache = cache
        self._info = info
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._prefix_reuse = prefix_reuse
        self._num_rows = 0
        self._waiting: deque[_Row] = deque()
        self._running: dict[int, _Row] = {}
        self._in_step: list[_Row] = []
        self._joined: list[tuple[int, int]] = []  # (line, tokens it takes over) since the last step
        self._guesses = Guesses()
        self.counters = EngineCounters()

    def add(self, sample: Sample) -> int:
        self._num_rows += 1
        generator = None if sample.greedy else torch.Generator()
        if generator is not None:
            if sample.random_seed is None:
                generator.seed()
            else:
                generator.manual_seed(sample.random_seed)
        row = _Row(self._num_rows, sample, list(sample.prompt_ids), generator)
        if sample.constraint:
            self._follow_forced(row)
        self._waiting.append(row)
        return self._num_rows

    def cancel(self, number: int) -> None:
        if row := self._running.get(number):
            self._leave(row)
        else:
            self._waiting = deque(row for row in self._waiting if row.number != number)

    def fail_running(self, error: Exception) -> list[Event]:
        """Give up every row of the engine; nothing in the cache can be trusted any more."""
        rows = list(self._running.values())
        for row in rows:
            self._leave(row)
        self._joined.clear()
        self._in_step = []
        self._cache.forget()
        return [Failed(row.number, error) for row in rows]

    def plan(self) -> StepPlan | None:
        """The next forward pass, or None when there is no row."""
        self._join()
        rows = self._choose()
        if not rows:
            return None
        # Rows of similar length next to each other, so that attention pads little.
        rows.sort(key=lambda row: (_size_class(row.num_fed_now), row.fed + row.num_fed_now))
        self._in_step = rows
        cache, start = self._cache, 0
        places: list[np.ndarray] = []
        wanted: list[int] = []
        for row in rows:
            end = row.fed + row.num_fed_now
            new = row.ids[row.fed : end]
            new += row.guessed[: row.num_fed_now - len(new)]
            places.append(cache.extend(row.line, new))
            if row.first_scored is not None:
                row.wanted = range(max(row.first_scored, row.fed), end)
            elif row.sample.constraint:
                row.asks = [ask for ask in row.asks if ask[0] < end]
                row.wanted = [position for position, _ in row.asks]
            else:
                row.wanted = range(end - 1, end if end == len(row.ids) else end - 1)
            wanted += [start + position - row.fed for position in row.wanted]
            start += row.num_fed_now
            num_prompt = len(row.sample.prompt_ids)
            self.counters.prefilled_tokens += max(min(end, num_prompt) - row.fed, 0)
        lines = np.array([row.line for row in rows], np.int64)
        num_new = np.array([row.num_fed_now for row in rows], np.int64)
        totals = np.array([row.fed + row.num_fed_now for row in rows], np.int64)
        starts = np.cumsum(num_new) - num_new
        positions = np.arange(start) - np.repeat(starts - (totals - num_new), num_new)
        tokens = np.concatenate([cache.tokens[row.line, row.fed : row.fed + row.num_fed_now] for row in rows])
        flat_places = np.concatenate(places)
        entries = [np.stack([np.repeat(lines, num_new), positions, flat_places])]
        for line, length in self._joined:
            entries.append(np.stack([np.full(length, line), np.arange(length), cache.places[line, :length]]))
        self._joined.clear()
        self.counters.steps += 1
        self.counters.evicted_tokens = cache.num_evicted_tokens
        table = np.concatenate(entries, axis=1)
        wanted_T = np.array(wanted, np.int64)
        return StepPlan(tokens.astype(np.int64), positions, flat_places, lines, num_new, totals, wanted_T, table)

    def take(self, logits_NV: torch.Tensor) -> list[Event]:
        """What the wanted logits of the planned step make of its rows."""
        logits = logits_NV[:, : self._info.vocab_size]
        events: list[Event] = []
        free: list[tuple[_Row, int]] = []  # and the place of the logits that decide
        constrained: list[tuple[_Row, int]] = []  # and the place of the first ask's
        spans, start = [], 0
        for row in self._in_step:
            row.fed += row.num_fed_now
            if row.first_scored is not None and row.wanted:
                spans.append((row, start))
            last = start + len(row.wanted) - 1
            if row.ends is None and row.fed >= len(row.ids):
                if row.sample.constraint:
                    constrained.append((row, start if row.first_scored is None else last))
                else:
                    free.append((row, last))
            start += len(row.wanted)
        if free:
            self._draw(free, logits, events)
        if constrained:
            self._choose_options(constrained, logits, events)
        for row, begin in spans:
            if row.number in self._running:
                self._score(row, row.wanted[0], logits[begin : begin + len(row.wanted)])
        for row in self._in_step:
            if row.number not in self._running:
                continue
            generated = row.ids[len(row.sample.prompt_ids) + row.num_told :]
            events += [self._with_scores(TokenMade(row.number, token)) for token in generated]
            row.num_told += len(generated)
            self.counters.generated_tokens += len(generated)
            scored = row.first_scored is None or row.fed >= len(row.ids) - 1
            if row.ends is not None and scored:
                self._leave(row)
                events.append(Finished(row.number, row.completion()))
        self._in_step = []
        return events

    def _leave(self, row: _Row) -> None:
        self._cache.close(row.line)
        del self._running[row.number]

    def _join(self) -> None:
        """Let waiting rows in while there is room; those whose beginning is being computed wait for it."""
        held: list[_Row] = []
        while self._waiting and len(self._running) < self._max_rows:
            row = self._waiting.popleft()
            prompt = np.array(row.ids, np.int32)
            prefix = None
            if self._prefix_reuse and row.first_scored != 0:
                prefix = self._cache.longest_prefix(prompt)
                if prefix.expected >= prefix.length + _WORTH_WAITING_FOR:
                    held.append(row)
                    continue
            max_length = len(row.ids) + row.sample.tokens_to_generate
            line = self._cache.open(prompt, prefix, max_length)
            if line is None and not self._running:
                # Keeping the prefix leaves too little room; alone and from its start, every row fits.
                prefix, line = None, self._cache.open(prompt, None, max_length)
            if line is None:
                held.append(row)
                break
            row.line, row.fed = line, prefix.length if prefix else 0
            if row.fed:
                self._joined.append((line, row.fed))
                self.counters.reused_tokens += row.fed
            self._running[row.number] = row
        self._waiting.extendleft(reversed(held))

    def _choose(self) -> list[_Row]:
        """The rows of the next step, `num_fed_now` set: what generates first, then prompts, oldest first."""
        room = self._max_step_tokens
        rows: list[_Row] = []
        prompts: list[_Row] = []
        for row in self._running.values():
            row.asks, row.guessed = [], []
            (rows if row.fed >= len(row.sample.prompt_ids) else prompts).append(row)
        num_generating = len(rows)
        for place, row in enumerate([*rows, *prompts]):
            if place >= num_generating:
                if room <= 0 and rows:
                    break
                rows.append(row)
            row.num_fed_now = min(len(row.ids) - row.fed, max(room, 1))
            room -= row.num_fed_now
            if row.sample.constraint and row.ends is None and row.fed + row.num_fed_now == len(row.ids):
                self._guess(row)
                num_guessed = min(len(row.guessed), max(room, 0))
                row.num_fed_now += num_guessed
                room -= num_guessed
        return rows

    def _draw(self, rows: Sequence[tuple[_Row, int]], logits_NV: torch.Tensor, events: list[Event]) -> None:
        """Give each row its next token."""
        allowed_logits = logits_NV[torch.tensor([place for _, place in rows], device=logits_NV.device)]
        early = [n for n, (row, _) in enumerate(rows) if row.num_generated < row.sample.min_tokens_to_generate]
        if early:
            allowed_logits[early, self._info.tokenizer.eos_id] = -torch.inf
        tokens, sound = greedy_tokens(allowed_logits)
        if free := [n for n, (row, _) in enumerate(rows) if not row.sample.greedy]:
            drawn, well = drawn_tokens(
                allowed_logits[torch.tensor(free, device=logits_NV.device)],
                [rows[n][0].sample for n in free],
                [rows[n][0].ids for n in free],
                [float(torch.rand((), generator=rows[n][0].generator)) for n in free],
            )
            for n, token, fine in zip(free, drawn, well, strict=True):
                tokens[n], sound[n] = token, sound[n] and fine
        for (row, _), token, fine in zip(rows, tokens, sound, strict=True):
            if not fine:
                self._fail(row, events)
                continue
            row.ids.append(token)
            row.ends = self._finish_reason(row, token)

    def _fail(self, row: _Row, events: list[Event]) -> None:
        self._leave(row)
        error = DrawError("the model's logits are not finite; its weights or its precision are at fault")
        events.append(Failed(row.number, error))

    def _guess(self, row: _Row) -> None:
        """Set `asks`, and `guessed`: how the line is likely to go on, as far as that is worth computing."""
        steps = row.sample.constraint
        step, taken, previous, chance = row.step, row.taken, row.previous, 1.0
        row.asks = [(len(row.ids) - 1, branches(steps[step], taken))]
        while row.first_scored is None:
            options = steps[step]
            place, share = self._guesses.likeliest(step, options, previous, taken)
            chance *= share
            if chance < _WORTH_GUESSING:
                break
            for done in range(len(taken), len(options[place])):
                permitted = branches(options, options[place][:done])
                if done > len(taken) and len(permitted) > 1:
                    row.asks.append((len(row.ids) + len(row.guessed) - 1, permitted))
                row.guessed.append(options[place][done])
            step, taken, previous = step + 1, (), place
            while step < len(steps) and len(steps[step]) == 1:
                row.guessed += steps[step][0]
                step += 1
            if step == len(steps):
                break
            row.asks.append((len(row.ids) + len(row.guessed) - 1, branches(steps[step], ())))
        del row.guessed[row.asks[-1][0] + 1 - len(row.ids) :]  # nothing is asked after these

    def _choose_options(self, rows: Sequence[tuple[_Row, int]], logits_NV: torch.Tensor, events: list[Event]) -> None:
        """The likeliest permitted token at each place asked about, as long as what was guessed before it is right."""
        places = [first + n for row, first in rows for n in range(len(row.asks))]
        permitted = [tokens for row, _ in rows for _, tokens in row.asks]
        longest = max(map(len, permitted))
        padded = torch.tensor([[*p, *[p[0]] * (longest - len(p))] for p in permitted], device=logits_NV.device)
        mine = logits_NV[torch.tensor(places, device=logits_NV.device)]
        best, sound = greedy_tokens(mine)
        logprobs = (mine.gather(1, padded) - mine.logsumexp(-1, keepdim=True)).tolist()
        number = 0
        for row, _ in rows:
            fed = [*row.ids, *row.guessed][: row.fed]
            end = number + len(row.asks)
            for position, tokens in row.asks:
                if not sound[number]:
                    self._fail(row, events)
                    break
                scores = logprobs[number][: len(tokens)]
                row.num_overruled += best[number] not in tokens
                _tell_apart(row, dict(zip(tokens, scores, strict=True)), tokens[scores.index(max(scores))])
                self._advance(row, tokens[scores.index(max(scores))])
                number += 1
                if fed[position + 1 : position + 2] != row.ids[position + 1 : position + 2]:
                    break  # the guess was wrong, and so is all that was computed after it
            number = end
            if row.number in self._running:
                row.fed = min(row.fed, _num_shared(fed, row.ids))
                self._cache.shrink(row.line, row.fed)

    def _advance(self, row: _Row, token: int) -> None:
        """Take a permitted token and all that must follow it."""
        row.ids.append(token)
        row.taken += (token,)
        self._follow_forced(row)

    def _follow_forced(self, row: _Row) -> None:
        steps = row.sample.constraint
        while True:
            options = steps[row.step]
            if row.taken in options:
                if len(options) > 1:
                    place = options.index(row.taken)
                    self._guesses.saw(row.step, options, row.previous, place)
                    row.choices.append(Choice(place, tuple(row.option_logprobs)))
                    row.previous = place
                row.step, row.taken, row.option_logprobs = row.step + 1, (), []
                if row.step == len(steps):
                    row.ends = "stop"
                    return
                continue
            permitted = branches(options, row.taken)
            if len(permitted) > 1:
                return
            row.ids.append(permitted[0])
            row.taken += permitted

    def _score(self, row: _Row, first: int, logits_SV: torch.Tensor) -> None:
        """Log-probabilities of the tokens after positions first, first + 1, ..."""
        sample = row.sample
        targets = row.ids[first + 1 : first + 1 + len(logits_SV)]
        logprobs = logits_SV[: len(targets)].log_softmax(-1)
        picked = torch.tensor(targets, dtype=torch.int64, device=logprobs.device)
        row.logprob += logprobs.gather(1, picked[:, None])[:, 0].tolist()
        if sample.all_probs:
            row.full_logprob += logprobs.tolist()
        if sample.top_logprobs:
            skip = max(len(sample.prompt_ids) - 1 - first, 0)
            best = logprobs[skip:].topk(sample.top_logprobs)
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                row.top_logprobs.append(tuple(zip(ids, values, strict=True)))

    def _with_scores(self, event: TokenMade) -> TokenMade:
        row = self._running.get(event.row)
        if row is None or row.sample.constraint or not row.sample.token_logprobs:
            return event
        top_logprobs = row.top_logprobs[-1] if row.sample.top_logprobs else ()
        return TokenMade(event.row, event.token_id, row.logprob[-1], top_logprobs)

    def _finish_reason(self, row: _Row, token: int) -> str | None:
        sample = row.sample
        if token in sample.stop_ids:
            return "stop"
        if sample.stop_texts or sample.stop_anywhere:
            # A character is at most four tokens, and some tokens are no text at all.
            tail = 16 + 4 * max(map(len, sample.stop_texts + sample.stop_anywhere))
            text = last_text(self._info.tokenizer, row.ids, len(sample.prompt_ids), tail)
            if text.endswith(sample.stop_texts) or any(stop in text for stop in sample.stop_anywhere):
                return "stop"
        return "length" if row.num_generated >= sample.tokens_to_generate else None


def _size_class(num_new: int) -> int:
    return num_new if num_new <= 4 else 4 + num_new.bit_length()


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _tell_apart(row: _Row, scores: dict[int, float], chosen: int) -> None:
    """Add what this branching tells about the options that were still together."""
    options = row.sample.constraint[row.step]
    done = len(row.taken)
    row.option_logprobs = row.option_logprobs or [0.0] * len(options)
    together = [(place, option[done]) for place, option in enumerate(options) if option[:done] == row.taken]
    num_sharing = Counter(token for _, token in together)
    for place, token in together:
        share = 1 if token == chosen else num_sharing[token]
        row.option_logprobs[place] += scores[token] - math.log(share)
