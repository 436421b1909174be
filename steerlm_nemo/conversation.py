"""The types every step of the flow speaks: a conversation whose turns may carry attributes, and responses to compare.

Raw form (one line of a chat JSONL file, key order as NeMo's `preprocessing.py` and `attribute_annotate.py` write it)::

    {"conversations": [{"value": "Hi", "from": "User", "label": "quality:4,lang:en", "lang": "en"},
                       {"value": "Hello.", "from": "Assistant", "label": "quality:3", "gt_label": "quality:4"}],
     "tree_id": "t1", "system": "A chat ...", "mask": "User", "type": "TEXT_TO_VALUE"}

`Conversation.from_record` and `Conversation.to_record` are the only two that know this form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from json.encoder import c_make_encoder, encode_basestring  # type: ignore[attr-defined]
from typing import Any, Literal

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.errors import RecordError, shown

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
    line: int = 0  # from 1; 0: not of a file

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True)
class Turn:
    """One message. `attributes` is None where nobody gave it any; never read that as zeros.

    truth: what people said, where `attributes` are a model's (`gt_label`).
    beliefs: how sure the model was of each attribute (`label_soft`, see annotation/thread.py).
    says_null: a record of this turn has a `label` even without attributes; OpenAssistant's messages have none then.
    source: the JSON object it was read from. Writing keeps what this type does not know, in its place.
    """

    role: str
    text: str
    attributes: Attributes | None = None
    lang: str | None = None
    id: str | None = None
    truth: Attributes | None = None
    beliefs: Mapping[str, Any] | None = None
    says_null: bool = True
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Conversation:
    """A system prompt and its turns. `mask` names the speakers that get no loss, with commas between them.

    further: keys of a dataset's own that a record of it carries, written last.
    source: as of a turn.
    """

    system: str
    turns: tuple[Turn, ...]
    ref: RecordRef
    type: RecordType | None = None
    mask: str = USER
    tree_id: str | None = None
    further: Mapping[str, Any] = field(default_factory=dict, hash=False)
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def mask_roles(self) -> tuple[str, ...]:
        return tuple(role.strip() for role in self.mask.split(","))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], ref: RecordRef) -> Conversation:
        """Read one chat record. An id or language that is no string stays in the record, unread.

        Raises:
            RecordError: a key is missing or has the wrong type.
        """
        turns_raw = turns_of(record, ref)
        system, mask, kind = record.get("system"), record.get("mask", USER), record.get("type")
        if not isinstance(system, str):
            raise RecordError(ref, f"'system' must be a string, found {shown(system)}")
        if kind is not None and kind not in RECORD_TYPES:
            raise RecordError(ref, f"'type' is {shown(kind)}; it must be one of {', '.join(RECORD_TYPES)} or null")
        if not isinstance(mask, str):
            raise RecordError(ref, f"'mask' must be a role name, found {shown(mask)}")
        try:
            turns = tuple(_turn(raw, ref, index) for index, raw in enumerate(turns_raw))
        except RecordError as err:
            if "preference" not in record:
                raise
            raise RecordError(ref, f"{err.problem}{OF_PREFERENCE}", err.turn) from err
        return cls(system, turns, ref, kind, mask, _text_or_none(record.get("tree_id")), source=record)

    def to_record(self) -> dict[str, Any]:
        """Inverse of `from_record`: what was read and not changed comes out as it was, in the order it had."""
        return {**self._record(), "conversations": [_turn_record(turn) for turn in self.turns]}

    def _record(self) -> dict[str, Any]:
        """The record, its turns still to be put in their place."""
        values = {"system": self.system, "mask": self.mask, "type": self.type}
        if self.source is None:
            ids = {} if self.tree_id is None else {"tree_id": self.tree_id}
            return {"conversations": [], **ids, **values, **self.further}
        before = {"mask": USER, **self.source}
        return {**self.source, **{key: value for key, value in values.items() if value != before.get(key)}}


OF_PREFERENCE = (
    " (a strength of preference? It grades no response; scripts/process_to_regression_format.py is what reads it)"
)
PREPROCESS = "Run scripts/preprocessing.py first"
# By its keys, what else a record may be and what to do with it; from top to bottom.
_OTHERS = (
    ({"where", "reason", "raw"}, "a reject file? Mend what is in 'raw', and give that"),
    ({"message_tree_id", "prompt"}, f"an OpenAssistant tree? {PREPROCESS}"),
    ({"prompt", "swept", "response"}, "an answered request? scripts/plan_steering.py --responses_file is its reader"),
    ({"prompt", "swept"}, "a steering request? scripts/steered_inference.py --input_file is what asks it"),
    ({"conversations", "mask"}, "a chat record? scripts/plan_steering.py --prompts_file makes requests of it"),
    ({"messages"}, f"messages of role and content? {PREPROCESS}"),
    ({"text", "label"}, f"the regression format, of NeMo-Aligner's reward models? {PREPROCESS}"),
    *(({key}, f"a row of a dataset? {PREPROCESS}") for key in ("prompt", "chosen", "instruction", "message_id")),
    ({"text"}, f"a row of a dataset? {PREPROCESS}"),
)


def told_by_keys(record: Mapping[str, Any]) -> str:
    """What a record that is not of the wanted shape may be, and the tool for it, in brackets; or nothing."""
    return next((f" ({hint})" for keys, hint in _OTHERS if keys <= record.keys()), "")


def turns_of(record: Mapping[str, Any], ref: RecordRef) -> list[Any]:
    """The turns of a chat record, as they stand there. Raises RecordError: there are none."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        hint = "" if "conversations" in record else told_by_keys(record)
        seen = f"keys seen {shown(sorted(record))}"
        raise RecordError(ref, f"'conversations' must be a non-empty list of turns: {seen}{hint}")
    return turns


