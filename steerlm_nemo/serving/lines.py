"""Attribute lines in one call: keys forced, values chosen among the legal ones.

The reference asks a value model one value at a time, with the keys in the prompt, and takes the likeliest token
(NeMo attribute_annotate.py). Walking the same line with the keys forced asks the same questions in one request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from steerlm_nemo.conversation import TEXT_TO_VALUE
from steerlm_nemo.serving.request import BadRequest, GenerateRequest
from steerlm_nemo.serving.sampling import Completion, ModelInfo, Sample
from steerlm_nemo.template import SteerLMFormat

Constraint = tuple[tuple[tuple[int, ...], ...], ...]


def line_samples(body: Any, info: ModelInfo) -> list[Sample]:
    """One constrained sample per prompt of `{"prompts": [text up to and with the label marker, ...]}`.

    Raises:
        BadRequest: not such a body, no value model, or a prompt that leaves no room for a line.
    """
    if not isinstance(body, Mapping) or set(body) != {"prompts"}:
        raise BadRequest('POST /v1/attribute_lines takes {"prompts": [text, ...]}')
    if info.format is None or info.format.record_type != TEXT_TO_VALUE:
        raise BadRequest(f"model {info.name} is no value model; it does not write attribute lines")
    steps = line_constraint(info.format, info)
    longest = sum(max(map(len, options)) for options in steps)
    request = {"sentences": body["prompts"], "tokens_to_generate": longest, "greedy": True}
    samples = GenerateRequest.from_json(request).samples(info)
    for index, sample in enumerate(samples):
        if sample.tokens_to_generate < longest:
            raise BadRequest(
                f"prompts[{index}] has {len(sample.prompt_ids)} tokens; with a line of up to {longest} that is more "
                f"than the model's context of {info.context_length}. Shorten the conversation."
            )
    return [replace(sample, constraint=steps) for sample in samples]


def line_constraint(served: SteerLMFormat, info: ModelInfo) -> Constraint:
    """The steps of a full line, in the token ids that training gives it.

    A value's options end with the first token of what follows, so that none begins another (1 and 10).

    Raises:
        BadRequest: the tokenizer merges a value with its surroundings, so a line has no fixed places for values.
    """
    encode = info.tokenizer.encode_continuation
    keys = served.schema.keys()
    forced = [tuple(encode(("," if place else "") + f"{key}:")) for place, key in enumerate(keys)]
    forced.append(tuple(encode(served.template.end_of_name)))
    steps: list[tuple[tuple[int, ...], ...]] = [(forced[0],)]
    for place, key in enumerate(keys):
        after = forced[place + 1]
        steps.append(tuple((*encode(value), after[0]) for value in served.schema.legal_values(key)))
        if after[1:]:
            steps.append((after[1:],))
    for pick in (0, -1):
        line = ",".join(f"{key}:{served.schema.legal_values(key)[pick]}" for key in keys)
        if [token for options in steps for token in options[pick]] != encode(line + served.template.end_of_name):
            raise BadRequest(f"this tokenizer merges values with what surrounds them in {line!r}; ask slot by slot")
    return tuple(steps)


def line_answer(completions: Sequence[Completion], info: ModelInfo) -> dict[str, Any]:
    """`lines`, and for each how many values are not the model's own first choice because that was not legal."""
    assert info.format is not None  # line_samples has seen to it
    end = info.format.template.end_of_name
    texts = [info.tokenizer.decode(list(c.token_ids[c.num_prompt_tokens :])) for c in completions]
    return {
        "lines": [text.removesuffix(end) for text in texts],
        "num_overruled": [completion.num_overruled for completion in completions],
    }
