"""What an engine can be asked, and what it answers: to continue prompts, and to score spans after them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steerlm_nemo.errors import InputError
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.own_template.own import OwnTemplate
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

ServedTokenizer = SentencePieceTokenizer | HuggingFaceTokenizer
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Sample:
    """One prompt to continue. The API has checked every field, so an engine may rely on the ranges below."""

    prompt_ids: tuple[int, ...]  # at least one
    # Prompt and generated tokens together fit the context. 0, where prompt_logprobs are wanted: the prompt is scored.
    tokens_to_generate: int = 64
    min_tokens_to_generate: int = 0  # eos cannot be drawn before this many; other stops still end the row, but
    stops_wait: bool = False  # with this, no stop does: no stop id can be drawn, and texts are looked for from there on
    greedy: bool = False  # argmax; temperature, top_k, top_p, min_p, penalties and biases are then ignored
    temperature: float = 1.0  # 0 < t <= 100
    top_k: int = 0  # 0: off; at most the vocabulary size
    top_p: float = 0.9  # 0 or 1: off
    min_p: float = 0.0  # 0 to 1, of the likeliest token's probability; 0: off
    repetition_penalty: float = 1.0  # >= 1; 1: off
    frequency_penalty: float = 0.0  # these two are OpenAI's, of generated tokens
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), each id once
    stop_ids: tuple[int, ...] = ()  # eos is among them, unless it is to be a token like others
    stop_texts: tuple[str, ...] = ()  # stop strings of several tokens: compare with the tail of the decoded row
    stop_anywhere: tuple[str, ...] = ()  # end the row in the middle of a token, too; of generated text only
    random_seed: int | None = None  # below 2**63
    compute_logprob: bool = False  # of every token, the prompt's too
    all_probs: bool = False  # likewise, of the whole vocabulary; nothing of the prompt is then taken from the cache
    token_logprobs: bool = False  # of generated tokens
    top_logprobs: int = 0  # 0 to MAX_TOP_LOGPROBS likeliest tokens at every generated place
    prompt_logprobs: bool = False  # the last two of the prompt's tokens after its first, too
    # Steps to go through, each a choice among token sequences none of which begins another; () is free generation.
    # A step with one sequence is forced. The likeliest next token decides, step by step; the last step ends the row.
    constraint: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class ScoreRequest:
    """Spans that may follow a prompt, such as responses, each to be scored as if it alone stood there."""

    prompt_ids: tuple[int, ...]  # at least one
    spans: tuple[tuple[int, ...], ...]  # at least one, none of them empty; each fits the context after the prompt


@dataclass(frozen=True)
class Scores:
    """log P(span | prompt) of a `ScoreRequest`: natural, untempered, over the real vocabulary."""

    token_logprobs: tuple[tuple[float, ...], ...]  # one tuple per span; each token given those before it

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of whole spans: the sums."""
        return tuple(math.fsum(span) for span in self.token_logprobs)


@dataclass(frozen=True)
class Choice:
    """What the model thought of the options of one constraint step.

    An option's log-probability is that of its tokens up to the one that tells it from all others: exact where first
    tokens differ. Further branches are followed as they are chosen; options that share the first token of a branch not
    taken share that branch's probability evenly, so the sum over the options is right in any case.
    """

    chosen: int  # place in the step's options
    logprobs: tuple[float, ...]  # one per option; natural log, untempered, over the real vocabulary


@dataclass(frozen=True)
class Completion:
    """One continued prompt, without padding. A stop token, or the tokens of a stop text, are included.

    All log-probabilities are natural, untempered and over the real vocabulary.
    """

    token_ids: tuple[int, ...]  # prompt and generated
    num_prompt_tokens: int
    finish_reason: str  # "stop" | "length"
    logprob: tuple[float, ...] | None = None  # compute_logprob: len(token_ids) - 1, token t+1 given the ones before
    full_logprob: list[list[float]] | None = None  # all_probs: the same positions, one number per vocabulary entry
    num_overruled: int = 0  # choices of a constraint where the model's own first token was none of the allowed
    # One per generated token; with prompt_logprobs, one per token after the first, as `logprob`.
    token_logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None  # of the same, (id, logprob), best first
    choices: tuple[Choice, ...] = ()  # one per constraint step of more than one option