@dataclass(frozen=True)
class Response:
    """What is said after a context: one turn of the assistant, or several where two transcripts part earlier.

    `score` is a number on a scale of the source's own, None where it has none; attributes are the turns'.
    """

    turns: tuple[Turn, ...]
    score: float | None = None
    further: Mapping[str, Any] = field(default_factory=dict)  # as of a conversation


@dataclass(frozen=True)
class ResponseGroup:
    """Responses to one context, in the order of their source."""

    context: Conversation
    responses: tuple[Response, ...]

    def conversations(self) -> tuple[Conversation, ...]:
        """Each response after the context."""
        return tuple(
            replace(
                self.context,
                turns=(*self.context.turns, *response.turns),
                further={**self.context.further, **response.further},
            )
            for response in self.responses
        )


@dataclass(frozen=True)
class Pair(ResponseGroup):
    """Two responses to one context. `chosen` is the number of the better one, None where neither is.

    margin: how much better it is, on a scale of the source's own; None where it is not known.
    """

    chosen: Literal[0, 1] | None = None
    margin: float | None = None

    def conversations(self) -> tuple[Conversation, ...]:
        """As of a group; `preference` says which is the better one."""
        if self.chosen is None:
            return super().conversations()
        return tuple(
            replace(
                conversation,
                further={"preference": "chosen" if number == self.chosen else "rejected", **conversation.further},
            )
            for number, conversation in enumerate(super().conversations())
        )


# What other chat formats say of the loss of a message: OpenAI and mistral-finetune, axolotl, ms-swift.
LOSS_KEYS = ("weight", "train", "training", "loss")


def require_loss(message: Mapping[str, Any], ref: RecordRef, turn: int) -> None:
    """Refuse a message to be learnt that is marked otherwise: a record masks speakers, not single turns.

    Raises:
        RecordError: one of `LOSS_KEYS` is neither null nor 1.
    """
    for key in LOSS_KEYS:
        if message.get(key) not in (None, 1):  # True is 1
            raise RecordError(
                ref,
                f"not to be learnt: {key!r} of turn {turn} is {shown(message[key])}, but a record can only leave out "
                f"the loss of all that a speaker says. End the conversation before it, or take {key!r} away",
            )


