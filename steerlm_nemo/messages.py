"""`messages` of role and content, as chat clients send them, and the conversation that they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, TEXT_TO_VALUE, USER, VALUE_TO_TEXT, Conversation, RecordRef, Turn
from steerlm_nemo.errors import InputError, shown

ROLES = {"user": USER, "assistant": ASSISTANT}
Messages = Sequence[Mapping[str, object]]


def conversation_of(
    messages: str | Messages, line: Attributes | None, schema: AttributeSchema, system: str
) -> Conversation:
    """The history a response is asked for, in training's own type. Raises InputError.

    `line` is the past responses' where a message has none of its own; None for a model without attributes.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not messages:
        raise InputError("messages is empty; it must end with a user message")

    def past(role: str, own: Mapping[str, int | str] | None) -> Attributes | None:
        if role == USER:
            return None
        return line if own is None else schema.complete(own)

    system, turns = _turns(messages, system, past)
    if not turns or turns[-1].role != USER:
        raise InputError("the last message must be the user's; the model writes the assistant's")
    return Conversation(system, turns, RecordRef("messages"), None if line is None else VALUE_TO_TEXT)


def conversation_to_grade(messages: Messages, schema: AttributeSchema, system: str) -> Conversation:
    """A conversation whose turns have the attributes that their messages have, as many as those are.

    Raises InputError.
    """
    system, turns = _turns(messages, system, lambda _, own: None if own is None else schema.order(own))
    return Conversation(system, turns, RecordRef("messages"), TEXT_TO_VALUE)


def _turns(
    messages: Messages,
    system: str,
    attributes_of: Callable[[str, Mapping[str, int | str] | None], Attributes | None],
) -> tuple[str, tuple[Turn, ...]]:
    """The system prompt, the first message's where that is one, and a turn per other message."""
    turns = []
    for index, message in enumerate(messages):
        role, content, own = message.get("role"), message.get("content"), message.get("attributes")
        if not isinstance(content, str):
            raise InputError(f"message {index}: 'content' must be a string, found {shown(content)}")
        if role == "system" and index == 0:
            system = content
            continue
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(
                f"message {index}: role {shown(role)} is not known here; use user and assistant (system for the first "
                "only)"
            )
        if own is not None and not isinstance(own, Mapping):
            raise InputError(f"message {index}: 'attributes' must be an object such as {{'quality': 4}}")
        try:
            turns.append(Turn(ROLES[role], content, attributes_of(ROLES[role], own)))
        except InputError as err:
            raise InputError(f"message {index}: {err}") from err
    return system, tuple(turns)
