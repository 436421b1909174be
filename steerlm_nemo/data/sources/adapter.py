"""What the adapters of row-shaped datasets share.

An adapter is a function of one row, its place and the options asked for. It returns the row's conversation, or the pair
of responses that it is, or raises RecordError; it never changes a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, USER, Conversation, RecordRef, Turn
from steerlm_nemo.data.options import Options
from steerlm_nemo.errors import InputError, RecordError, shown

# Spellings of the two speakers, in lower case.
SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot"), ASSISTANT),
}
SYSTEM = "system"


def conversation(turns: Iterable[Turn], ref: RecordRef, options: Options, system: str) -> Conversation:
    """Of the speakers, type and system prompt asked for; `system` where none is."""
    asked = system if options.system is None else options.system
    return Conversation(asked, tuple(turns), ref, options.record_type, options.mask_role)


def text_at(record: Mapping[str, Any], key: str, ref: RecordRef) -> str:
    """A text that is there and says something. Raises RecordError."""
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError(ref, f"wrong type: {key!r} must be a string, found {type(value).__name__}")
    if not value.strip():
        raise RecordError(ref, f"empty text: {key!r} is {shown(value)}")
    return value


def attributes_at(record: Mapping[str, Any], schema: AttributeSchema | None, ref: RecordRef) -> Attributes | None:
    """Whole numbers that stand beside each other in a mapping; None where there is none.

    Without a schema every key of the mapping is an attribute; with one, its attributes are, in its order.

    Raises:
        RecordError: a value that is not a whole number of the schema's range.
    """
    items: list[tuple[str, int | str]] = []
    for name in record if schema is None else schema.names:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise RecordError(ref, f"bad label: {name} is {shown(value)}, not a whole number")
        items.append((name, int(value)))
    return checked(Attributes(tuple(items)), schema, ref) if items else None


def checked(attributes: Attributes, schema: AttributeSchema | None, ref: RecordRef) -> Attributes:
    """The attributes that the schema has, in its order; all where there is none.

    Raises:
        RecordError: a value out of range, or the key of an attribute of the schema, misspelt.
    """
    if schema is None:
        return attributes
    values = attributes.as_dict()
    kept = Attributes(tuple((key, values[key]) for key in (*schema.keys(),) if key in values))
    try:
        schema.foreign(attributes)
        schema.check(kept)
    except InputError as err:
        raise RecordError(ref, f"bad label: {err}") from err
    return kept


def speaker(name: Any, ref: RecordRef) -> str:
    """`User`, `Assistant` or `system`. Raises RecordError listing the names known."""
    known = SPEAKERS.get(name.strip().lower()) if isinstance(name, str) else None
    if known is None and isinstance(name, str) and name.strip().lower() == SYSTEM:
        return SYSTEM
    if known is None:
        raise RecordError(ref, f"unknown role: {shown(name)}; known: {', '.join([SYSTEM, *SPEAKERS])}")
    return known
