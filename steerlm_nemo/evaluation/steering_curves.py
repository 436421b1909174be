"""Does a SteerLM model do as it is told? Ask for every value of every attribute, read the responses, compare.

For each attribute in turn (the *swept* one) every held-out prompt is asked at each of its values. The other
attributes do not stay at their defaults: at every value of the swept one each of them takes its own values equally
often, in seeded random order. So a response must be right for many mixtures, and what shows up in another attribute
(*leakage*) cannot come from the design. SteerLM, arXiv:2310.05344, measured one attribute by one classifier.

One line of the plan, and of the responses (which add `response`)::

    {"prompt": "When does a dax wake?", "system": "A chat ...", "attributes": {"quality": 0, "toxicity": 3, ...},
     "swept": "quality", "prompt_number": 0}
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerlm_nemo.attributes import Attribute, Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, TEXT_TO_VALUE, USER, Conversation, RecordRef
from steerlm_nemo.correlation import spearman
from steerlm_nemo.errors import InputError, RecordError, shown
from steerlm_nemo.evaluation.intervals import bootstrap_interval
from steerlm_nemo.records import read_records

Found = Mapping[str, "int | None"]  # attributes of a response; None: unreadable
Reader = Callable[[str, str], Found]  # (prompt, response) -> its attributes


def first_prompts(chat_file: str | Path, num_prompts: int) -> list[tuple[str, str]]:
    """(first user text, system prompt) of the first records with different texts.

    Raises:
        InputError: the file has no conversation that a user opens.
        RecordError: no chat record.
    """
    prompts: dict[str, str] = {}
    for ref, record in read_records(chat_file):
        conversation = Conversation.from_record(record, ref)
        opening = conversation.turns[0]
        if opening.role == USER and len(prompts) < num_prompts:
            prompts.setdefault(opening.text, conversation.system)
    if not prompts:
        raise InputError(f"{chat_file}: no conversation begins with a turn of {USER}, so there is nothing to ask")
    return list(prompts.items())


def plan(prompts: Sequence[tuple[str, str]], schema: AttributeSchema, seed: int) -> list[dict[str, Any]]:
    """One request per attribute, value and prompt; see the module's text for the values of the others."""
    rng = random.Random(seed)
    requests = []
    for swept in schema.attributes:
        others = [attribute for attribute in schema.attributes if attribute is not swept]
        for value in swept.values():
            balanced = {other.name: _each_value_equally_often(other, len(prompts), rng) for other in others}
            for number, (prompt, system) in enumerate(prompts):
                wanted = {name: values[number] for name, values in balanced.items()} | {swept.name: value}
                requests.append(
                    {
                        "prompt": prompt,
                        "system": system,
                        "attributes": schema.order(wanted).as_dict(),
                        "swept": swept.name,
                        "prompt_number": number,
                    }
                )
    return requests


def _each_value_equally_often(attribute: Attribute, count: int, rng: random.Random) -> list[int]:
    """`count` values; no value more than once more often than another."""
    values = list(attribute.values())
    rng.shuffle(values)
    drawn = [values[i % len(values)] for i in range(count)]
    rng.shuffle(drawn)
    return drawn


@dataclass(frozen=True)
class Steered:
    """One answered request and the attributes of the response."""

    prompt: str
    prompt_number: int
    swept: str
    requested: Mapping[str, int]
    response: str
    found: Found


@dataclass(frozen=True)
class Steering:
    """One attribute's sweep.

    curve: per requested value the mean found, its 95 % interval and the number of readable responses (None, None, 0
    where there is none). leakage: rank correlation of this attribute's requested values with every attribute found;
    the own entry is `spearman`.
    """

    spearman: float | None
    interval: tuple[float, float] | None
    exact_match: float | None
    num_responses: int
    num_unreadable: int
    curve: list[tuple[int, float | None, tuple[float, float] | None, int]]
    leakage: dict[str, float | None]


def measure(steered: Sequence[Steered], schema: AttributeSchema) -> dict[str, Steering]:
    """Metrics of every attribute's sweep. Unreadable responses are left out of all but the counts."""
    result = {}
    for attribute in schema.attributes:
        sweep = [one for one in steered if one.swept == attribute.name]
        if sweep:
            result[attribute.name] = _measure_sweep(sweep, attribute, schema)
    return result


