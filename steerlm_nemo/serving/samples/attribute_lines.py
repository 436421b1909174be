"""Attribute lines in one call: keys forced, values chosen among the legal ones.

The reference asks a value model one value at a time, with the keys in the prompt, and takes the likeliest token
(NeMo attribute_annotate.py). Walking the same line with the keys forced asks the same questions in one request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from steerlm_nemo.engine.protocol import ModelInfo, Sample, ServedTokenizer
from steerlm_nemo.errors import InputError
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.samples.prompts import prompt_ids, room_for, stops

Known = Mapping[str, int | str]  # values of a line that need no choice
Constraint = tuple[tuple[tuple[int, ...], ...], ...]
Legal = Callable[[str], Sequence[str]]  # the texts a key may have


def line_samples(
    prompts: Mapping[str, str], given: Sequence[Known | None], info: ModelInfo, served: SteerLMFormat
) -> list[Sample]:
    """One constrained sample per prompt, which ends with the label marker; by the name that errors have for it.

    The values given are forced, as keys are, and the values after them are chosen in their knowledge.

    Raises:
        BadRequest: a given value is not legal, or a prompt leaves no room for a line.
    """
    steps, places = line_constraint(served, info.tokenizer)
    longest = sum(max(map(len, options)) for options in steps)
    stop_ids, stop_texts = stops((), info)
    samples = []
    for index, ((name, prompt), known) in enumerate(zip(prompts.items(), given, strict=True)):
        ids = prompt_ids(prompt, info, add_BOS=False, name=name)
        if room_for(ids, info, name) < longest:
            raise BadRequest(
                f"This model's maximum context length is {info.context_length} tokens, and the prompt is too long: "
                f"{name} has {len(ids)} tokens, and a line of up to {longest} is to come. Shorten the conversation.",
                param=name,
                code="context_length_exceeded",
            )
        texts = _legal_texts(known or {}, served, f"given[{index}]")
        samples.append(
            Sample(
                prompt_ids=tuple(ids),
                tokens_to_generate=longest,
                greedy=True,
                stop_ids=stop_ids,
                stop_texts=stop_texts,
                constraint=_with_given(steps, places, texts, served.schema.legal_values),
            )
        )
    return samples


def _legal_texts(known: Known, served: SteerLMFormat, where: str) -> dict[str, str]:
    texts = {key: str(value) for key, value in known.items()}
    for key, text in texts.items():
        try:
            legal = served.schema.legal_values(key)
        except InputError as err:
            raise BadRequest(f"{where}: {err}") from err
        if text not in legal:
            raise BadRequest(f"{where}: {key} is {text!r}; it must be one of {' '.join(legal)}")
    return texts


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
