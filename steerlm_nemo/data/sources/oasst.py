"""OpenAssistant message trees (OASST1, OASST2) -> the paths that become conversations.

Raw record, one line of `*.trees.jsonl[.gz]`; only these fields are read::

    {"message_tree_id": "t1", "tree_state": "ready_for_export",
     "prompt": {"message_id": "m1", "text": "Hi, what is 2+2?", "role": "prompter", "lang": "en", "deleted": false,
                "labels": {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.875, "count": 3}},
                "replies": [{"text": "It is 4.", "role": "assistant", "lang": "pt-BR", "labels": {},
                             "replies": []}]}}

`labels`, `lang`, `deleted`, `replies` and `tree_state` may be missing or null. A message without labels has a
`lang:xx` line only (the reference crashes there, D-07).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from steerlm_nemo.attributes import LANG, Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, USER, Conversation, RecordRef, Turn
from steerlm_nemo.data.options import Filters, Options
from steerlm_nemo.errors import RecordError, shown

_LANGUAGE_TAG = re.compile(r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*").fullmatch
_NUMBERS = (float, int)
ROLES = {"prompter": USER, "assistant": ASSISTANT}


class Message(NamedTuple):
    """A turn of a tree. Its `lang` is the part of the tag before the first `-`; its attributes are None where it has
    neither labels nor a language."""

    turn: Turn
    deleted: bool


Path = tuple[Message, ...]


def conversation_of(path: Path, tree_id: str, ref: RecordRef, options: Options) -> Conversation:
    """Turns that paths share stay the same objects."""
    system = SYSTEM_PROMPT if options.system is None else options.system
    turns = tuple([message.turn for message in path])
    return Conversation(system, turns, ref, options.record_type, options.mask_role, tree_id)


def refused(path: Path, filters: Filters) -> str | None:
    """The option that leaves a path out, or None if it stays. One message is enough to refuse it."""
    if filters.drop_deleted and any(message.deleted for message in path):
        return "--drop_deleted"
    if filters.languages and any(message.turn.lang not in filters.languages for message in path):
        return "--lang"
    return None


def paths(tree: Mapping[str, Any], schema: AttributeSchema, ref: RecordRef) -> Iterator[Path]:
    """Every root-to-leaf path of a tree, depth first, replies in file order. A lone prompt is a path of one.

    Raises:
        RecordError: a message cannot be used; then the whole tree cannot.
    """
    if "prompt" not in tree and "replies" not in tree:
        raise RecordError(
            ref, f"not a message tree: it has neither 'prompt' nor 'replies'; keys: {shown(sorted(tree))}"
        )
    pending: list[tuple[Any, Path]] = [(tree, ())]
    while pending:
        node, before = pending.pop()
        node = _message_object(node, ref)
        path = (*before, message_of(node, schema, ref))
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise RecordError(ref, f"wrong type: 'replies' must be a list, found {type(replies).__name__}")
        if replies:
            pending.extend((reply, path) for reply in reversed(replies))
        else:
            yield path


def _message_object(node: Any, ref: RecordRef) -> Mapping[str, Any]:
    """The message of a node: itself, or what its `prompt` key holds."""
    if isinstance(node, Mapping) and "prompt" in node:
        node = node["prompt"]
    if not isinstance(node, Mapping):
        raise RecordError(ref, f"wrong type: a message must be an object, found {type(node).__name__}")
    return node


def message_of(node: Mapping[str, Any], schema: AttributeSchema, ref: RecordRef) -> Message:
    """One message out of its raw object; its replies are not looked at. Raises RecordError."""
    get = node.get
    role, text, lang, labels = get("role"), get("text"), get("lang"), get("labels")
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(ref, f"unknown role: {shown(role)}; a message is from {' or '.join(ROLES)}")
    if not isinstance(text, str):
        raise RecordError(ref, f"wrong type: 'text' must be a string, found {type(text).__name__}")
    if lang is not None:
        # A tag is copied into the attribute line, so it must not be able to forge one.
        if not isinstance(lang, str) or not _LANGUAGE_TAG(lang):
            raise RecordError(ref, f"bad lang: {shown(lang)} is not a language tag such as en or pt-BR")
        lang = lang.split("-")[0]
    attributes, message_id = _attributes(labels, lang, schema, ref), get("message_id")
    turn = Turn(
        ROLES[role], text, attributes, lang, message_id if isinstance(message_id, str) else None, says_null=False
    )
    return Message(turn, get("deleted") is True)


def _attributes(labels: Any, lang: str | None, schema: AttributeSchema, ref: RecordRef) -> Attributes | None:
    """The schema's attributes out of `labels`, in its order, on its scale; then the language."""
    in_line = lang if schema.languages else None
    if labels is None and in_line is None:
        return None
    found = attributes_of(labels, schema, ref)
    return found if in_line is None else Attributes((*found.items, (LANG, in_line)))


def attributes_of(labels: Any, schema: AttributeSchema, ref: RecordRef) -> Attributes:
    """Those of a raw `labels` map, or none where it is null. Raises RecordError naming a bad label."""
    if labels is not None and not isinstance(labels, Mapping):
        raise RecordError(ref, f"wrong type: 'labels' must be an object, found {type(labels).__name__}")
    items: list[tuple[str, int | str]] = []
    if not labels:
        return Attributes(())
    for name, minimum, steps in schema.scales:
        if (label := labels.get(name)) is None:
            continue
        value: Any = label.get("value") if isinstance(label, dict) else None
        # By type, as a bool is an int; and this line runs for every label of every message.
        if type(value) not in _NUMBERS or not 0 <= value <= 1:
            raise RecordError(ref, f"bad label: {name} is {shown(label)}; its value must be from 0 to 1")
        # Python rounds half to even, as the reference does: 0.625 * 4 -> 2.
        items.append((name, minimum + round(value * steps)))
    return Attributes(tuple(items))