def _measure_sweep(sweep: Sequence[Steered], attribute: Attribute, schema: AttributeSchema) -> Steering:
    name = attribute.name
    by_prompt: dict[int, list[Steered]] = defaultdict(list)
    for one in sweep:
        by_prompt[one.prompt_number].append(one)
    readable = [one for one in sweep if one.found[name] is not None]
    num_exact = sum(one.found[name] == one.requested[name] for one in readable)
    return Steering(
        spearman=_correlation(sweep, name, name),
        interval=bootstrap_interval([*by_prompt.values()], lambda groups: _correlation(_flat(groups), name, name)),
        exact_match=num_exact / len(readable) if readable else None,
        num_responses=len(sweep),
        num_unreadable=len(sweep) - len(readable),
        curve=[
            _point([one for one in readable if one.requested[name] == value], name, value)
            for value in attribute.values()
        ],
        leakage={other: _correlation(sweep, name, other) for other in schema.names},
    )


def _flat(groups: Iterable[Any]) -> list[Steered]:
    return [one for group in groups for one in group]


def _correlation(sweep: Iterable[Steered], requested: str, read: str) -> float | None:
    pairs = [(one.requested[requested], value) for one in sweep if (value := one.found[read]) is not None]
    return spearman(*zip(*pairs, strict=True)) if pairs else None


def _point(
    same_value: Sequence[Steered], name: str, value: int
) -> tuple[int, float | None, tuple[float, float] | None, int]:
    found = [one.found[name] for one in same_value]
    if not found:
        return value, None, None, 0

    def mean(values: list[Any]) -> float:
        return float(np.mean(values))

    return value, mean(found), bootstrap_interval(found, mean), len(found)


# What an answered request has; True is a bool, and a bool an int.
_FIELDS = {"prompt": str, "system": str, "attributes": dict, "swept": str, "prompt_number": int, "response": str}


def read_answers(responses_file: str | Path) -> Iterator[dict[str, Any]]:
    """The answered requests of a file.

    Raises:
        RecordError: one lacks something that a request of the plan, or its answer, has.
    """
    return (_require_answer(record, ref) for ref, record in read_records(responses_file))


def _require_answer(record: dict[str, Any], ref: RecordRef) -> dict[str, Any]:
    for key, kind in _FIELDS.items():
        if type(record.get(key)) is not kind:
            raise RecordError(
                ref,
                f"{key!r} of an answered steering request must be of type {kind.__name__}, found "
                f"{shown(record.get(key))}. Make requests with scripts/plan_steering.py, and ask them with "
                "scripts/steered_inference.py.",
            )
    if type(record["attributes"].get(record["swept"])) is not int:
        raise RecordError(ref, f"'attributes' has no whole number for {shown(record['swept'])}, which is swept")
    return record


def read_with(reader: Reader, answers: Iterable[Mapping[str, Any]]) -> list[Steered]:
    """Answered requests, read by a function such as the toy world's exact reader."""
    return [_steered(answer, reader(answer["prompt"], answer["response"])) for answer in answers]


def to_grade(answers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answered requests as chat records, for a value model to grade where no exact reader exists.

    The requested line stays outside the turns: the grader must not see it.
    """
    return [
        {
            "conversations": [
                {"value": answer["prompt"], "from": USER},
                {"value": answer["response"], "from": ASSISTANT},
            ],
            "system": answer["system"],
            "mask": USER,
            "type": TEXT_TO_VALUE,
            **{key: answer[key] for key in ("prompt", "attributes", "swept", "prompt_number", "response")},
        }
        for answer in answers
    ]


def read_graded(graded_file: str | Path, schema: AttributeSchema) -> list[Steered]:
    """What a value model found in the responses (`to_grade`, annotated).

    Raises:
        RecordError: no answered request, or a value off the scale.
    """
    steered = []
    for ref, record in read_records(graded_file):
        last = Conversation.from_record(record, ref).turns[-1]
        try:
            attributes = schema.known(last.attributes or Attributes(())).as_dict()
        except InputError as err:
            raise RecordError(ref, str(err)) from err
        found = {name: int(attributes[name]) if name in attributes else None for name in schema.names}
        steered.append(_steered(_require_answer(record, ref), found))
    return steered


def _steered(answer: Mapping[str, Any], found: Found) -> Steered:
    return Steered(
        answer["prompt"], answer["prompt_number"], answer["swept"], answer["attributes"], answer["response"], found
    )