@dataclass(frozen=True)
class ModelInfo:
    """What the API needs to know of the served model."""

    name: str
    tokenizer: ServedTokenizer
    vocab_size: int
    context_length: int
    format: SteerLMFormat | None  # None: a checkpoint without one, such as a stock base model
    report: dict[str, Any]  # capability report; the keys `tp_size` and `dtype` are shown by GET /health
    identity: str = ""  # equal for the same weights, config and tokenizer, however packed; "" where nobody knows
    own_template: OwnTemplate | None = None  # of a model without a format that brings one


@dataclass(frozen=True)
class TokenMade:
    """Log-probabilities are there where the sample asks for them, but not of constrained rows."""

    row: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None  # of the row's last token: "stop" | "length"


@dataclass(frozen=True)
class Finished:
    row: int
    completion: Completion


@dataclass(frozen=True)
class Scored:
    row: int
    scores: Scores


@dataclass(frozen=True)
class Failed:
    """This row is gone; the engine and the other rows are fine."""

    row: int
    error: Exception


Event = TokenMade | Finished | Scored | Failed


@dataclass
class EngineCounters:
    """Totals since the start, for /metrics."""

    steps: int = 0  # forward passes
    prefilled_tokens: int = 0  # prompt and span tokens computed
    reused_tokens: int = (
        0  # prompt and span tokens whose keys and values were in the cache, or computed for another row
    )
    generated_tokens: int = 0  # forced ones included
    evicted_tokens: int = 0  # cached tokens given up for others


class Engine(Protocol):
    """A model that continues prompts and scores spans, one step at a time. All calls come from one thread."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def counters(self) -> EngineCounters: ...

    def add(self, work: Sample | ScoreRequest) -> int:
        """Take a row in; its number is in all its events. It starts as soon as there is room."""
        ...

    def cancel(self, row: int) -> None:
        """Forget a row; no more events come from it. Nothing happens if it has ended."""
        ...

    def step(self) -> Sequence[Event]:
        """Advance the rows. A sample's tokens come in order, then one Finished; a score request's end is one Scored;
        or there is one Failed.

        An exception means that the engine is dead.
        """
        ...


def complete(engine: Engine, samples: Sequence[Sample]) -> list[Completion]:
    """One completion per sample, in order, on an engine that nobody else uses meanwhile.

    Raises:
        Exception: the first row that failed, as the engine told it; the other rows are cancelled.
    """
    return [event.completion for event in _last_events(engine, samples) if isinstance(event, Finished)]


def score(engine: Engine, requests: Sequence[ScoreRequest]) -> list[Scores]:
    """The scores of each request, in order, on an engine that nobody else uses meanwhile.

    Raises:
        InputError: a prompt or a span is empty, or both together are longer than the model's context.
        Exception: as `complete`.
    """
    for place, request in enumerate(requests):
        _check(request, engine.info, f"request {place}")
    return [event.scores for event in _last_events(engine, requests) if isinstance(event, Scored)]


def _last_events(engine: Engine, work: Sequence[Sample | ScoreRequest]) -> list[Finished | Scored]:
    rows = [engine.add(item) for item in work]
    done: dict[int, Finished | Scored] = {}
    while len(done) < len(rows):
        for event in engine.step():
            if isinstance(event, Failed):
                for row in rows:
                    engine.cancel(row)
                raise event.error
            if not isinstance(event, TokenMade):
                done[event.row] = event
    return [done[row] for row in rows]


def _check(request: ScoreRequest, info: ModelInfo, name: str) -> None:
    """Raises InputError."""
    if not request.prompt_ids or not request.spans or not all(request.spans):
        raise InputError(f"{name}: a prompt and every span need a token at least, and there must be a span")
    longest = len(request.prompt_ids) + max(map(len, request.spans))
    if longest > info.context_length:
        raise InputError(
            f"{name}: prompt and span have {longest} tokens, but the model's context is {info.context_length}; "
            "shorten the prompt or leave the span out"
        )
