r"""A record as training sees it: exact text, token ids, and which tokens are targets.

Every token is of one of three kinds::

    given     \x00System\nA chat ...     in the context, no loss
    target    [[4,lang:en\n\x11]]        the model is trained to write it
    cut       {{Thanks\n}}               beyond seq_len; training never sees it

The tokens come from `ChatTemplate.encoded_segments`, which `render`, and so training and data_clean, join.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from steerlm_nemo.conversation import Conversation, RecordRef
from steerlm_nemo.data.cleaning import Cleaner
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.evaluation.charts import page
from steerlm_nemo.records import parse_line, read_raw_lines
from steerlm_nemo.template import ChatTemplate, Segment
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

GIVEN, TARGET, CUT = "given", "target", "cut"
_BRACKETS = {GIVEN: ("", ""), TARGET: ("[[", "]]"), CUT: ("{{", "}}")}
_ANSI = {GIVEN: ("", ""), TARGET: ("\x1b[1;32m", "\x1b[0m"), CUT: ("\x1b[2;9m", "\x1b[0m")}


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
    line = parse_line(ref, raw)
    if line.record is None:
        raise RecordError(f"{ref}: {line.problem}")
    conversation = Conversation.from_record(line.record, ref)
    conversation.require_unicode()
    outcome = Cleaner(template, tokenizer, seq_len).outcome((ref, raw))
    segments = []
    position = 0
    for segment, ids in template.encoded_segments(conversation, tokenizer):
        ends = [*tokenizer.ends(segment.text, is_start=position == 0)[: len(ids) - 1], len(segment.text)]
        start, tokens = 0, []
        for token_id, end in zip(ids, ends, strict=True) if ids else ():
            # seq_len tokens go in, and the one after them is the last target (NeMo's collate shifts by one).
            kind = CUT if position > seq_len else TARGET if segment.in_loss else GIVEN
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


def terminal_text(view: MaskView, colour: bool) -> str:
    """The whole view; without colour, targets stand in `[[ ]]` and what is cut in `{{ }}`."""
    marks = _ANSI if colour else _BRACKETS
    text = "".join(
        _marked(marks[kind], visible("".join(token.text for token in run), "\\n\n"))
        for kind, run in groupby(view.tokens, key=lambda token: token.kind)
    )
    legend = " ".join(_marked(marks[kind], kind) for kind in (TARGET, CUT))
    lines = [view.summary(), "", f"text ({legend})", text.rstrip("\n"), "", f"tokens ({legend})"]
    for segment, tokens in view.segments:
        runs = (
            _marked(marks[kind], "  ".join(f"{token.id} {visible(token.piece)}" for token in run))
            for kind, run in groupby(tokens, key=lambda token: token.kind)
        )
        lines.append(f"{_place(segment):18s} " + "  ".join(runs))
    return "\n".join(lines) + "\n"


def _marked(marks: tuple[str, str], text: str) -> str:
    # A mark does not cross a line end: pagers and greps see lines.
    before, after = marks
    return "\n".join(before + line + after if line else "" for line in text.split("\n"))


def _place(segment: Segment) -> str:
    return segment.part if segment.turn < 0 else f"turn {segment.turn} {segment.part}"


def html_page(views: list[MaskView]) -> str:
    """All views on one page; a token's id and piece show when the mouse is on it."""
    parts = [f"<h1>What training sees</h1>{_STYLE}<p>{_legend()}</p>"]
    for view in views:
        parts.append(f"<h2>{escape(str(view.conversation.ref))}</h2><p class=facts>")
        parts.append("<br>".join(escape(line) for line in view.summary().split("\n")))
        parts.append("</p><div class=text>" + "".join(_html_tokens(view)) + "</div>")
        rows = "".join(
            f"<tr><th>{_place(segment)}<td>"
            + " ".join(
                f"<span class={token.kind}>{token.id} <i>{escape(visible(token.piece))}</i></span>" for token in tokens
            )
            for segment, tokens in view.segments
        )
        parts.append(f"<details><summary>token ids</summary><table class=ids>{rows}</table></details>")
    return page("What training sees", parts)


def _legend() -> str:
    return (
        "<span class=given>given</span>: in the context, no loss. <span class=target>target</span>: the model is "
        "trained to write it. <span class=cut>cut</span>: beyond seq_len, never seen."
    )


def _html_tokens(view: MaskView) -> Iterator[str]:
    last_turn = None
    for segment, tokens in view.segments:
        if segment.turn != last_turn:
            yield "</div><div class=turn>" if last_turn is not None else "<div class=turn>"
            last_turn = segment.turn
        for token in tokens:
            shown = "".join(
                f"<b>{escape(visible(char))}</b>" + "\n" * (char == "\n") if visible(char) != char else escape(char)
                for char in token.text
            )
            yield f'<span class={token.kind} title="{token.id} {escape(visible(token.piece))}">{shown}</span>'
    yield "</div>"


_STYLE = """<style>
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.7 ui-monospace,monospace;border:1px solid #cfd6e0}
.turn{padding:.3em .8em;border-bottom:1px solid #e3e8ef}.turn:last-child{border:0}
.text b{color:#8a94a3;font-weight:normal}.facts{color:#5a6577;font-size:90%}
.target{background:#c9efd0}.text .target{border-right:1px solid #a5d9af}.text .given{border-right:1px solid #edf0f4}
.cut{color:#a8b0bb;text-decoration:line-through;background:#f3f4f6}
.ids{font:12px/1.6 ui-monospace,monospace}.ids i{font-style:normal;color:#5a6577}.ids span{display:inline-block;
padding:0 .4em;margin:1px;border-radius:3px;border:1px solid #e3e8ef}.ids th{white-space:nowrap}
summary{cursor:pointer;margin:.5em 0}
</style>"""
