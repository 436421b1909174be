"""A conversation while it is being graded: what is asked about each turn, and the record that comes out.

The annotator asks a server over HTTP, and the server's own POST /v1/annotate asks its engine; both ask the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from steerlm_nemo.attributes import LANG, Attributes
from steerlm_nemo.conversation import RECORD_TYPES, TEXT_TO_VALUE, VALUE_TO_TEXT, Conversation, Turn
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.records import RawLine, dump_record
from steerlm_nemo.template import ChatTemplate

KEEP = "keep"
Beliefs = dict[str, dict[str, Any]]  # per key, as POST /v1/attribute_lines answers


@dataclass(frozen=True)
class AnnotationSettings:
    """What is written. Two runs with equal settings and equal servers write the same labels.

    turns: "assistant" grades the turns of every speaker that is not a mask role; "all" grades user turns, too, though
        a value model is not trained on their labels.
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
    output_type: str = KEEP
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
        conversation = _conversation(line)
        self._template = served.template
        self.texts = _texts(served.template, conversation)
        self.wanted = wanted_turns(conversation, settings)
        self._labels = [turn.attributes for turn in conversation.turns]
        self.given: dict[int, dict[str, int | str]] = {index: {} for index in self.wanted}
        keys = [key for key in served.schema.keys() if settings.process_lang or key != LANG]  # noqa: SIM118
        self.grades: dict[int, Attributes] = {}
        self.beliefs: dict[int, Beliefs] = {}
        self.counts: Counter[str] = Counter()
        if settings.only_missing:
            for index in self.wanted:
                known = _human(line.record or {}, index).as_dict()
                self.counts["unknown"] += len(set(known) - set(served.schema.keys()))
                self.given[index] = {key: known[key] for key in keys if key in known}
                try:
                    served.schema.order(self.given[index])
                except InputError as err:
                    raise RecordError(f"{line.ref} turn {index}: the human label cannot be kept: {err}") from err
        header = self.texts[0]
        # The reference's annotator has one line end less here than its training has (D-08).
        self._text = header.removesuffix(served.template.end_of_turn) if settings.compat else header
        self._next = 0
        for index in list(self.wanted):
            if len(self.given[index]) == len(keys):  # nothing is missing
                self.grades[index] = served.schema.order(self.given[index])
                self.counts["given"] += len(keys)
        self.to_ask = [index for index in self.wanted if index not in self.grades]

    def prompt(self, index: int) -> str:
        """What T2V training puts before this turn's label (`ChatTemplate.annotation_prompt`); asked in turn order."""
        while self._next < index:
            self._text += self.texts[self._next + 1]
            label = self.grades.get(self._next, self._labels[self._next])
            if label is not None:
                self._text += self._template.label_start + label.line + self._template.end_of_name
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


def _human(record: dict[str, Any], index: int) -> Attributes:
    """What people said of a turn: its ground truth, or its label where none was set apart."""
    turn = record["conversations"][index]
    truth = turn.get("gt_label")
    return Attributes.parse((turn.get("label") if truth is None else truth) or "")


def _conversation(line: RawLine) -> Conversation:
    """The line's conversation. Raises RecordError for whatever would stop the record from being written later."""
    if line.record is None:
        raise RecordError(f"{line.ref}: {line.problem}")
    try:
        dump_record(line.record)
    except ValueError as err:
        raise RecordError(f"{line.ref}: a text holds a lone surrogate, which UTF-8 cannot carry") from err
    conversation = Conversation.from_record(line.record, line.ref)
    for index, turn in enumerate(line.record["conversations"]):
        try:
            Attributes.parse(turn.get("gt_label") or "")
        except (ValueError, AttributeError) as err:
            raise RecordError(f"{line.ref} turn {index}: 'gt_label' is not an attribute line: {err}") from err
    return conversation


def labelled(
    record: dict[str, Any],
    grades: dict[int, Attributes],
    settings: AnnotationSettings,
    beliefs: dict[int, Beliefs] | None = None,
) -> dict[str, Any]:
    """The record with new labels; a label that was there moves to `gt_label`, last in its turn as NeMo writes it.

    A `gt_label` that is there already is kept: it is the ground truth, and the label was a model's. `beliefs` become
    `label_soft`: per attribute the model chose, expected value (null for lang), confidence and probabilities.
    """
    turns = []
    for index, raw in enumerate(record["conversations"]):
        turn = dict(raw)
        old = turn.get("label")
        ungrade = index not in grades and settings.output_type == VALUE_TO_TEXT
        if index in grades or (ungrade and old is not None):
            # The key keeps its place if it was there.
            turn["label"] = grades[index].line if index in grades else None
            turn.pop("label_soft", None)  # of another model
            truth = turn.pop("gt_label", None)
            if beliefs and index in beliefs:
                turn["label_soft"] = {key: _soft(belief) for key, belief in beliefs[index].items()}
            truth = old if truth is None else truth
            if truth is None and index in grades and settings.only_missing:
                truth = ""  # nobody said anything: or the next run would take the model's label for a person's
            if truth is not None:
                turn["gt_label"] = truth
        turns.append(turn)
    changed = {**record, "conversations": turns}
    if settings.output_type != KEEP:
        changed["type"] = settings.output_type
    return changed


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
