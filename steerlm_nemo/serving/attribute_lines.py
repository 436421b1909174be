"""Attribute lines in one call: keys forced, values chosen among the legal ones.

The reference asks a value model one value at a time, with the keys in the prompt, and takes the likeliest token
(NeMo attribute_annotate.py). Walking the same line with the keys forced asks the same questions in one request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from steerlm_nemo.attributes import LANG
from steerlm_nemo.engine.protocol import Choice, Completion, ModelInfo, Sample, ServedTokenizer
from steerlm_nemo.errors import InputError
from steerlm_nemo.model_kind import LINES, SteerLMFormat
from steerlm_nemo.serving.requests.generate import MAX_SENTENCES, BadRequest, GenerateRequest

Constraint = tuple[tuple[tuple[int, ...], ...], ...]
Legal = Callable[[str], Sequence[str]]  # the texts a key may have


def line_samples(body: Any, info: ModelInfo, max_prompts: int = MAX_SENTENCES) -> list[Sample]:
    """One constrained sample per prompt of `{"prompts": [text up to and with the label marker, ...]}`.

    `"given": [{key: value} or null, ...]`, one per prompt, holds values that are known: they are forced, as keys are,
    and the values after them are chosen in their knowledge. `"beliefs": false` leaves probabilities out of the answer.

    Raises:
        BadRequest: not such a body, no value model, or a prompt that leaves no room for a line.
    """
    if (
        not isinstance(body, Mapping)
        or not {"prompts"} <= set(body) <= {"prompts", "given", "beliefs"}
        or not isinstance(body.get("beliefs", True), bool)
    ):
        raise BadRequest(
            'POST /v1/attribute_lines takes {"prompts": [text, ...], "given": [{key: value}, ...], "beliefs": true}'
        )
    if info.format is None or LINES not in info.format.kind.abilities:
        raise BadRequest(f"model {info.name} is no value model; it does not write attribute lines")
    steps, places = line_constraint(info.format, info.tokenizer)
    longest = sum(max(map(len, options)) for options in steps)
    request = {"sentences": body["prompts"], "tokens_to_generate": longest, "greedy": True}
    samples = GenerateRequest.from_json(request, max_sentences=max_prompts).samples(info)
    for index, sample in enumerate(samples):
        if sample.tokens_to_generate < longest:
            raise BadRequest(
                f"prompts[{index}] has {len(sample.prompt_ids)} tokens; with a line of up to {longest} that is more "
                f"than the model's context of {info.context_length}. Shorten the conversation."
            )
    given = _given(body, len(samples), info.format)
    return [
        replace(sample, constraint=_with_given(steps, places, known, info.format.schema.legal_values))
        for sample, known in zip(samples, given, strict=True)
    ]


def _given(body: Mapping[str, Any], num_prompts: int, served: SteerLMFormat) -> list[dict[str, str]]:
    """What is known of each prompt's line, as texts. Raises BadRequest."""
    rows = body.get("given")
    if rows is None:
        return [{}] * num_prompts
    if not isinstance(rows, list) or len(rows) != num_prompts:
        raise BadRequest("given must be a list with one entry per prompt, each {key: value} or null")
    known = []
    for index, row in enumerate(rows):
        if row is not None and not isinstance(row, Mapping):
            raise BadRequest(f"given[{index}] must be an object such as {{'quality': 4}} or null")
        values = {key: str(value) for key, value in (row or {}).items()}
        for key, value in values.items():
            try:
                legal = served.schema.legal_values(key)
            except InputError as err:
                raise BadRequest(f"given[{index}]: {err}") from err
            if value not in legal:
                raise BadRequest(f"given[{index}]: {key} is {value!r}; it must be one of {' '.join(legal)}")
        known.append(values)
    return known


def _with_given(steps: Constraint, places: Mapping[str, int], known: Mapping[str, str], legal: Legal) -> Constraint:
    """The steps with the known values forced."""
    changed = list(steps)
    for key, value in known.items():
        changed[places[key]] = (steps[places[key]][legal(key).index(value)],)
    return tuple(changed)


@lru_cache(maxsize=8)  # a hundred texts to encode; a server needs it for every request
def line_constraint(served: SteerLMFormat, tokenizer: ServedTokenizer) -> tuple[Constraint, dict[str, int]]:
    """The steps of a full line, in the token ids that training gives it; and which step chooses the value of a key.

    A value's options end with the first token of what follows, so that none begins another (1 and 10).

    Raises:
        BadRequest: the tokenizer merges a value with its surroundings, so a line has no fixed places for values.
    """
    encode = tokenizer.encode_continuation
    keys = served.schema.keys()
    forced = [tuple(encode(("," if place else "") + f"{key}:")) for place, key in enumerate(keys)]
    forced.append(tuple(encode(served.template.end_of_name)))
    steps: list[tuple[tuple[int, ...], ...]] = [(forced[0],)]
    places = {}
    for place, key in enumerate(keys):
        after = forced[place + 1]
        places[key] = len(steps)
        steps.append(tuple((*encode(value), after[0]) for value in served.schema.legal_values(key)))
        if after[1:]:
            steps.append((after[1:],))
    for pick in (0, -1):
        line = ",".join(f"{key}:{served.schema.legal_values(key)[pick]}" for key in keys)
        if [token for options in steps for token in options[pick]] != encode(line + served.template.end_of_name):
            raise BadRequest(f"this tokenizer merges values with what surrounds them in {line!r}; ask slot by slot")
    return tuple(steps), places


def line_answer(completions: Sequence[Completion], body: Mapping[str, Any], info: ModelInfo) -> dict[str, Any]:
    """`lines`; for each, how many values are not the model's own first choice because that was not legal, and, if
    asked, how sure the model was of every value that was not given; and `model`, the identity of the one that chose."""
    assert info.format is not None  # line_samples has seen to it
    end = info.format.template.end_of_name
    texts = [info.tokenizer.decode(list(c.token_ids[c.num_prompt_tokens :])) for c in completions]
    answer = {
        "lines": [text.removesuffix(end) for text in texts],
        "num_overruled": [completion.num_overruled for completion in completions],
        "model": info.identity,
    }
    if body.get("beliefs", True):
        given = _given(body, len(completions), info.format)
        answer["attributes"] = [
            _beliefs(completion, known, info.format) for completion, known in zip(completions, given, strict=True)
        ]
    return answer


def _beliefs(completion: Completion, known: Mapping[str, str], served: SteerLMFormat) -> dict[str, dict[str, Any]]:
    """Per chosen attribute: value, probabilities of the legal values (their sum is 1), expected value, confidence."""
    beliefs: dict[str, dict[str, Any]] = {}
    choices = iter(completion.choices)
    for key in served.schema.keys():  # noqa: SIM118 - no mapping
        legal = served.schema.legal_values(key)
        if key in known:
            continue
        # A single legal value is no choice: it is certain.
        choice = next(choices) if len(legal) > 1 else Choice(0, (0.0,))
        chosen, logprobs = choice.chosen, choice.logprobs
        highest = max(logprobs)
        weights = [math.exp(logprob - highest) for logprob in logprobs]
        shares = [weight / sum(weights) for weight in weights]
        expected = sum(int(value) * share for value, share in zip(legal, shares, strict=True)) if key != LANG else None
        beliefs[key] = {
            "value": legal[chosen] if key == LANG else int(legal[chosen]),
            "probabilities": dict(zip(legal, shares, strict=True)),
            "expected": expected,
            "confidence": shares[chosen],
            "logprob": logprobs[chosen],
        }
    return beliefs
