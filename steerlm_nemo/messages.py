"""`messages` of role and content, as chat clients send them, and the conversation that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, USER, VALUE_TO_TEXT, Conversation, RecordRef, Turn
from steerlm_nemo.errors import InputError

ROLES = {"user": USER, "assistant": ASSISTANT}


def conversation_of(
    messages: str | Sequence[Mapping[str, object]], line: Attributes, schema: AttributeSchema, system: str
) -> Conversation:
    """The history a response is asked for, in training's own type."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not messages:
        raise InputError("messages is empty; it must end with a user message")
    turns = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            raise InputError(f"message {index}: 'content' must be a string, found {content!r}")
        if role == "system" and index == 0:
            system = content
        elif role == "user":
            turns.append(Turn(USER, content))
        elif role == "assistant":
            own = message.get("attributes")
            if own is not None and not isinstance(own, Mapping):
                raise InputError(f"message {index}: 'attributes' must be an object such as {{'quality': 4}}")
            turns.append(Turn(ASSISTANT, content, line if own is None else schema.complete(own)))
        else:
            raise InputError(
                f"message {index}: role {role!r} is not known here; use user and assistant (system for the first only)"
            )
    if not turns or turns[-1].role != USER:
        raise InputError("the last message must be the user's; the model writes the assistant's")
    return Conversation(system, tuple(turns), RecordRef("messages", 1), VALUE_TO_TEXT)
