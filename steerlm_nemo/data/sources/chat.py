"""Chat files: `messages` of role and content, `conversations` of from and value.

Raw records, one of these a line::

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}],
                   "message_id": "m1"},
                  {"role": "assistant", "content": "4.", "message_id": "m2", "label": {"quality": 3}}]}

    {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4."}]}

A record of our own flow (conversation.py) is a `conversations` record; it keeps its system prompt, mask, tree_id and
attributes, all of them unless a schema is asked for. A system message may stand at the start only. Parts of a text are
joined as they are. A response marked as not to be learnt (`weight` 0, `train` false) makes the record unusable, and so
does a message without a text whose meaning is elsewhere (`tool_calls`). `unread` tells what else is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import LOSS_KEYS, SYSTEM_PROMPT, USER, Conversation, RecordRef, Turn, require_loss
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.sources.adapter import SPEAKERS, SYSTEM, attributes_at, checked, conversation, speaker
from steerlm_nemo.errors import RecordError, listed, shown

_READ = frozenset(("role", "content", "from", "value", "label", "lang", "message_id"))
_READ_IN_PARTS = frozenset(("type", "text"))
_OWN = ("gt_label", "label_soft")  # what the annotator measured
# Texts beside the text that may be all a message says; so may any list or object.
_OTHER_TEXTS = ("reasoning_content", "reasoning", "thinking", "refusal")


def messages(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    return _conversation(record, "messages", "role", "content", ref, options)


def conversations(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    return _conversation(record, "conversations", "from", "value", ref, options)


def has_foreign_speakers(record: Mapping[str, Any]) -> bool:
    """Whether the speakers of a `conversations` record are `human`, `gpt` or the like: ours has a mask or our names."""
    turns = record.get("conversations")
    roles = [turn.get("from") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    known = {role: SPEAKERS.get(role.strip().lower()) for role in roles if isinstance(role, str)}
    return "mask" not in record and any(name not in (None, role) for role, name in known.items())


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
        if not text.strip() and (elsewhere := _elsewhere(raw)):
            raise RecordError(ref, f"empty text: message {number} says nothing but in {listed(elsewhere)}")
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
    made = replace(
        made,
        system=made.system if system is None else system,
        mask=made.mask if mask is None else mask,
        tree_id=tree_id,
    )
    for number, turn in enumerate(turns, len(raw_turns) - len(turns)):
        if turn.role not in made.mask_roles:
            require_loss(raw_turns[number], ref, number)
    return made


def unread_in(turns_key: str, record: Mapping[str, Any]) -> Iterator[str]:
    """What the messages of a sound record hold that no turn keeps, as `messages[].name`. A null holds nothing."""
    for message in record[turns_key]:
        for key, value in message.items():
            if value is None or key in _READ or (key in LOSS_KEYS and not _asks_loss_of_user(message, value)):
                continue
            yield f"{turns_key}[].{key}"
        for text_key in ("content", "value"):
            parts = message.get(text_key)
            for part in parts if isinstance(parts, list) else ():
                yield from (f"{turns_key}[].{text_key}[].{key}" for key in part.keys() - _READ_IN_PARTS)


def _asks_loss_of_user(message: Mapping[str, Any], mark: Any) -> bool:
    role = message.get("role", message.get("from"))
    return bool(mark) and isinstance(role, str) and SPEAKERS.get(role.strip().lower()) == USER


def _elsewhere(message: Mapping[str, Any]) -> list[str]:
    """Keys that may hold what a message without a text says."""
    others = {key: value for key, value in message.items() if value and key not in _READ and key not in _OWN}
    return [key for key, value in others.items() if isinstance(value, list | dict) or key in _OTHER_TEXTS]


def _text(content: Any, key: str, ref: RecordRef) -> str:
    if isinstance(content, list):
        if not content:
            raise RecordError(ref, f"empty text: {key!r} is a list of no parts")
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