def require_every_loss(conversation: Conversation) -> None:
    """As `require_loss`, of all the turns of a record that training learns from."""
    for number, turn in enumerate(conversation.turns):
        if turn.source is not None and turn.role not in conversation.mask_roles:
            require_loss(turn.source, conversation.ref, number)


def dump_json(value: Any) -> str:
    """As the reference dumps: default separators, non-ASCII literal, key order kept. ValueError: an infinite number."""
    return "".join(_chunks(value, 0))


def _refuse(value: Any) -> None:
    raise TypeError(f"{type(value).__name__} has no form in JSON")


# What json.dumps makes anew for every value, which takes it longer than a turn does.
_chunks = c_make_encoder(None, _refuse, encode_basestring, None, ": ", ", ", False, False, False)


def to_lines(conversations: Iterable[Conversation]) -> list[str]:
    """What `dump_json` makes of each record; a turn that several share, as the paths of a tree do, is dumped once.

    Raises:
        RecordError: JSON cannot carry it: nested too deeply, or an infinite number.
    """
    dumped: dict[int, str] = {}
    lines = []
    ends_so_far: tuple[str | None, ...] | None = None
    end = ""
    for conversation in conversations:
        try:
            if conversation.source is not None:
                lines.append(dump_json(conversation.to_record()))
                continue
            for turn in conversation.turns:
                if id(turn) not in dumped:
                    dumped[id(turn)] = dump_json(_turn_record(turn))
            # A record that was not read begins with its turns; and those of a tree end alike.
            ends = (conversation.tree_id, conversation.system, conversation.mask, conversation.type)
            if ends != ends_so_far or conversation.further:
                ends_so_far = None if conversation.further else ends
                end = dump_json(conversation._record()).removeprefix(_NO_TURNS)
            lines.append(_NO_TURNS + ", ".join([dumped[id(turn)] for turn in conversation.turns]) + end)
        except (RecursionError, ValueError) as err:
            raise RecordError(conversation.ref, f"cannot be written as JSON: {err}") from err
    return lines


_NO_TURNS = '{"conversations": ['


def _turn(raw: Any, ref: RecordRef, index: int) -> Turn:
    if not isinstance(raw, Mapping):
        problem = f"a turn must be an object with 'from' and 'value', found {type(raw).__name__}"
        raise RecordError(ref, problem, index)
    for key in ("from", "value"):
        if not isinstance(raw.get(key), str):
            raise RecordError(ref, f"{key!r} must be a string, found {shown(raw.get(key))}", index)
    lines: dict[str, Attributes | None] = {}
    for key in ("label", "gt_label"):
        line = raw.get(key)
        if line is not None and not isinstance(line, str):
            wanted = "a string such as 'quality:4,toxicity:0' or null"
            raise RecordError(ref, f"{key!r} must be {wanted}, found {shown(line)}", index)
        try:
            lines[key] = None if line is None else Attributes.parse(line)
        except ValueError as err:
            raise RecordError(ref, str(err) if key == "label" else f"{key}: {err}", index) from err
    return Turn(
        raw["from"],
        raw["value"],
        lines["label"],
        _text_or_none(raw.get("lang")),
        truth=lines["gt_label"],
        beliefs=raw.get("label_soft"),
        source=raw,
    )


def _turn_record(turn: Turn) -> dict[str, Any]:
    line = None if turn.attributes is None else turn.attributes.line
    if turn.source is None:
        record: dict[str, Any] = {"value": turn.text, "from": turn.role}
        if line is not None or turn.says_null:
            record["label"] = line
        if turn.lang is not None:
            record["lang"] = turn.lang
        if turn.beliefs is None and turn.truth is None:
            return record
    else:
        record = {**turn.source, "value": turn.text, "from": turn.role}
    measured = {"label_soft": turn.beliefs, "gt_label": None if turn.truth is None else turn.truth.line}
    is_new = line is not None and "label" not in record
    if line != record.get("label"):
        record["label"] = line
    if is_new or any(value != record.get(key) for key, value in measured.items()):
        for key, value in measured.items():  # NeMo's annotator writes them last
            record.pop(key, None)
            if value is not None:
                record[key] = value
    return record


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
