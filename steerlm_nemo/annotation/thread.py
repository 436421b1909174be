"""A conversation while it is being graded: what is asked about each turn, and the record that comes out.

The annotator asks a server over HTTP, and the server's own POST /v1/annotate asks its engine; both ask the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from steerlm_nemo.attributes import LANG, Attributes
from steerlm_nemo.conversation import (
    RECORD_TYPES,
    TEXT_TO_VALUE,
    VALUE_TO_TEXT,
    Conversation,
    RecordType,
    Turn,
    to_lines,
)
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.records import RawLine
from steerlm_nemo.template import ChatTemplate

KEEP: Literal["keep"] = "keep"
UNKNOWN = "unknown "  # before the name of an attribute, in the counts: people gave it, and the model does not know it
Beliefs = dict[str, dict[str, Any]]  # per key, as POST /v1/attribute_lines answers


@dataclass(frozen=True)
class AnnotationSettings:
    """What is written. Two runs with equal settings and equal servers write the same attributes.

    turns: "assistant" grades the turns of every speaker that is not a mask role; "all" grades user turns, too, though
        a value model is not trained on their attributes.
    mode: "line" asks once per turn for the whole line; "slots" once per value.
    output_type: "keep" leaves `type` as it is. "VALUE_TO_TEXT" makes the output ready for training the SteerLM
        model; turns that were not graded then get a null label, as preprocessing writes them.
    process_lang: write `lang` where the model's schema has it.
    only_missing: human values are kept, and the model chooses the others in their knowledge. Human is what `gt_label`
        has, or `label` where there is none.
    soft: keep what the model believes of every value it chose, as `label_soft`.
    compat: the prompt bytes of the reference's annotator, which ends the system prompt with one line end less than
        training does; and its markers and attributes where the server does not tell its own.
    """

    turns: str = "assistant"
    mode: str = "line"
    output_type: Literal["keep"] | RecordType = KEEP
    process_lang: bool = True
    only_missing: bool = False
    soft: bool = False
    compat: bool = False

    def __post_init__(self) -> None:
        for name, legal in (
            ("turns", ("assistant", "all")),
            ("mode", ("line", "slots")),
            ("output_type", (KEEP, *RECORD_TYPES)),
        ):
            if getattr(self, name) not in legal:
                raise InputError(f"--{name} is {getattr(self, name)!r}; it must be one of {', '.join(legal)}")
        if self.soft and self.mode == "slots":
            raise InputError("--soft needs --mode=line: a value asked alone comes without probabilities")


class AnnotatedThread:
    """A conversation in work: the text before the next label, which only grows, so a server that remembers the last
    prompt computes no more than what is new."""

    def __init__(self, line: RawLine, served: SteerLMFormat, settings: AnnotationSettings) -> None:
        """Raises RecordError for whatever would stop the record from being written later."""
        self.line = line
        self.conversation = conversation = Conversation.from_record(line.require_record(), line.ref)
        to_lines([conversation])
        self._template = served.template
        self.texts = _texts(served.template, conversation)
        self.wanted = wanted_turns(conversation, settings)
        self.given: dict[int, dict[str, int | str]] = {index: {} for index in self.wanted}
        keys = [key for key in served.schema.keys() if settings.process_lang or key != LANG]  # noqa: SIM118
        self.attributes: dict[int, Attributes] = {}
        self.beliefs: dict[int, Beliefs] = {}
        self.counts: Counter[str] = Counter()
        if settings.only_missing:
            for index in self.wanted:
                human = _human(conversation.turns[index])
                known = human.as_dict()
                self.given[index] = {key: known[key] for key in keys if key in known}
                try:
                    for key in served.schema.foreign(human):
                        self.counts[f"{UNKNOWN}{key}"] += 1
                    served.schema.order(self.given[index])
                except InputError as err:
                    raise RecordError(line.ref, f"the human label cannot be kept: {err}", index) from err
        header = self.texts[0]
        # The reference's annotator has one line end less here than its training has (D-08).
        self._text = header.removesuffix(served.template.end_of_turn) if settings.compat else header
        self._next = 0
        for index in list(self.wanted):
            if len(self.given[index]) == len(keys):  # nothing is missing
                self.attributes[index] = served.schema.order(self.given[index])
                self.counts["given"] += len(keys)
        self.to_ask = [index for index in self.wanted if index not in self.attributes]

    def prompt(self, index: int) -> str:
        """What T2V training puts before this turn's label (`ChatTemplate.annotation_prompt`); asked in turn order."""
        while self._next < index:
            self._text += self.texts[self._next + 1]
            attributes = self.attributes.get(self._next, self.conversation.turns[self._next].attributes)
            if attributes is not None:
                self._text += self._template.label_start + attributes.line + self._template.end_of_name
            self._next += 1
        return self._text + self.texts[index + 1] + self._template.label_start


