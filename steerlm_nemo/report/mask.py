"""A record as training sees it, for a terminal and as a page (data/mask_view.py)."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

from steerlm_nemo.data.mask_view import CUT, GIVEN, TARGET, MaskView, visible
from steerlm_nemo.report.charts import page
from steerlm_nemo.template import Segment

_BRACKETS = {GIVEN: ("", ""), TARGET: ("[[", "]]"), CUT: ("{{", "}}")}
_ANSI = {GIVEN: ("", ""), TARGET: ("\x1b[1;32m", "\x1b[0m"), CUT: ("\x1b[2;9m", "\x1b[0m")}


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
