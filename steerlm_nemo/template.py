"""Conversation -> text, token ids and loss mask; and back-ends of the same function for prompts.

Every prompt and every training record is built from `ChatTemplate.segments`, so the bytes a model is asked with
are the bytes it was trained on (reference defects D-02, D-08 and D-31 came from having several builders).

A segment is the unit of tokenisation: each is encoded alone, so the boundary between masked and supervised text
is a token boundary by construction and no offset has to be searched for.
Text layout: NeMo v1.22+ `gpt_sft_chat_dataset.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from steerlm_nemo.conversation import TEXT_TO_VALUE, VALUE_TO_TEXT, Conversation, Turn
from steerlm_nemo.errors import ConfigError

SYSTEM_ROLE = "System"


class Segment(NamedTuple):
    """A stretch of rendered text. `turn` is -1 for the system header; `in_loss` means every token is a target."""

    text: str
    turn: int
    part: str  # header | turn_start | name | label_start | label | text
    in_loss: bool


class Tokenizer(Protocol):
    """What rendering needs of a tokenizer; see `steerlm_nemo.tokenizer`."""

    eos_id: int

    def for_template(self, markers: Sequence[str]) -> Tokenizer: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_continuation(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Rendered:
    """Token ids and loss mask of one conversation, equally long; mask 1 where the token is a target."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    num_markers_removed: int  # marker texts taken out of the content (D-10)

    @property
    def first_target(self) -> int | None:
        """The position of the first target."""
        return self.loss_mask.index(1) if 1 in self.loss_mask else None


def num_seen(seq_len: int) -> int:
    """How many leading tokens of a conversation training at `seq_len` sees.

    `seq_len` of them go in; targets are shifted by one, so one more is the last target (NeMo's collate).
    """
    return seq_len + 1


def cut(rendered: Rendered, seq_len: int) -> Rendered:
    """What training at `seq_len` sees of a conversation. The first token is the header's and never a target."""
    end = num_seen(seq_len)
    return replace(rendered, token_ids=rendered.token_ids[:end], loss_mask=rendered.loss_mask[:end])


