"""A record as training sees it, for a terminal and as a page (data/mask_view.py)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from steerlm_nemo.data.mask_view import CUT, GIVEN, TARGET, MaskView, Token, visible
from steerlm_nemo.report.pages import render
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
    helpers = {"visible": visible, "place": _place, "turns": _turns}
    return render("mask", helpers=helpers, title="What training sees", views=views)


def _turns(segments: Sequence[tuple[Segment, Sequence[Token]]]) -> list[list[tuple[Segment, Sequence[Token]]]]:
    return [list(turn) for _, turn in groupby(segments, key=lambda part: part[0].turn)]
