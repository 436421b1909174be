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
from dataclasses import dataclass
from typing import Any

from steerlm_nemo.attributes import LANG, Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, USER, RecordRef
from steerlm_nemo.errors import RecordError

_LANGUAGE_TAG = re.compile(r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*").fullmatch
_NUMBERS = (float, int)
ROLES = {"prompter": USER, "assistant": ASSISTANT}


@dataclass(frozen=True)
class Message:
    """One message of a tree. `lang` is the part of the tag before the first `-`."""

    role: str
    text: str
    attributes: Attributes | None  # None: neither graded nor in a known language
    lang: str | None
    deleted: bool
    id: str | None = None


def paths(tree: Mapping[str, Any], schema: AttributeSchema, ref: RecordRef) -> Iterator[tuple[Message, ...]]:
    """Every root-to-leaf path of a tree, depth first, replies in file order. A lone prompt is a path of one.

    Raises:
        RecordError: a message cannot be used; then the whole tree cannot.
    """
    if "prompt" not in tree and "replies" not in tree:
        raise RecordError(f"{ref}: not a message tree: it has neither 'prompt' nor 'replies'; keys: {sorted(tree)}")
    pending: list[tuple[Any, tuple[Message, ...]]] = [(tree, ())]
    while pending:
        node, before = pending.pop()
        node = _message_object(node, ref)
        path = (*before, message_of(node, schema, ref))
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise RecordError(f"{ref}: wrong type: 'replies' must be a list, found {type(replies).__name__}")
        if replies:
            pending.extend((reply, path) for reply in reversed(replies))
        else:
            yield path


def _message_object(node: Any, ref: RecordRef) -> Mapping[str, Any]:
    """The message of a node: itself, or what its `prompt` key holds."""
    if isinstance(node, Mapping) and "prompt" in node:
        node = node["prompt"]
    if not isinstance(node, Mapping):
        raise RecordError(f"{ref}: wrong type: a message must be an object, found {type(node).__name__}")
    return node


def message_of(node: Mapping[str, Any], schema: AttributeSchema, ref: RecordRef) -> Message:
    """One message out of its raw object; its replies are not looked at. Raises RecordError."""
    role, text, lang, labels = (node.get(key) for key in ("role", "text", "lang", "labels"))
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(f"{ref}: unknown role: {role!r}; a message is from {' or '.join(ROLES)}")
    if not isinstance(text, str):
        raise RecordError(f"{ref}: wrong type: 'text' must be a string, found {type(text).__name__}")
    if lang is not None:
        # A tag is copied into the attribute line, so it must not be able to forge one.
        if not isinstance(lang, str) or not _LANGUAGE_TAG(lang):
            raise RecordError(f"{ref}: bad lang: {lang!r} is not a language tag such as en or pt-BR")
        lang = lang.split("-")[0]
    message_id = node.get("message_id")
    return Message(
        ROLES[role],
        text,
        _attributes(labels, lang, schema, ref),
        lang,
        node.get("deleted") is True,
        message_id if isinstance(message_id, str) else None,
    )


def _attributes(labels: Any, lang: str | None, schema: AttributeSchema, ref: RecordRef) -> Attributes | None:
    """The schema's attributes out of `labels`, in its order, on its scale; then the language."""
    in_line = lang if schema.languages else None
    if labels is None and in_line is None:
        return None
    graded = grades(labels, schema, ref)
    return graded if in_line is None else Attributes((*graded.items, (LANG, in_line)))


def grades(labels: Any, schema: AttributeSchema, ref: RecordRef) -> Attributes:
    """The grades of a raw `labels` map, or none where it is null. Raises RecordError naming a bad label."""
    if labels is not None and not isinstance(labels, Mapping):
        raise RecordError(f"{ref}: wrong type: 'labels' must be an object, found {type(labels).__name__}")
    items: list[tuple[str, int | str]] = []
    if not labels:
        return Attributes(())
    for attribute in schema.attributes:
        name = attribute.name
        if name not in labels or (label := labels[name]) is None:
            continue
        value: Any = label.get("value") if isinstance(label, dict) else None
        # By type, as a bool is an int; and this line runs for every grade of every message.
        if type(value) not in _NUMBERS or not 0 <= value <= 1:
            raise RecordError(f"{ref}: bad label: {name} is {label!r}; its value must be from 0 to 1")
        # Python rounds half to even, as the reference does: 0.625 * 4 -> 2.
        items.append((name, attribute.minimum + round(value * (attribute.maximum - attribute.minimum))))
    return Attributes(tuple(items))
