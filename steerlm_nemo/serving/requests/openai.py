"""What OpenAI's clients send: every key with its rule, and the engine samples that a request becomes.

The prompt of a chat is the one of `scripts/steered_inference.py`, built by the same functions, so that it begins as the
model's training records do. Every key is honoured, or refused by name; those in `NO_EFFECT` cannot change an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.conversation import SYSTEM_PROMPT
from steerlm_nemo.engine.protocol import MAX_TOP_LOGPROBS, ModelInfo, Sample
from steerlm_nemo.engine.text import without_end
from steerlm_nemo.errors import InputError
from steerlm_nemo.messages import conversation_of
from steerlm_nemo.model_kind import CHAT as CHAT_ABILITY
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.serving.requests.checking import Schema, read
from steerlm_nemo.serving.requests.generate import MAX_SENTENCES, BadRequest, prompt_ids, room_for, stops

MAX_INTEGER = 2**63 - 1
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean", "default": False}
TOKENS: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_INTEGER}
NOTHING: Schema = {"enum": [None, []]}

ATTRIBUTES: Schema = {
    "description": "Requested values, in any order; the schema's default for every attribute left out.",
    "type": "object",
    "additionalProperties": {
        "anyOf": [
            {"type": "integer", "minimum": -MAX_INTEGER, "maximum": MAX_INTEGER},
            {"type": "string", "maxLength": 40},
        ]
    },
}
_TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": TEXT},
    "required": ["type", "text"],
}
MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [TEXT, {"type": "array", "items": _TEXT_PART}]},
        "attributes": {**ATTRIBUTES, "description": "What a past response was graded; without it, the requested ones."},
        "name": {**TEXT, "description": "Without effect."},
        # What a message that an earlier answer brought has besides.
        **dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning"), NOTHING),
    },
    "required": ["role", "content"],
}
_SAMPLING: dict[str, Schema] = {
    "model": {**TEXT, "description": "As GET /v1/models names it; left out: the one that is served."},
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_INTEGER, "default": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1, "description": "0: greedy."},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 1, "description": "0: greedy."},
    "top_k": {
        "type": "integer",
        "minimum": 0,
        "maximum": MAX_INTEGER,
        "default": 0,
        "description": "Not OpenAI's. 0: off.",
    },
    "repetition_penalty": {
        "type": "number",
        "minimum": 1,
        "maximum": 100,
        "default": 1,
        "description": "Not OpenAI's. 1: off.",
    },
    "seed": {"type": "integer", "minimum": -MAX_INTEGER - 1, "maximum": MAX_INTEGER},
    "stop": {
        "description": "Not part of the text; found inside tokens, too.",
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": 500},
            {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1, "maxLength": 500}},
        ],
    },
    "stream": FLAG,
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": FLAG, "include_obfuscation": {**FLAG, "description": "Without effect."}},
    },
}
_ANYTHING: Schema = {"description": "Without effect."}
NO_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
# Refused unless they ask for what happens anyway, as many programs spell it out.
_NEUTRAL: dict[str, Schema] = {
    "frequency_penalty": {"enum": [0]},
    "presence_penalty": {"enum": [0]},
    "logit_bias": {"enum": [{}]},
}
CHAT: Schema = {
    "type": "object",
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": MESSAGE},
        "attributes": ATTRIBUTES,
        **_SAMPLING,
        "max_completion_tokens": {**TOKENS, "description": "Left out: as many as the context has room for."},
        "max_tokens": {**TOKENS, "description": "The old name of max_completion_tokens."},
        "logprobs": FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
        **_NEUTRAL,
        "response_format": {"enum": [{"type": "text"}]},
        "modalities": {"enum": [["text"]]},
        "tools": {"enum": [[]]},
        "tool_choice": {"enum": ["none"]},
        **dict.fromkeys(NO_EFFECT, _ANYTHING),
    },
    "required": ["messages"],
}
_TOKEN_IDS: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER},
}
COMPLETION: Schema = {
    "type": "object",
    "properties": {
        "prompt": {
            "anyOf": [
                TEXT,
                _TOKEN_IDS,
                {"type": "array", "minItems": 1, "items": TEXT},
                {"type": "array", "minItems": 1, "items": _TOKEN_IDS},
            ]
        },
        **_SAMPLING,
        "max_tokens": {**TOKENS, "default": 16},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
        "echo": {**FLAG, "description": "The text begins with the prompt; not together with logprobs."},
        "add_BOS": {**FLAG, "description": "Not OpenAI's. The prompt begins with the beginning-of-text token."},
        **_NEUTRAL,
        "best_of": {"enum": [1]},
        "suffix": {"enum": [""]},
        **dict.fromkeys(NO_EFFECT, _ANYTHING),
    },
    "required": ["prompt"],
}


@dataclass(frozen=True)
class Asked:
    """A checked request: a sample per choice, and how its tokens become an answer."""

    samples: tuple[Sample, ...]
    num_prompt_tokens: int  # each prompt once, however many choices it has
    stops: tuple[str, ...]  # where the text of a choice ends
    ends: tuple[str, ...]  # what must not be shown before it is known that the text goes on after it
    trim: Callable[[str], str]  # what the template put at the end of a text
    stream: bool
    include_usage: bool
    echoes: tuple[str, ...] = ()  # per choice, the prompt to show before the text
    line: Attributes | None = None  # the response was asked for at these values

    def text(self, generated: str) -> str:
        """What the client sees of all generated text."""
        cut = without_end(generated, self.stops)
        return cut if cut != generated else self.trim(generated)


def chat_request(body: Any, info: ModelInfo, max_prompts: int = MAX_SENTENCES) -> Asked:
    """Raises BadRequest."""
    asked = _read(body, CHAT, "/v1/chat/completions", info)
    served = _steerable(info)
    messages = [_message(message) for message in asked["messages"]]
    try:
        line = served.schema.complete(asked["attributes"] or {})
    except InputError as err:
        raise BadRequest(f"attributes: {err}", param="attributes") from err
    try:
        prompt = served.steering_prompt(conversation_of(messages, line, served.schema, SYSTEM_PROMPT), line)
    except InputError as err:
        raise BadRequest(str(err), param="messages") from err
    if asked["top_logprobs"] is not None and not asked["logprobs"]:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    ids = prompt_ids(prompt, info, add_BOS=False, name="messages")
    limits = [limit for key in ("max_completion_tokens", "max_tokens") if (limit := asked[key]) is not None]
    markers = (served.template.turn_start, served.template.label_start)
    made = _samples(asked, [ids], min(limits, default=MAX_INTEGER), ["messages"], info, markers, max_prompts)
    num_top = (asked["top_logprobs"] or 0) if asked["logprobs"] else None
    end_of_turn = served.template.end_of_turn
    return _asked(
        asked,
        _with_logprobs(made, num_top),
        len(ids),
        ends=(*markers, *(end_of_turn + marker for marker in markers)),
        trim=served.template.response_text,
        line=line,
    )


def completion_request(body: Any, info: ModelInfo, max_prompts: int = MAX_SENTENCES) -> Asked:
    """Raises BadRequest."""
    asked = _read(body, COMPLETION, "/v1/completions", info)
    prompt = asked["prompt"]
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if asked["echo"] and asked["logprobs"] is not None:
        raise BadRequest("echo has no log-probabilities here; PUT /generate with compute_logprob has", param="echo")
    rows = [_ids(prompt, asked["add_BOS"], info) for prompt in prompts]
    names = ["prompt"] if len(rows) == 1 else [f"prompt[{index}]" for index in range(len(rows))]
    made = _samples(asked, rows, asked["max_tokens"], names, info, (), max_prompts)
    if asked["echo"]:
        decode = info.tokenizer.decode
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in prompts]
        echoes = tuple(text for text in texts for _ in range(asked["n"]))
    else:
        echoes = ("",) * len(made)
    return _asked(asked, _with_logprobs(made, asked["logprobs"]), sum(map(len, rows)), echoes=echoes)


def _read(body: Any, schema: Schema, path: str, info: ModelInfo) -> dict[str, Any]:
    asked = read(body, schema, path)
    if asked["model"] is not None:
        require_model(asked["model"], info)
    if asked["stream_options"] is not None and not asked["stream"]:
        raise BadRequest("stream_options needs stream: true", param="stream_options")
    return asked


def require_model(name: str, info: ModelInfo) -> None:
    if name != info.name:
        raise BadRequest(
            f"model {name[:100]!r} is not served here; this server has {info.name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


def _steerable(info: ModelInfo) -> SteerLMFormat:
    if info.format is None:
        why = (
            "carries no chat format, as it was not trained by scripts/train_gpt_sft.py; /v1/completions continues text"
        )
    elif CHAT_ABILITY not in info.format.kind.abilities:
        why = "is a value model: it grades conversations (/v1/annotate) and writes no responses"
    else:
        return info.format
    raise BadRequest(f"model {info.name} {why}", param="model", code="model_cannot_chat")


def _message(message: Mapping[str, Any]) -> dict[str, object]:
    """As the steering client takes it."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    if message.get("attributes") is not None and role != "assistant":
        raise BadRequest(
            f"a {role} message has no attributes; the requested ones are a key of the body", param="messages"
        )
    return {"role": role, "content": text, "attributes": message.get("attributes")}


