"""Chat files: `messages` of role and content, `conversations` of from and value.

Raw records, one of these a line::

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}],
                   "message_id": "m1"},
                  {"role": "assistant", "content": "4.", "message_id": "m2", "label": {"quality": 3}}]}

    {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4."}]}

A record of our own flow (conversation.py) is a `conversations` record; it keeps its system prompt, mask, tree_id and
labels, all of them unless a schema is asked for. A system message may stand at the start only. Parts of a text are
joined as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import SYSTEM_PROMPT, Conversation, RecordRef, Turn
from steerlm_nemo.data.sources.adapter import SYSTEM, Sample, checked, grades_at, speaker
from steerlm_nemo.errors import RecordError


def messages(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    return [_sample(record, "messages", "role", "content", ref, schema)]


def conversations(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    return [_sample(record, "conversations", "from", "value", ref, schema)]


def _sample(
    record: Mapping[str, Any],
    turns_key: str,
    role_key: str,
    text_key: str,
    ref: RecordRef,
    schema: AttributeSchema | None,
) -> Sample:
    raw_turns = record.get(turns_key)
    if not isinstance(raw_turns, list) or not all(isinstance(turn, Mapping) for turn in raw_turns):
        raise RecordError(f"{ref}: wrong type: {turns_key!r} must be a list of objects")
    mask, tree_id, system = (_string_or_none(record, key, ref) for key in ("mask", "tree_id", "system"))
    turns: list[Turn] = []
    kept: list[Mapping[str, Any]] = []
    for number, raw in enumerate(raw_turns):
        # With a mask the speakers' names are the record's own affair; without one they must be of the two we know.
        role = raw.get(role_key)
        if mask is None or not isinstance(role, str):
            role = speaker(role, ref)
        text = _text(raw.get(text_key), text_key, ref)
        if role == SYSTEM:
            if number or system is not None:
                raise RecordError(f"{ref}: second system prompt: message {number} is from the system")
            system = text
            continue
        turns.append(Turn(role, text, _attributes(raw.get("label"), schema, ref)))
        kept.append(raw)
    if len(turns) < 2:
        raise RecordError(f"{ref}: too short: {len(turns)} turn; a conversation has at least two")
    return Sample(
        Conversation(SYSTEM_PROMPT if system is None else system, tuple(turns), ref),
        tree_id=tree_id,
        mask=mask,
        message_ids=[_string_or_none(turn, "message_id", ref) for turn in kept],
        langs=[_string_or_none(turn, "lang", ref) for turn in kept],
        has_own_system=system is not None,
    )


def _text(content: Any, key: str, ref: RecordRef) -> str:
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RecordError(
                    f"{ref}: not text: a part of {key!r} is {kind!r}; only parts of type text can be read"
                )
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RecordError(f"{ref}: wrong type: {key!r} must be a string, found {type(content).__name__}")
    return content


def _attributes(label: Any, schema: AttributeSchema | None, ref: RecordRef) -> Attributes | None:
    if label is None:
        return None
    if isinstance(label, Mapping):
        return grades_at(label, schema, ref)
    if not isinstance(label, str):
        raise RecordError(f"{ref}: bad label: {label!r}; give 'quality:4,...' or an object of grades")
    try:
        return checked(Attributes.parse(label), schema, ref)
    except ValueError as err:
        raise RecordError(f"{ref}: bad label: {err}") from err


def _string_or_none(raw: Mapping[str, Any], key: str, ref: RecordRef) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise RecordError(f"{ref}: wrong type: {key!r} must be a string, found {type(value).__name__}")
    return value
