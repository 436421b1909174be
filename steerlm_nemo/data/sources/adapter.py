"""What an adapter of a row-shaped dataset ends in: conversations, and what a chat record says beyond them.

An adapter is a function of one row, its place and a schema. It returns the row's conversations (two for a pair of
responses) or raises RecordError; it never changes a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, USER, Conversation, RecordRef, Turn
from steerlm_nemo.errors import InputError, RecordError

# Spellings of the two speakers, in lower case.
SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot"), ASSISTANT),
}
SYSTEM = "system"
CHOSEN, REJECTED = {"preference": "chosen"}, {"preference": "rejected"}


@dataclass(frozen=True)
class Sample:
    """One conversation of a row."""

    conversation: Conversation
    fields: Mapping[str, Any] = field(default_factory=dict)  # further keys of the record, written last
    tree_id: str | None = None
    mask: str | None = None  # None: the one asked for
    message_ids: Sequence[str | None] = ()  # of each turn, where the source has them
    langs: Sequence[str | None] = ()  # likewise
    has_own_system: bool = False


def two_turns(
    question: str,
    response: str,
    ref: RecordRef,
    *,
    system: str,
    attributes: Attributes | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Sample:
    """A question and its response."""
    turns = (Turn(USER, question), Turn(ASSISTANT, response, attributes))
    return Sample(Conversation(system, turns, ref), fields or {})


def text_at(record: Mapping[str, Any], key: str, ref: RecordRef) -> str:
    """A text that is there and says something. Raises RecordError."""
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError(f"{ref}: wrong type: {key!r} must be a string, found {type(value).__name__}")
    if not value.strip():
        raise RecordError(f"{ref}: empty text: {key!r} is {value!r}")
    return value


def grades_at(record: Mapping[str, Any], schema: AttributeSchema | None, ref: RecordRef) -> Attributes | None:
    """Whole-number grades that stand beside each other in a mapping; None where there is none.

    Without a schema every key of the mapping is a grade; with one, its attributes are, in its order.

    Raises:
        RecordError: a grade that is not a whole number of the schema's range.
    """
    items: list[tuple[str, int | str]] = []
    for name in record if schema is None else schema.names:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise RecordError(f"{ref}: bad label: {name} is {value!r}, not a whole number")
        items.append((name, int(value)))
    return checked(Attributes(tuple(items)), schema, ref) if items else None


def checked(attributes: Attributes, schema: AttributeSchema | None, ref: RecordRef) -> Attributes:
    """The attributes that the schema has, in its order; all where there is none. RecordError: a value out of range."""
    if schema is None:
        return attributes
    values = attributes.as_dict()
    kept = Attributes(tuple((key, values[key]) for key in (*schema.keys(),) if key in values))
    try:
        schema.check(kept)
    except InputError as err:
        raise RecordError(f"{ref}: bad label: {err}") from err
    return kept


def speaker(name: Any, ref: RecordRef) -> str:
    """`User`, `Assistant` or `system`. Raises RecordError listing the names known."""
    known = SPEAKERS.get(name.strip().lower()) if isinstance(name, str) else None
    if known is None and isinstance(name, str) and name.strip().lower() == SYSTEM:
        return SYSTEM
    if known is None:
        raise RecordError(f"{ref}: unknown role: {name!r}; known: {', '.join([SYSTEM, *SPEAKERS])}")
    return known
