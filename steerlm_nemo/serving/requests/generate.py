"""The body of `PUT /generate`: keys, defaults, rules and messages of NeMo's text generation server.

Checked completely before the engine hears of it, so that a bad request cannot leave a rank waiting (D-18).
The reference answers a failed check with status 200 and a bare string; we raise BadRequest, and the API decides.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerlm_nemo.engine.protocol import ModelInfo, Sample, ServedTokenizer
from steerlm_nemo.errors import SteerLMError

COMPAT = "nemo1.23"
EOS_ALIAS = "<|endoftext|>"  # stands for eos with every tokenizer
MAX_SENTENCES = 128
MAX_PROBABILITIES = 2**24  # full_logprob is rows x positions x vocabulary numbers; more would exhaust memory

_TASK_IDS = (
    "Input at 'sentences' must by a tuple of two tensors like:" + " " * 20 + "(context_tokens_tensor, "
    "context_length_tensor) if task ids are given"
)


class BadRequest(SteerLMError):
    """A request the client has to change. `always_400`: the reference, too, answers this one with status 400.

    `param` is the key at fault and `code` a word for programs, where OpenAI's clients expect them.
    """

    def __init__(
        self,
        message: str,
        *,
        always_400: bool = False,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.always_400 = always_400
        self.status = status
        self.param = param
        self.code = code


@dataclass(frozen=True)
class GenerateRequest:
    """A checked body. Every value has its type and range; nothing here depends on a model."""

    sentences: tuple[str, ...]
    tokens_to_generate: int = 64
    all_probs: bool = False
    temperature: float = 1.0
    add_BOS: bool = False
    greedy: bool = False
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    end_strings: tuple[str, ...] = (EOS_ALIAS,)
    min_tokens_to_generate: int = 0
    compute_logprob: bool = False
    random_seed: int | None = None

    @classmethod
    def from_json(cls, body: Any, compat: str | None = None, max_sentences: int = MAX_SENTENCES) -> GenerateRequest:
        """Check a decoded JSON body; with `compat="nemo1.23"`, unknown keys and `neighbors` are ignored.

        Raises:
            BadRequest: the first rule broken, in the reference's order, with the reference's message.
        """
        if not isinstance(body, Mapping):
            raise BadRequest("the body must be a JSON object with the key 'sentences'")
        if compat is None and (unknown := sorted(set(body) - _KNOWN)):
            near = difflib.get_close_matches(unknown[0][:100], _RULES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(_RULES)}"
            raise BadRequest(f"The request key {unknown[0][:100]!r} is not allowed{hint}")
        if "sentences" not in body:
            raise BadRequest("the key 'sentences' is missing; it must be a list of strings")
        values: dict[str, Any] = {"sentences": _sentences(body["sentences"], max_sentences)}
        if "task_ids" in body:
            raise BadRequest(_TASK_IDS)
        for key, (accept, message) in _RULES.items():
            if key in body and key != "sentences":
                if not accept(body[key]):
                    raise BadRequest(message)
                values[key] = body[key]
        if values.pop("neighbors", None) and compat is None:
            raise BadRequest("neighbors is for retrieval (RETRO) models, which this server does not serve")
        values["top_k"] = int(values.get("top_k", 0))
        for key in ("temperature", "top_p", "repetition_penalty"):
            if key in values:
                values[key] = float(values[key])
        if "end_strings" in values:
            values["end_strings"] = tuple(values["end_strings"])
        return cls(**values)

    def samples(self, info: ModelInfo) -> list[Sample]:
        """One engine sample per sentence; tokens_to_generate is clipped to the room the context leaves.

        Raises:
            BadRequest: a prompt is empty or fills the context, or the answer would hold too many probabilities.
        """
        stop_ids, stop_texts = stops(self.end_strings, info)
        samples = []
        for index, sentence in enumerate(self.sentences):
            ids = prompt_ids(sentence, info, self.add_BOS, f"sentences[{index}]")
            tokens_to_generate = min(self.tokens_to_generate, room_for(ids, info, f"sentences[{index}]"))
            samples.append(
                Sample(
                    prompt_ids=tuple(ids),
                    tokens_to_generate=tokens_to_generate,
                    min_tokens_to_generate=min(self.min_tokens_to_generate, tokens_to_generate),
                    greedy=self.greedy,
                    temperature=self.temperature,
                    top_k=min(self.top_k, info.vocab_size),
                    top_p=self.top_p,
                    repetition_penalty=self.repetition_penalty,
                    stop_ids=stop_ids,
                    stop_texts=stop_texts,
                    random_seed=self.random_seed,
                    compute_logprob=self.compute_logprob,
                    all_probs=self.all_probs,
                )
            )
        positions = sum(len(sample.prompt_ids) + sample.tokens_to_generate for sample in samples)
        if self.all_probs and positions * info.vocab_size > MAX_PROBABILITIES:
            raise BadRequest(
                f"all_probs would answer with {positions} x {info.vocab_size} numbers; at most {MAX_PROBABILITIES} "
                "are sent. Send fewer or shorter sentences, or fewer tokens_to_generate."
            )
        return samples


def prompt_ids(prompt: str, info: ModelInfo, add_BOS: bool, name: str) -> list[int]:
    """Tokens of a prompt, as training has them where the model was trained on our template.

    Raises:
        BadRequest: there is no BOS to add, or so long a text cannot fit the context.
    """
    tokenizer = info.tokenizer
    # Tokenising megabytes would hold everybody up for a minute: SentencePiece does not let other threads run.
    if len(prompt) > (most := info.context_length * longest_piece(tokenizer)):
        raise BadRequest(
            f"{name} has {len(prompt)} characters, which leaves no room to generate: the model's context is "
            f"{info.context_length} tokens, {most} characters at the very most. Shorten the prompt.",
            param=name,
            code="context_length_exceeded",
        )
    ids = info.format.template.encode_prompt(prompt, tokenizer) if info.format else tokenizer.encode(prompt)
    if not add_BOS:
        return ids
    if tokenizer.bos_id is None or tokenizer.bos_id < 0:
        raise BadRequest("add_BOS is true, but this model's tokenizer has no BOS token", param="add_BOS")
    return [tokenizer.bos_id, *ids]


@functools.lru_cache(maxsize=8)
def longest_piece(tokenizer: ServedTokenizer) -> int:
    """Characters that one token can stand for."""
    return max(len(tokenizer.id_to_piece(token_id)) for token_id in range(tokenizer.vocab_size))


def room_for(ids: Sequence[int], info: ModelInfo, name: str) -> int:
    """How many tokens fit the context after a prompt. Raises BadRequest: it is empty, or none do."""
    if not ids:
        raise BadRequest(f"{name} is empty; give it text, or set add_BOS to true", param=name)
    if (room := info.context_length - len(ids)) < 1:
        raise BadRequest(
            f"{name} has {len(ids)} tokens, which leaves no room to generate: "
            f"the model's context is {info.context_length} tokens. Shorten the prompt.",
            param=name,
            code="context_length_exceeded",
        )
    return room


def stops(end_strings: Sequence[str], info: ModelInfo) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """End strings as token ids where one token is enough, as texts otherwise. eos always ends a row."""
    tokenizer = info.tokenizer
    ids, texts = [tokenizer.eos_id], []
    # The reference's test for "one token": what the string adds to a text that cannot merge with it.
    base = tokenizer.encode("<extra_id_1>")
    for end in end_strings:
        if end == EOS_ALIAS:
            continue
        if len(end) > longest_piece(tokenizer):
            texts.append(end)
            continue
        extended = tokenizer.encode("<extra_id_1>" + end)
        if len(extended) == len(base) + 1 and extended[:-1] == base:
            ids.append(extended[-1])
        else:
            texts.append(end)
    return tuple(dict.fromkeys(ids)), tuple(dict.fromkeys(texts))


def _is_int(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: Any, minimum: float, maximum: float = math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30 and minimum <= value <= maximum  # also refuses NaN and what float() cannot hold


def is_text(value: Any) -> bool:
    """A string that UTF-8 can carry; JSON can spell lone surrogates, which no tokenizer takes."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _sentences(value: Any, max_sentences: int) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise BadRequest("sentences must be a non-empty list of strings")
    if len(value) > max_sentences:
        raise BadRequest(f"Maximum number of sentences is {max_sentences}", always_400=True)
    for index, sentence in enumerate(value):
        if not is_text(sentence):
            raise BadRequest(f"sentences[{index}] must be a string of valid Unicode")
    return tuple(value)


