r"""A record as training sees it: exact text, token ids, and which tokens are targets.

Every token is of one of three kinds::

    given     \x00System\nA chat ...     in the context, no loss
    target    [[4,lang:en\n\x11]]        the model is trained to write it
    cut       {{Thanks\n}}               beyond seq_len; training never sees it

The tokens come from `ChatTemplate.encoded_segments`, which `render`, and so training and data_clean, join.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steerlm_nemo.conversation import Conversation, RecordRef
from steerlm_nemo.data.cleaning import Cleaner
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import parse_line, read_raw_lines
from steerlm_nemo.template import ChatTemplate, Segment, num_seen
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

GIVEN, TARGET, CUT = "given", "target", "cut"


@dataclass(frozen=True)
class Token:
    """`text` is the stretch of the segment that the token ends; empty within a character of several tokens."""

    id: int
    piece: str
    text: str
    kind: str  # given | target | cut


@dataclass(frozen=True)
class MaskView:
    """One record; `verdict` is what data_clean says of it."""

    conversation: Conversation
    template: ChatTemplate
    seq_len: int
    segments: tuple[tuple[Segment, tuple[Token, ...]], ...]
    verdict: str

    @property
    def tokens(self) -> list[Token]:
        return [token for _, tokens in self.segments for token in tokens]

    def summary(self) -> str:
        """Counts, markers and verdict, in lines."""
        tokens = self.tokens
        num_targets = sum(token.kind == TARGET for token in tokens)
        num_cut = sum(token.kind == CUT for token in tokens)
        markers = "  ".join(f"{name} {visible(text)}" for name, text in asdict(self.template).items())
        removed = self.template.num_markers_in_content(self.conversation)
        lines = [
            f"{self.conversation.ref}: type {self.conversation.type}, {len(self.conversation.turns)} turns, "
            f"no loss on {', '.join(self.conversation.mask_roles)}",
            f"{len(tokens)} tokens: {len(tokens) - num_targets - num_cut} given, {num_targets} targets, {num_cut} cut "
            f"at seq_len {self.seq_len}",
            f"markers: {markers}",
            f"data_clean: {self.verdict}",
        ]
        if removed:
            lines.append(f"marker texts taken out of the content: {removed}")
        return "\n".join(lines)


def views_of_lines(
    path: str | Path,
    line_numbers: Sequence[int],
    template: ChatTemplate,
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer,
    seq_len: int,
) -> list[MaskView]:
    """How training at `seq_len` sees the records on these lines, in the order asked for.

    Raises:
        InputError: an unusable file, or it has no record on such a line.
        RecordError: the line is no usable record.
    """
    found = {}
    last = 0
    for ref, raw in read_raw_lines(path):
        last = ref.line
        if last in line_numbers:
            found[last] = _view(ref, raw, template, tokenizer, seq_len)
            if len(found) == len({*line_numbers}):
                break
    for number in line_numbers:
        if number not in found:
            raise InputError(f"{path}:{number}: no record on this line; the last is on line {last}")
    return [found[number] for number in line_numbers]


def _view(
    ref: RecordRef,
    raw: bytes,
    template: ChatTemplate,
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer,
    seq_len: int,
) -> MaskView:
    conversation = Conversation.from_record(parse_line(ref, raw).require_record(), ref)
    outcome = Cleaner(template, tokenizer, seq_len).outcome((ref, raw))
    segments = []
    position = 0
    for segment, ids in template.encoded_segments(conversation, tokenizer):
        ends = [*tokenizer.ends(segment.text, is_start=position == 0)[: len(ids) - 1], len(segment.text)]
        start, tokens = 0, []
        for token_id, end in zip(ids, ends, strict=True) if ids else ():
            kind = CUT if position >= num_seen(seq_len) else TARGET if segment.in_loss else GIVEN
            tokens.append(Token(token_id, tokenizer.id_to_piece(token_id), segment.text[start:end], kind))
            start = end
            position += 1
        segments.append((segment, tuple(tokens)))
    verdict = "kept" if outcome.reason is None else f"left out, {outcome.reason}"
    return MaskView(conversation, template, seq_len, tuple(segments), verdict)


def visible(text: str, line_end: str = "\\n") -> str:
    r"""The text with everything that does not show as itself spelled out: `\n`, `\t`, `\x12`, `\u200d`, `\\`."""
    return "".join(
        line_end if char == "\n" else char if char.isprintable() and char != "\\" else _escaped(char) for char in text
    )


def _escaped(char: str) -> str:
    # As in JSON or Python, whichever is shorter: \t, \x12, \u200d.
    number = ord(char)
    if char in "\\\t\r":
        return json.dumps(char)[1:-1]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
