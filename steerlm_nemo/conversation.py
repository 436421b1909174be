"""The type every step of the flow speaks: a conversation whose turns may be graded.

Raw form (one line of a chat JSONL file, key order as NeMo's `preprocessing.py` writes it)::

    {"conversations": [{"value": "Hi", "from": "User", "label": "quality:4,lang:en", "lang": "en"},
                       {"value": "Hello.", "from": "Assistant", "label": null}],
     "tree_id": "t1", "system": "A chat ...", "mask": "User", "type": "TEXT_TO_VALUE"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.errors import RecordError

RecordType = Literal["TEXT_TO_VALUE", "VALUE_TO_TEXT"]
TEXT_TO_VALUE: RecordType = "TEXT_TO_VALUE"
VALUE_TO_TEXT: RecordType = "VALUE_TO_TEXT"
RECORD_TYPES = (TEXT_TO_VALUE, VALUE_TO_TEXT)

USER = "User"
ASSISTANT = "Assistant"

# The two newlines at the end are the reference's (NeMo preprocessing.py); records keep them byte for byte.
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.\n\n"
)


@dataclass(frozen=True)
class RecordRef:
    """Where a record came from; every later error can point there."""

    path: str
    line: int  # 1-based

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Turn:
    """One message. `attributes` is None where nobody graded it; never read that as zeros."""

    role: str
    text: str
    attributes: Attributes | None = None


@dataclass(frozen=True)
class Conversation:
    """A system prompt and its turns. `mask_roles` are the speakers that get no loss."""

    system: str
    turns: tuple[Turn, ...]
    ref: RecordRef
    type: RecordType | None = None
    mask_roles: tuple[str, ...] = (USER,)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], ref: RecordRef) -> Conversation:
        """Read one chat record.

        Raises:
            RecordError: a key is missing or has the wrong type; the message starts with file:line.
        """
        turns_raw = record.get("conversations")
        if not isinstance(turns_raw, list) or not turns_raw:
            is_tree = {"message_tree_id", "prompt"} <= record.keys()
            hint = " (an OpenAssistant tree? Run scripts/preprocessing.py first)" if is_tree else ""
            keys = sorted(record)
            raise RecordError(f"{ref}: 'conversations' must be a non-empty list of turns{hint}: keys seen {keys}")
        system = record.get("system")
        if not isinstance(system, str):
            raise RecordError(f"{ref}: 'system' must be a string, found {system!r}")
        record_type = record.get("type")
        if record_type is not None and record_type not in RECORD_TYPES:
            raise RecordError(f"{ref}: 'type' is {record_type!r}; it must be one of {', '.join(RECORD_TYPES)} or null")
        mask = record.get("mask", USER)
        if not isinstance(mask, str):
            raise RecordError(f"{ref}: 'mask' must be a role name, found {mask!r}")
        turns = tuple(_turn(raw, f"{ref} turn {index}") for index, raw in enumerate(turns_raw))
        return cls(system, turns, ref, record_type, tuple(role.strip() for role in mask.split(",")))

    def require_unicode(self) -> None:
        """Raise RecordError if a text holds a lone surrogate: neither UTF-8 nor a tokenizer can carry it."""
        for turn in (Turn("", self.system), *self.turns):
            line = turn.attributes.line if turn.attributes is not None else ""
            try:
                "".join((turn.role, turn.text, line)).encode("utf-8")
            except UnicodeEncodeError as err:
                raise RecordError(f"{self.ref}: lone surrogate: a text holds {err.object[err.start]!r}") from err


def _turn(raw: Any, where: str) -> Turn:
    if not isinstance(raw, Mapping):
        raise RecordError(f"{where}: a turn must be an object with 'from' and 'value', found {type(raw).__name__}")
    for key in ("from", "value"):
        if not isinstance(raw.get(key), str):
            raise RecordError(f"{where}: {key!r} must be a string, found {raw.get(key)!r}")
    label = raw.get("label")
    if label is not None and not isinstance(label, str):
        raise RecordError(f"{where}: 'label' must be a string such as 'quality:4,toxicity:0' or null, found {label!r}")
    try:
        attributes = None if label is None else Attributes.parse(label)
    except ValueError as err:
        raise RecordError(f"{where}: {err}") from err
    return Turn(raw["from"], raw["value"], attributes)
