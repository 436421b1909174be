"""What the HTTP API asks of an engine and what it gets back; neither side imports the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steerlm_nemo.template import SteerLMFormat
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

ServedTokenizer = SentencePieceTokenizer | HuggingFaceTokenizer


@dataclass(frozen=True)
class Sample:
    """One prompt to continue. The API has checked every field, so an engine may rely on the ranges below."""

    prompt_ids: tuple[int, ...]  # at least one, and shorter than the context
    tokens_to_generate: int = 64  # >= 1; prompt and generated tokens together fit the context
    min_tokens_to_generate: int = 0  # eos cannot be drawn before this many; other stops still end the row
    greedy: bool = False  # argmax; temperature, top_k, top_p and repetition_penalty are then ignored
    temperature: float = 1.0  # 0 < t <= 100
    top_k: int = 0  # 0: off; at most the vocabulary size
    top_p: float = 0.9  # 0 or 1: off
    repetition_penalty: float = 1.0  # >= 1; 1: off
    stop_ids: tuple[int, ...] = ()  # eos is among them
    stop_texts: tuple[str, ...] = ()  # stop strings of several tokens: compare with the tail of the decoded row
    random_seed: int | None = None  # below 2**63
    compute_logprob: bool = False
    all_probs: bool = False
    # Steps to go through, each a choice among token sequences none of which begins another; () is free generation.
    # A step with one sequence is forced. The likeliest next token decides, step by step; the last step ends the row.
    constraint: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class Completion:
    """One continued prompt, without padding. A stop token, or the tokens of a stop text, are included."""

    token_ids: tuple[int, ...]  # prompt and generated
    num_prompt_tokens: int
    finish_reason: str  # "stop" | "length"
    logprob: tuple[float, ...] | None  # len(token_ids) - 1: token t+1 given the ones before; natural log, untempered
    full_logprob: list[list[float]] | None  # the same positions, one number per vocabulary entry
    num_overruled: int = 0  # choices of a constraint where the model's own first token was none of the allowed


@dataclass(frozen=True)
class ModelInfo:
    """What the API needs to know of the served model."""

    name: str
    tokenizer: ServedTokenizer
    vocab_size: int
    context_length: int
    format: SteerLMFormat | None  # None: a checkpoint without one, such as a stock base model
    report: dict[str, Any]  # capability report; the keys `tp_size` and `dtype` are shown by GET /health


class Engine(Protocol):
    """A model that continues prompts. `generate` blocks and is called from one thread only."""

    @property
    def info(self) -> ModelInfo: ...

    def generate(self, samples: Sequence[Sample]) -> list[Completion]:
        """One completion per sample, in order. An exception fails these samples only; the engine stays usable."""
        ...