def _ids(prompt: str | list[int], add_BOS: bool, info: ModelInfo) -> list[int]:
    if isinstance(prompt, str):
        return prompt_ids(prompt, info, add_BOS, "prompt")
    if (highest := max(prompt)) >= info.vocab_size:
        raise BadRequest(f"token id {highest} is not below the vocabulary size {info.vocab_size}", param="prompt")
    return [*prompt_ids("", info, add_BOS, "prompt"), *prompt]


def _samples(
    asked: Mapping[str, Any],
    rows: Sequence[Sequence[int]],
    max_tokens: int,
    names: Sequence[str],
    info: ModelInfo,
    markers: Sequence[str],
    max_prompts: int,
) -> list[Sample]:
    """`n` per row of prompt tokens; choice i of any prompt draws with seed + i."""
    if len(rows) * asked["n"] > max_prompts:
        raise BadRequest(f"{len(rows)} prompts x n {asked['n']} are more than {max_prompts} choices", param="n")
    stop_ids, stop_texts = stops(markers, info)
    made = []
    for ids, name in zip(rows, names, strict=True):
        sample = Sample(
            prompt_ids=tuple(ids),
            tokens_to_generate=min(max_tokens, room_for(ids, info, name)),
            greedy=asked["temperature"] == 0 or asked["top_p"] == 0,
            temperature=float(asked["temperature"]),
            top_k=min(asked["top_k"], info.vocab_size),
            top_p=float(asked["top_p"]),
            repetition_penalty=float(asked["repetition_penalty"]),
            stop_ids=stop_ids,
            stop_texts=stop_texts,
            stop_anywhere=_stop_strings(asked),
        )
        for choice in range(asked["n"]):
            seed = None if asked["seed"] is None else (asked["seed"] + choice) % 2**63
            made.append(replace(sample, random_seed=seed))
    return made


def _with_logprobs(samples: Sequence[Sample], num_top: int | None) -> tuple[Sample, ...]:
    if num_top is None:
        return tuple(samples)
    return tuple(replace(sample, token_logprobs=True, top_logprobs=num_top) for sample in samples)


def _stop_strings(asked: Mapping[str, Any]) -> tuple[str, ...]:
    return (asked["stop"],) if isinstance(asked["stop"], str) else tuple(asked["stop"] or ())


def _asked(
    asked: Mapping[str, Any],
    samples: tuple[Sample, ...],
    num_prompt_tokens: int,
    *,
    ends: tuple[str, ...] = (),
    trim: Callable[[str], str] = str,
    echoes: tuple[str, ...] = (),
    line: Attributes | None = None,
) -> Asked:
    stop = _stop_strings(asked)
    include_usage = bool((asked["stream_options"] or {}).get("include_usage"))
    return Asked(
        samples,
        num_prompt_tokens,
        stop,
        (*stop, *ends),
        trim,
        asked["stream"],
        include_usage,
        echoes or ("",) * len(samples),
        line,
    )