def _texts(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """The header, then what each turn has before its label."""
    ungraded = tuple(Turn(turn.role, turn.text) for turn in conversation.turns)
    texts = [""] * (len(ungraded) + 1)
    for segment in template.segments(replace(conversation, turns=ungraded, type=TEXT_TO_VALUE)):
        if segment.turn < len(ungraded):
            texts[segment.turn + 1] += segment.text
    return texts


def wanted_turns(conversation: Conversation, settings: AnnotationSettings) -> list[int]:
    every = settings.turns == "all"
    return [i for i, turn in enumerate(conversation.turns) if every or turn.role not in conversation.mask_roles]


def _human(turn: Turn) -> Attributes:
    """What people said of a turn: its ground truth, or its attributes where none was set apart."""
    said = turn.attributes if turn.truth is None else turn.truth
    return Attributes(()) if said is None else said


def annotated(
    conversation: Conversation,
    found: Mapping[int, Attributes],
    settings: AnnotationSettings,
    beliefs: Mapping[int, Beliefs],
) -> Conversation:
    """The conversation with the attributes found for its turns; those that were there become the turn's truth.

    A truth that is there already stays: it is people's, and the attributes were a model's. Beliefs are kept of every
    attribute the model chose: expected value (null for lang), confidence and probabilities.
    """
    turns = [
        _annotated(turn, found[index], settings, beliefs.get(index))
        if index in found
        else _set_apart(turn)
        if settings.output_type == VALUE_TO_TEXT and turn.attributes is not None
        else turn
        for index, turn in enumerate(conversation.turns)
    ]
    kind = conversation.type if settings.output_type == KEEP else settings.output_type
    return replace(conversation, turns=tuple(turns), type=kind)


def _annotated(turn: Turn, attributes: Attributes, settings: AnnotationSettings, beliefs: Beliefs | None) -> Turn:
    apart = _set_apart(turn)
    truth = apart.truth
    if truth is None and settings.only_missing:
        truth = Attributes(())  # nobody said anything: or the next run would take the model's attributes for a person's
    soft = {key: _soft(belief) for key, belief in beliefs.items()} if beliefs is not None else None
    return replace(apart, attributes=attributes, truth=truth, beliefs=soft)


def _set_apart(turn: Turn) -> Turn:
    """The turn without attributes; beliefs are of another model."""
    return replace(turn, attributes=None, truth=turn.attributes if turn.truth is None else turn.truth, beliefs=None)


def _soft(belief: dict[str, Any]) -> dict[str, Any]:
    """Rounded: further digits are noise of the arithmetic, and would triple the file."""
    expected = belief["expected"]
    return {
        "expected": None if expected is None else round(expected, 4),
        "confidence": round(belief["confidence"], 4),
        "probabilities": {value: round(share, 4) for value, share in belief["probabilities"].items()},
    }


def without_lang(line: Attributes) -> Attributes:
    return Attributes(tuple(item for item in line.items if item[0] != LANG))