# Order of checking and wording are the reference's; clients show these messages.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sentences": (lambda v: True, ""),  # checked by _sentences, which knows the position of the fault
    "tokens_to_generate": (lambda v: _is_int(v, 1), "tokens_to_generate must be an integer greater than 0"),
    "all_probs": (_is_bool, "all_probs must be a boolean value"),
    "temperature": (
        lambda v: _is_number(v, 0.0, 100.0) and v > 0,
        "temperature must be a positive number less than or equal to 100.0",
    ),
    "add_BOS": (_is_bool, "add_BOS must be a boolean value"),
    "greedy": (_is_bool, "greedy must be a boolean value"),
    "top_k": (lambda v: _is_number(v, 0) and v == int(v), "top_k must be a positive integer number"),
    "top_p": (lambda v: _is_number(v, 0.0, 1.0), "top_p must be a positive number less than or equal to 1.0"),
    "repetition_penalty": (
        lambda v: _is_number(v, 1.0),
        "repetition_penalty must be a positive number no less than 1.0",
    ),
    "end_strings": (
        # An empty end string would end every row at once.
        lambda v: isinstance(v, list) and all(is_text(text) and text for text in v),
        "expect end_strings to be a list of strings",
    ),
    "min_tokens_to_generate": (
        lambda v: _is_int(v, 0),
        "min_tokens_to_generate must be an integer no less than 0",
    ),
    "neighbors": (lambda v: v is None or _is_int(v, 0), "num of neighbors must be an integer no less than 0"),
    "compute_logprob": (_is_bool, "compute_logprob must be a boolean value"),
    "random_seed": (
        lambda v: v is None or (_is_int(v, 0) and v < 2**63),
        "random_seed must be a positive integer number or None",
    ),
}
_KNOWN = {*_RULES, "task_ids"}
