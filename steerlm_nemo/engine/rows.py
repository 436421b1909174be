"""The rows of an engine: token sequences that it continues or scores, and what is known of each so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from steerlm_nemo.engine.constrained import Guesses, Walk
from steerlm_nemo.engine.protocol import Completion, Sample, ScoreRequest, Scores, TokenMade


@dataclass(eq=False)
class Row:
    """A sequence of tokens. One whose tokens are all known ends as soon as their log-probabilities are there, too."""

    number: int  # of what was asked for; in its events
    ids: list[int]
    num_given: int  # of them; what comes after is generated
    max_length: int  # places of the cache that it may come to hold
    scored_from: int | None  # the log-probabilities of all tokens after this position are wanted
    ends: str | None = None  # finish_reason; no more tokens come
    line: int = -1  # of the cache
    fed: int = 0  # tokens whose keys and values are in the cache
    num_fed_now: int = 0  # in the step under way, guessed ones included
    wanted: range | list[int] = field(default_factory=list)  # positions whose logits the step under way is to give
    logprob: list[float] = field(default_factory=list)  # of the tokens after `scored_from`, as far as they are there

    @property
    def first_wanted(self) -> int:
        """The first position whose logits are still wanted."""
        return len(self.ids) - 1 if self.scored_from is None else self.scored_from + len(self.logprob)

    @property
    def num_to_feed(self) -> int:
        """Of the tokens known, those that have to be computed at all: no logits after the last one are scored."""
        return max(self.num_to_score, 1)

    @property
    def num_to_score(self) -> int:
        """Positions whose logits can be wanted, of the tokens known."""
        return len(self.ids) - (self.ends is not None and self.scored_from is not None)

    @property
    def has_ended(self) -> bool:
        return self.ends is not None and (self.scored_from is None or self.first_wanted >= len(self.ids) - 1)

    @property
    def takes_remembered(self) -> bool:
        """Log-probabilities of tokens are all it wants of the positions from `scored_from` on."""
        return self.scored_from is not None


class SpanRow(Row):
    """A span of a `ScoreRequest` after its prompt."""

    def __init__(self, number: int, prompt: Sequence[int], span: Sequence[int]) -> None:
        ids = [*prompt, *span]
        super().__init__(number, ids, len(ids), len(ids), scored_from=len(prompt) - 1, ends="known")


class SampleRow(Row):
    """A prompt while it is being continued."""

    def __init__(self, number: int, sample: Sample, guesses: Guesses) -> None:
        num_prompt = len(sample.prompt_ids)
        scored_from = None
        if sample.compute_logprob or sample.all_probs or sample.prompt_logprobs:
            scored_from = 0
        elif sample.token_logprobs or sample.top_logprobs:
            scored_from = num_prompt - 1
        max_length = num_prompt + sample.tokens_to_generate
        super().__init__(number, list(sample.prompt_ids), num_prompt, max_length, scored_from)
        self.sample = sample
        self.num_told = 0  # generated tokens in events
        self.full_logprob: list[list[float]] = []
        self.top_logprobs: list[tuple[tuple[int, float], ...]] = []
        self.generator = None if sample.greedy else torch.Generator()
        if self.generator is not None:
            self.generator.seed() if sample.random_seed is None else self.generator.manual_seed(sample.random_seed)
        self.walk = Walk(sample.constraint, self.ids, guesses) if sample.constraint else None
        if self.walk is not None and self.walk.has_ended:
            self.ends = "stop"
        elif not sample.tokens_to_generate:
            self.ends = "length"

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.num_given

    def not_yet(self, eos_id: int) -> tuple[int, ...]:
        """Tokens that cannot be drawn now."""
        if self.num_generated >= self.sample.min_tokens_to_generate:
            return ()
        return self.sample.stop_ids if self.sample.stops_wait else (eos_id,)

    @property
    def takes_remembered(self) -> bool:
        return super().takes_remembered and not self.sample.all_probs and not self.sample.top_logprobs

    def new_tokens(self) -> list[TokenMade]:
        """Events of the tokens that came since the last call."""
        new = self.ids[self.num_given + self.num_told :]
        self.num_told += len(new)
        ends = [None] * (len(new) - 1) + [self.ends]
        if not new or not self.sample.token_logprobs or self.walk is not None:
            return [TokenMade(self.number, token, finish_reason=end) for token, end in zip(new, ends, strict=False)]
        top_logprobs = self.top_logprobs[-1] if self.sample.top_logprobs else ()
        return [TokenMade(self.number, token, self.logprob[-1], top_logprobs, self.ends) for token in new]

    def add_distributions(self, logprobs_SV: torch.Tensor) -> None:
        """Keep what is asked for of the whole vocabulary at the positions from `first_wanted` on."""
        sample = self.sample
        if sample.all_probs:
            self.full_logprob += logprobs_SV.tolist()
        if sample.top_logprobs:
            first = 0 if sample.prompt_logprobs else max(self.num_given - 1 - self.first_wanted, 0)
            best = logprobs_SV[first:].topk(sample.top_logprobs)
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                self.top_logprobs.append(tuple(zip(ids, values, strict=True)))

    def completion(self) -> Completion:
        sample, walk = self.sample, self.walk
        of_prompt = self.num_given - 1 if self.scored_from == 0 and not sample.prompt_logprobs else 0
        return Completion(
            token_ids=tuple(self.ids),
            num_prompt_tokens=self.num_given,
            finish_reason=self.ends or "length",
            logprob=tuple(self.logprob) if sample.compute_logprob else None,
            full_logprob=self.full_logprob if sample.all_probs else None,
            num_overruled=walk.num_overruled if walk else 0,
            token_logprobs=tuple(self.logprob[of_prompt:]) if sample.token_logprobs else None,
            top_logprobs=tuple(self.top_logprobs) if sample.top_logprobs else None,
            choices=tuple(walk.choices) if walk else (),
        )


def rows_of(number: int, work: Sample | ScoreRequest, guesses: Guesses) -> list[Row]:
    """What is to be run for a piece of work: one row for a sample, one per span to score."""
    if isinstance(work, Sample):
        return [SampleRow(number, work, guesses)]
    return [SpanRow(number, work.prompt_ids, span) for span in work.spans]


def scores_of(rows: Sequence[Row]) -> Scores:
    """The answer that the rows of a `ScoreRequest` are, in its order."""
    return Scores(tuple(tuple(row.logprob) for row in rows))
