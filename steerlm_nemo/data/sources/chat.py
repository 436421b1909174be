"""Chat files: `messages` of role and content, `conversations` of from and value.

Raw records, one of these a line::

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}],
                   "message_id": "m1"},
                  {"role": "assistant", "content": "4.", "message_id": "m2", "label": {"quality": 3}}]}

    {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4."}]}

A record of our own flow (conversation.py) is a `conversations` record; it keeps its system prompt, mask, tree_id and
attributes, all of them unless a schema is asked for. A system message may stand at the start only. Parts of a text are
joined as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import SYSTEM_PROMPT, Conversation, RecordRef, Turn
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.sources.adapter import SYSTEM, attributes_at, checked, conversation, speaker
from steerlm_nemo.errors import RecordError, shown


def messages(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    return _conversation(record, "messages", "role", "content", ref, options)


def conversations(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    return _conversation(record, "conversations", "from", "value", ref, options)


def _conversation(
    record: Mapping[str, Any], turns_key: str, role_key: str, text_key: str, ref: RecordRef, options: Options
) -> Conversation:
    raw_turns = record.get(turns_key)
    if not isinstance(raw_turns, list) or not all(isinstance(turn, Mapping) for turn in raw_turns):
        raise RecordError(ref, f"wrong type: {turns_key!r} must be a list of objects")
    mask, tree_id, system = (_text_or_none(record, key, ref) for key in ("mask", "tree_id", "system"))
    turns: list[Turn] = []
    for number, raw in enumerate(raw_turns):
        # With a mask the speakers' names are the record's own affair; without one they must be of the two we know.
        role = raw.get(role_key)
        if mask is None or not isinstance(role, str):
            role = speaker(role, ref)
        text = _text(raw.get(text_key), text_key, ref)
        if role == SYSTEM:
            if number or system is not None:
                raise RecordError(ref, f"second system prompt: message {number} is from the system")
            system = text
            continue
        lang, message_id = _text_or_none(raw, "lang", ref), _text_or_none(raw, "message_id", ref)
        turns.append(Turn(role, text, _attributes(raw.get("label"), options.schema, ref), lang, message_id))
    if len(turns) < 2:
        raise RecordError(ref, f"too short: {len(turns)} turn; a conversation has at least two")
    made = conversation(turns, ref, options, SYSTEM_PROMPT)
    return replace(
        made,
        system=made.system if system is None else system,
        mask=made.mask if mask is None else mask,
        tree_id=tree_id,
    )


def _text(content: Any, key: str, ref: RecordRef) -> str:
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = shown(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
                raise RecordError(ref, f"not text: a part of {key!r} is {kind}; only parts of type text can be read")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RecordError(ref, f"wrong type: {key!r} must be a string, found {type(content).__name__}")
    return content


def _attributes(label: Any, schema: AttributeSchema | None, ref: RecordRef) -> Attributes | None:
    if label is None:
        return None
    if isinstance(label, Mapping):
        return attributes_at(label, schema, ref)
    if not isinstance(label, str):
        raise RecordError(ref, f"bad label: {shown(label)}; give 'quality:4,...' or an object of whole numbers")
    try:
        return checked(Attributes.parse(label), schema, ref)
    except ValueError as err:
        raise RecordError(ref, f"bad label: {err}") from err


def _text_or_none(raw: Mapping[str, Any], key: str, ref: RecordRef) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise RecordError(ref, f"wrong type: {key!r} must be a string, found {type(value).__name__}")
    return value