@dataclass(frozen=True)
class ChatTemplate:
    """The five markers, named as in Aligner's `model.data.chat_prompt_tokens`. Defaults: its gpt_sft.yaml."""

    system_turn_start: str = "\x00"
    turn_start: str = "\x11"
    label_start: str = "\x12"
    end_of_turn: str = "\n"
    end_of_name: str = "\n"

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name):
                raise ConfigError(f"chat_prompt_tokens.{field.name} is empty; a marker needs a character")
        markers = self.markers
        if any(a != b and a in b for a in markers for b in markers) or len(set(markers)) < len(markers):
            raise ConfigError(f"chat_prompt_tokens: the markers {markers!r} must differ and none may contain another")

    @property
    def markers(self) -> tuple[str, str, str]:
        """The markers that structure a conversation; content may not contain them."""
        return (self.system_turn_start, self.turn_start, self.label_start)

    def sanitise(self, text: str) -> tuple[str, int]:
        """Content without marker texts, and how many were removed.

        Repeats until none is left: removing one marker can make the text around it form another.
        """
        removed = 0
        while self._any_marker.search(text):
            text, count = self._any_marker.subn("", text)
            removed += count
        return text, removed

    @cached_property
    def _any_marker(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(marker) for marker in self.markers))

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """The rendered conversation, piece by piece, with the loss rules of the reference (NeMo v1.22+).

        Deviations: a TEXT_TO_VALUE turn without a label gives no loss, nor does the marker after it (D-09: the
        reference trains on the response text); marker texts inside content are removed (D-10).
        """
        is_t2v = conversation.type == TEXT_TO_VALUE
        system, _ = self.sanitise(conversation.system)
        yield Segment(
            self.system_turn_start + SYSTEM_ROLE + self.end_of_name + system + self.end_of_turn, -1, "header", False
        )
        ends_unlabelled = False  # is the turn before one that should have been graded, but has no label (D-09)?
        for index, turn in enumerate(conversation.turns):
            masked = turn.role in conversation.mask_roles or (index == 0 and not is_t2v)
            # The marker that opens a masked turn is the target that ends the turn before it.
            starts_in_loss = turn.role in conversation.mask_roles and index >= (1 if is_t2v else 2)
            text, _ = self.sanitise(turn.text)
            role, _ = self.sanitise(turn.role)
            yield Segment(self.turn_start, index, "turn_start", starts_in_loss and not ends_unlabelled)
            yield Segment(role + self.end_of_name, index, "name", False)
            label = turn.attributes.line + self.end_of_name if turn.attributes is not None else None
            if is_t2v:
                yield Segment(text + self.end_of_turn, index, "text", False)
                if label is not None:
                    yield Segment(self.label_start, index, "label_start", False)
                    yield Segment(label, index, "label", not masked)
                ends_unlabelled = not masked and label is None
            else:
                if label is not None and conversation.type == VALUE_TO_TEXT:
                    yield Segment(self.label_start, index, "label_start", False)
                    yield Segment(label, index, "label", False)
                yield Segment(text + self.end_of_turn, index, "text", not masked)
        if conversation.turns[-1].role not in conversation.mask_roles:
            yield Segment(self.turn_start, len(conversation.turns), "turn_start", not ends_unlabelled)

    def num_markers_in_content(self, conversation: Conversation) -> int:
        """Marker texts that rendering will take out of system prompt, roles and turns."""
        contents = [conversation.system]
        for turn in conversation.turns:
            contents += [turn.role, turn.text]
        return sum(self.sanitise(content)[1] for content in contents)

    def render(self, conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
        """Token ids and loss mask of the whole, untruncated conversation."""
        token_ids: list[int] = []
        loss_mask: list[int] = []
        for segment, ids in self.encoded_segments(conversation, tokenizer):
            token_ids += ids
            loss_mask += (_TARGET if segment.in_loss else _NO_TARGET) * len(ids)
        return Rendered(tuple(token_ids), tuple(loss_mask), self.num_markers_in_content(conversation))

    def encoded_segments(self, conversation: Conversation, tokenizer: Tokenizer) -> Iterator[tuple[Segment, list[int]]]:
        """Each segment with its token ids: what `render` joins."""
        segments = self.segments(conversation)
        header = next(segments)
        yield header, tokenizer.encode(header.text)
        for segment in segments:
            yield segment, tokenizer.encode_continuation(segment.text)

    def annotation_prompt(self, conversation: Conversation, turn: int) -> str:
        """Text after which a value model writes the label of `turn`: all that T2V training puts before it."""
        asked = replace(conversation, turns=conversation.turns[: turn + 1], type=TEXT_TO_VALUE)
        before = [s.text for s in self.segments(asked) if s.turn < turn or (s.turn == turn and s.part in _BEFORE_LABEL)]
        return "".join(before) + self.label_start

    def steering_prompt(self, conversation: Conversation, role: str, line: str) -> str:
        """Text after which a SteerLM model writes a response of `role` at `line` (V2T training order)."""
        asked = replace(conversation, turns=(*conversation.turns, Turn(role, "")), type=VALUE_TO_TEXT)
        last = len(conversation.turns)
        before = "".join(s.text for s in self.segments(asked) if s.turn < last)
        return before + self.turn_start + role + self.end_of_name + self.label_start + line + self.end_of_name

    def plain_prompt(self, conversation: Conversation, role: str) -> str:
        """Text after which a model trained on conversations without attributes writes a response of `role`."""
        asked = replace(conversation, turns=(*conversation.turns, Turn(role, "")), type=None)
        last = len(conversation.turns)
        before = "".join(s.text for s in self.segments(asked) if s.turn < last)
        return before + self.turn_start + role + self.end_of_name

    def response_text(self, completion: str) -> str:
        """A completion without its end marker and the end of turn before it, as training closes a turn."""
        for marker in (self.turn_start, self.label_start):
            if completion.endswith(marker):
                completion = completion.removesuffix(marker)
                break
        return completion.removesuffix(self.end_of_turn)

    def split(self, prompt: str) -> list[str]:
        """A prompt that arrives as text, cut where `segments` cuts: header, marker, name or label line, text.

        Cutting at the markers alone would not do: a tokenizer may merge the line end of a name with a line end that
        begins the text, or drop the blanks around it.
        """
        pattern = "(" + "|".join(re.escape(marker) for marker in (self.turn_start, self.label_start)) + ")"
        header, *rest = re.split(pattern, prompt)
        pieces = [header]
        for marker, content in zip(rest[::2], rest[1::2], strict=True):
            line, end_of_line, text = content.partition(self.end_of_name)
            pieces += [marker, line + end_of_line, text]
        return [piece for piece in pieces if piece]

    def encode_prompt(self, prompt: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids of a prompt that arrives as text: those that `render` gives the same text in training."""
        token_ids: list[int] = []
        for index, piece in enumerate(self.split(prompt)):
            token_ids += tokenizer.encode_continuation(piece) if index else tokenizer.encode(piece)
        return token_ids

    @classmethod
    def from_config(cls, tokens: Mapping[str, str], warn: Any = print) -> ChatTemplate:
        r"""Read `model.data.chat_prompt_tokens`, decoding `\xHH` that a shell passed on as four characters.

        An unquoted `\x11` loses its backslash in the shell and arrives as `x11`; that can only be meant as the
        control byte, so it is taken as such with a warning (D-01).

        Raises:
            ConfigError: a key is not one of the five.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(tokens) - known):
            raise ConfigError(f"chat_prompt_tokens has no {unknown[0]!r}; it takes {', '.join(sorted(known))}")
        decoded = {}
        for key, raw in tokens.items():
            text = re.sub(r"\\x([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), str(raw)).replace("\\n", "\n")
            if re.fullmatch(r"x[01][0-9A-Fa-f]", text):
                warn(
                    f"chat_prompt_tokens.{key} is the three letters {text!r}: a shell ate the backslash. "
                    rf"Taken as the control byte \{text}. Quote it: 'model.data.chat_prompt_tokens.{key}=\\{text}'."
                )
                text = chr(int(text[1:], 16))
            decoded[key] = text
        return cls(**decoded)


_TARGET, _NO_TARGET = (1,), (0,)
_BEFORE_LABEL = ("turn_start", "name", "text")

# What NeMo's own data_clean, annotator and tutorial client assume of every model.
EXTRA_ID_TEMPLATE = ChatTemplate("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
