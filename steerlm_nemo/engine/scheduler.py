"""Rank 0's plan of each forward pass: which rows take part, with which tokens, and what their logits mean.

Rows join and leave between steps. A step takes the pending tokens of every row (the one just drawn, with the forced
ones after it), and fills up with pieces of prompts, so that a long prompt does not stall the rows that generate. A row
that begins like one of the step joins it and takes over what that one computes: n spans after a prompt, or n rows of
the same prompt, are one pass in which the prompt is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch

from steerlm_nemo.engine.cache import KVCache
from steerlm_nemo.engine.constrained import Guesses, Walk
from steerlm_nemo.engine.draw import drawn_tokens
from steerlm_nemo.engine.plan import StepPlan
from steerlm_nemo.engine.protocol import (
    EngineCounters,
    Event,
    Failed,
    Finished,
    ModelInfo,
    Sample,
    Scored,
    ScoreRequest,
)
from steerlm_nemo.engine.rows import Row, SampleRow, rows_of, scores_of
from steerlm_nemo.engine.text import last_text

# A row waits for a neighbour that is about to compute so many more tokens of its prompt than the cache has.
_WORTH_WAITING_FOR = 8


class LogitsError(RuntimeError):
    """The model's logits are no numbers, so nothing can be drawn or scored; the row is given up."""


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
        self._num_added = 0
        self._rows: dict[int, list[Row]] = {}  # of everything that has not ended
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._in_step: list[Row] = []
        self._logits_of_wanted: list[int] = []  # in the step's order, where the logits of each wanted position are
        self._joined: list[tuple[int, int]] = []  # (line, tokens it takes over) since the last step
        self._place_in_step = np.zeros(cache.num_places, np.int64)  # of the tokens that the step computes
        self._guesses = Guesses()
        self.counters = EngineCounters()

    def add(self, work: Sample | ScoreRequest) -> int:
        self._num_added += 1
        self._rows[self._num_added] = rows_of(self._num_added, work, self._guesses)
        self._waiting.extend(self._rows[self._num_added])
        return self._num_added

    def cancel(self, number: int) -> None:
        for row in self._rows.pop(number, []):
            self._leave(row)
        self._waiting = deque(row for row in self._waiting if row.number != number)

    def fail_running(self, error: Exception) -> list[Event]:
        """Give up everything that has a row in the engine; nothing in the cache can be trusted any more."""
        numbers = dict.fromkeys(row.number for row in self._running)
        for number in numbers:
            self.cancel(number)
        self._joined.clear()
        self._in_step = []
        self._cache.forget()
        return [Failed(number, error) for number in numbers]

    def plan(self) -> StepPlan | None:
        """The next forward pass, or None when there is no row."""
        self._cache.begin_step()
        self._in_step = []
        room = self._feed_running(self._max_step_tokens)
        self._join(room)
        if not self._in_step:
            return None
        for row in self._in_step:
            if isinstance(row, SampleRow) and row.walk is not None:
                self._cache.extend(row.line, row.walk.guessed)
        # Rows of similar length next to each other, so that attention pads little.
        self._in_step.sort(key=lambda row: (_size_class(row.num_fed_now), row.fed + row.num_fed_now))
        self.counters.steps += 1
        self.counters.evicted_tokens = self._cache.num_evicted_tokens
        return self._assemble([row for row in self._in_step if row.num_fed_now])

    def take(self, logits_NV: torch.Tensor) -> list[Event]:
        """What the wanted logits of the planned step make of its rows."""
        logits = logits_NV[:, : self._info.vocab_size]
        best = logits.max(-1)
        likeliest, sound = best.indices.tolist(), best.values.isfinite().tolist()
        events: list[Event] = []
        free: list[tuple[SampleRow, int]] = []  # and which logits decide
        led: list[tuple[SampleRow, Walk, list[int]]] = []  # and the logits of each ask
        scored: list[tuple[Row, list[int]]] = []  # and the logits of each wanted position
        start = 0
        for row in self._in_step:
            row.fed += row.num_fed_now
            mine = self._logits_of_wanted[start : start + len(row.wanted)]
            start += len(row.wanted)
            if isinstance(row, SampleRow) and row.ends is None and row.fed >= len(row.ids):
                if row.walk is None:
                    free.append((row, mine[-1]))
                else:
                    led.append((row, row.walk, mine if row.scored_from is None else mine[-1:]))
            if row.scored_from is not None and mine:
                scored.append((row, mine))
        self._draw([(row, place) for row, place in free if sound[place]], logits, likeliest, events)
        if led:
            self._choose(led, logits, likeliest, sound, events)
        decided: list[tuple[Row, list[int]]] = [(row, [place]) for row, place in free]
        for row, places in decided + scored:
            if not all(sound[place] for place in places):
                self._fail(row, events)
        self._score([(row, places) for row, places in scored if row.line >= 0], logits)
        for row in self._in_step:
            if row.line < 0:
                continue
            if isinstance(row, SampleRow):
                tokens = row.new_tokens()
                self.counters.generated_tokens += len(tokens)
                events += tokens
            if row.has_ended:
                self._leave(row)
                events += self._last_event(row)
        self._in_step = []
        return events

    def _leave(self, row: Row) -> None:
        """Take a row out, if it runs."""
        if row.line >= 0:
            self._cache.close(row.line)
            self._running.remove(row)
            row.line = -1

    def _last_event(self, row: Row) -> Iterable[Event]:
        """The end of what was asked for, if this was its last row."""
        rows = self._rows[row.number]
        if not all(other.has_ended and other.line < 0 for other in rows):
            return
        del self._rows[row.number]
        if isinstance(row, SampleRow):
            yield Finished(row.number, row.completion())
        else:
            yield Scored(row.number, scores_of(rows))

    def _feed_running(self, room: int) -> int:
        """Choose the tokens of rows that run already: what generates first, then what is given, oldest first.

        Returns the room that is left for others.
        """
        given = []
        for row in self._running:
            if isinstance(row, SampleRow) and row.fed >= row.num_given:
                room = self._feed(row, max(room, 1))
            else:
                given.append(row)
        for row in given:
            if room <= 0:
                break
            room = self._feed(row, room)
        return room

    def _feed(self, row: Row, room: int) -> int:
        """Give a row its part of the step. Returns the room that is left."""
        row.num_fed_now = min(row.num_to_feed - row.fed, room)
        end = row.fed + row.num_fed_now
        self._cache.extend(row.line, row.ids[row.fed : end])
        self.counters.prefilled_tokens += max(min(end, row.num_given) - row.fed, 0)
        if row.scored_from is not None or end == len(row.ids):
            row.wanted = range(row.first_wanted, min(end, row.num_to_score))
        else:
            row.wanted = range(0)
        if isinstance(row, SampleRow) and row.walk is not None:
            row.walk.guessed = []
            if row.ends is None and end == len(row.ids):
                # What is computed on trial is not scored.
                row.walk.ask(room - row.num_fed_now if row.scored_from is None else 0)
                row.num_fed_now += len(row.walk.guessed)
                if row.scored_from is None:
                    row.wanted = [position for position, _ in row.walk.asks]
        self._in_step.append(row)
        return room - row.num_fed_now

    def _join(self, room: int) -> None:
        """Let waiting rows in while there is room; those whose beginning is being computed wait for it."""
        held: list[Row] = []
        while self._waiting and len(self._running) < self._max_rows and room > 0:
            row = self._waiting.popleft()
            ids = np.array(row.ids[: row.num_to_feed], np.int32)
            prefix = None
            if self._prefix_reuse:
                prefix = self._cache.longest_prefix(ids, row.first_wanted, takes_remembered=row.takes_remembered)
                if prefix.expected >= prefix.length + _WORTH_WAITING_FOR:
                    held.append(row)
                    continue
            line = self._cache.open(ids, prefix, row.max_length)
            if line is None and not self._running:
                # Keeping the prefix leaves too little room; alone and from its start, every row fits.
                prefix, line = None, self._cache.open(ids, None, row.max_length)
            if line is None:
                held.append(row)
                break
            row.line = line
            if prefix is not None and prefix.length:
                row.fed = prefix.length
                row.logprob += self._cache.logprobs[line, row.first_wanted : prefix.remembered].tolist()
                self._joined.append((line, prefix.length))
                self.counters.reused_tokens += prefix.length
            self._running.append(row)
            room = self._feed(row, room)
        self._waiting.extendleft(reversed(held))

    def _assemble(self, rows: Sequence[Row]) -> StepPlan:
        """The plan of a step in which these rows compute something."""
        cache = self._cache
        lines = np.array([row.line for row in rows], np.int64)
        num_new = np.array([row.num_fed_now for row in rows], np.int64)
        totals = cache.lengths[lines]
        starts = num_new.cumsum() - num_new
        line_T = lines.repeat(num_new)
        positions = np.arange(len(line_T)) - (starts - totals + num_new).repeat(num_new)
        places = cache.places[line_T, positions]
        entries = [np.stack([line_T, positions, places])]
        for line, length in self._joined:
            entries.append(np.stack([np.full(length, line), np.arange(length), cache.places[line, :length]]))
        self._joined.clear()
        # A wanted position may be one that another row computes.
        self._place_in_step[places] = np.arange(len(places))
        wanted_lines = np.array([row.line for row in self._in_step]).repeat([len(row.wanted) for row in self._in_step])
        wanted_positions = np.array([position for row in self._in_step for position in row.wanted], np.int64)
        wanted, logits_of = np.unique(
            self._place_in_step[cache.places[wanted_lines, wanted_positions]], return_inverse=True
        )
        self._logits_of_wanted = logits_of.tolist()
        tokens = cache.tokens[line_T, positions].astype(np.int64)
        table = entries[0] if len(entries) == 1 else np.concatenate(entries, axis=1)
        return StepPlan(tokens, positions, places, lines, num_new, totals, wanted, table)

    def _draw(
        self,
        rows: Sequence[tuple[SampleRow, int]],
        logits_NV: torch.Tensor,
        likeliest: Sequence[int],
        events: list[Event],
    ) -> None:
        """Give each row its next token; the numbers say which logits decide."""
        tokens = {row: likeliest[place] for row, place in rows}
        not_yet = [
            (row, place)
            for row, place in rows
            if row.generator is None and tokens[row] in row.not_yet(self._info.tokenizer.eos_id)
        ]
        if not_yet:
            best = self._permitted(not_yet, logits_NV).argmax(-1).tolist()
            tokens |= {row: token for (row, _), token in zip(not_yet, best, strict=True)}
        if drawing := [(row, place, row.generator) for row, place in rows if row.generator is not None]:
            drawn, sound = drawn_tokens(
                self._permitted([(row, place) for row, place, _ in drawing], logits_NV),
                [row.sample for row, _, _ in drawing],
                [row.ids for row, _, _ in drawing],
                [float(torch.rand((), generator=generator)) for _, _, generator in drawing],
            )
            for (row, _, _), token, fine in zip(drawing, drawn, sound, strict=True):
                tokens[row] = token
                if not fine:
                    self._fail(row, events)
        for row, token in tokens.items():
            if row.line >= 0:
                row.ids.append(token)
                row.ends = self._finish_reason(row, token)

    def _permitted(self, rows: Sequence[tuple[SampleRow, int]], logits_NV: torch.Tensor) -> torch.Tensor:
        """A copy of the rows' logits, without those of stops that come too early."""
        logits = logits_NV[torch.tensor([place for _, place in rows], device=logits_NV.device)]
        for n, (row, _) in enumerate(rows):
            if early := row.not_yet(self._info.tokenizer.eos_id):
                logits[n, list(early)] = -torch.inf
        return logits

    def _fail(self, row: Row, events: list[Event]) -> None:
        if row.line >= 0:  # not with another row of the same request
            self.cancel(row.number)
            error = LogitsError("the model's logits are not finite; its weights or its precision are at fault")
            events.append(Failed(row.number, error))

    def _choose(
        self,
        rows: Sequence[tuple[SampleRow, Walk, list[int]]],
        logits_NV: torch.Tensor,
        likeliest: Sequence[int],
        sound: Sequence[bool],
        events: list[Event],
    ) -> None:
        """The likeliest permitted token at each place asked about, as long as what was guessed before it is right."""
        branchings = [branching for _, walk, _ in rows for _, branching in walk.asks]
        places = np.array([place for _, _, places in rows for place in places])
        ends = np.cumsum([len(branching.tokens) for branching in branchings]).tolist()
        at = np.repeat(places, [len(branching.tokens) for branching in branchings])
        logprobs = _logprobs(logits_NV, at, np.concatenate([branching.token_ids for branching in branchings]))
        number = 0
        for row, walk, row_places in rows:
            num_known = len(row.ids)
            for n, ((position, branching), place) in enumerate(zip(walk.asks, row_places, strict=True), number):
                if not sound[place]:
                    self._fail(row, events)
                    break
                walk.choose(branching, logprobs[ends[n] - len(branching.tokens) : ends[n]], likeliest[place])
                guess = position + 1 - num_known
                if walk.guessed[guess : guess + 1] != row.ids[position + 1 : position + 2]:
                    break  # the guess was wrong, and so is all that was computed after it; or this was the last
            number += len(row_places)
            if row.line < 0:
                continue
            if walk.has_ended:
                row.ends = "stop"
            row.fed = num_known + _num_shared(walk.guessed, row.ids[num_known:])
            self._cache.shrink(row.line, row.fed)

    def _score(self, rows: Sequence[tuple[Row, list[int]]], logits_NV: torch.Tensor) -> None:
        """Log-probabilities of the tokens after each row's wanted positions."""
        alone: list[tuple[Row, list[int], list[int]]] = []  # and the tokens
        for row, places in rows:
            tokens = row.ids[row.wanted[0] + 1 : row.wanted[0] + 1 + len(places)]
            if not isinstance(row, SampleRow) or not (row.sample.all_probs or row.sample.top_logprobs):
                alone.append((row, places, tokens))
                continue
            whole = logits_NV[torch.tensor(places, device=logits_NV.device)].log_softmax(-1)
            row.add_distributions(whole)
            # The same numbers, to the last bit: by them, clients tell whether a token is the likeliest.
            chosen = torch.tensor(tokens, device=whole.device)[:, None]
            self._keep_logprobs(row, whole.gather(1, chosen)[:, 0].tolist())
        if alone:
            at = np.array([place for _, places, _ in alone for place in places])
            logprobs = iter(_logprobs(logits_NV, at, np.array([token for _, _, tokens in alone for token in tokens])))
            for row, _, tokens in alone:
                self._keep_logprobs(row, list(islice(logprobs, len(tokens))))

    def _keep_logprobs(self, row: Row, logprobs: list[float]) -> None:
        self._cache.remember(row.line, row.first_wanted, logprobs)
        row.logprob += logprobs

    def _finish_reason(self, row: SampleRow, token: int) -> str | None:
        sample = row.sample
        if token in sample.stop_ids:
            return "stop"
        first = len(sample.prompt_ids) + (sample.min_tokens_to_generate if sample.stops_wait else 0)
        if (sample.stop_texts or sample.stop_anywhere) and len(row.ids) > first:
            # A character is at most four tokens, and some tokens are no text at all.
            tail = 16 + 4 * max(map(len, sample.stop_texts + sample.stop_anywhere))
            text = last_text(self._info.tokenizer, row.ids, first, tail)
            if text.endswith(sample.stop_texts) or any(stop in text for stop in sample.stop_anywhere):
                return "stop"
        return "length" if row.num_generated >= sample.tokens_to_generate else None


def _logprobs(logits_NV: torch.Tensor, places: np.ndarray, token_ids: np.ndarray) -> list[float]:
    """Log-probability of each token by the logits at its place."""
    device = logits_NV.device
    distinct, which = np.unique(places, return_inverse=True)
    mine = logits_NV if len(distinct) == len(logits_NV) else logits_NV[torch.from_numpy(distinct).to(device)]
    at, tokens = torch.from_numpy(which).to(device), torch.from_numpy(token_ids).to(device)
    return (mine[at, tokens] - mine.logsumexp(-1)[at]).tolist()


def _size_class(num_new: int) -> int:
    return num_new if num_new <= 4 else 4 + num_new.bit_length()


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
