"""Grading every turn of a chat file with a value model (SteerLM, arXiv:2310.05344, step 2).

Turns are graded in order and a later turn sees the attributes given to the earlier ones, as in the reference.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm_nemo.annotation.grader import Grader
from steerlm_nemo.annotation.thread import (
    UNKNOWN,
    AnnotatedThread,
    AnnotationSettings,
    annotated,
    wanted_turns,
    without_lang,
)
from steerlm_nemo.attributes import LANG, NEMO12_LANG
from steerlm_nemo.client.job import Done, Words, require_sound, working_through
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.conversation import Conversation
from steerlm_nemo.errors import InputError
from steerlm_nemo.evaluation.grading import Comparison
from steerlm_nemo.model_kind import GRADE, GRADER, SteerLMFormat
from steerlm_nemo.outputs import remove_earlier
from steerlm_nemo.records import RawLine, atomic_output, read_records
from steerlm_nemo.report.comparison import comparison_page
from steerlm_nemo.template import EXTRA_ID_TEMPLATE

TURNS = "turns"
WORDS = Words("annotate", "annotated", "no attributes", TURNS, "--output_file_name")


@dataclass
class Summary(Done):
    """What a finished run did.

    counts: turns found `by_line` and `by_slots`; `slots` asked; values `chosen` for the model, `given` by people,
        and given but `UNKNOWN` to the model.
    comparison: with the human attributes of graded turns; empty where these were kept.
    """

    comparison: Comparison = field(kw_only=True)

    def text(self) -> str:
        c = self.counts
        given = f"; {c['given']} human values kept" if c["given"] else ""
        if unknown := {key.removeprefix(UNKNOWN): count for key, count in c.items() if key.startswith(UNKNOWN)}:
            which = ", ".join(f"{key} {count}" for key, count in sorted(unknown.items()))
            given += (
                f"; {sum(unknown.values())} human values are of attributes the model does not know: in gt_label only "
                f"({which})"
            )
        lines = [
            f"{super().text()}; {c['by_line'] + c['by_slots']} turns: {c['by_line']} by whole line, "
            f"{c['by_slots']} with {c['slots']} values asked one by one; {c['chosen']} values are the likeliest legal "
            f"one because the model's first choice was not legal{given}"
        ]
        if table := self.comparison.text():
            lines += ["compared with the attributes that were there before:", table]
        return "\n".join(lines)


def annotate(
    input_file: str | Path,
    output_file: str | Path,
    servers: ServerPool,
    settings: AnnotationSettings,
    *,
    batch_size: int = 1,
    allow_rejected: bool = False,
) -> Summary:
    """Annotate a whole file, `batch_size` conversations per request.

    `allow_rejected` completes the output without the records that cannot be annotated (they stay in the reject
    file). Where human attributes can be compared, OUTPUT.comparison.json and .html are written.

    Raises:
        InputError: the input cannot be read, the servers' model is no value model, or not the one that began.
        IncompleteError: as `working_through`.
    """
    source, output = require_sound(input_file, output_file, servers, batch_size)
    served = servers.format()
    if served is None and settings.compat:
        served = SteerLMFormat(EXTRA_ID_TEMPLATE, NEMO12_LANG, GRADER)
    else:
        served = servers.require_format(GRADE)
    summary = Summary(WORDS, comparison=Comparison(served.schema))
    with working_through(
        source,
        output,
        servers,
        served,
        _Annotation(servers, served, settings),
        vars(settings),
        summary,
        batch_size=batch_size,
        allow_rejected=allow_rejected,
    ):
        if not settings.only_missing:
            for ref, record in read_records(output):
                _compare(Conversation.from_record(record, ref), settings, summary.comparison)
        _write_comparison(output, summary.comparison)
    return summary


class _Annotation:
    """The job: every wanted turn of a conversation gets its attributes."""

    words = WORDS

    def __init__(self, servers: ServerPool, served: SteerLMFormat, settings: AnnotationSettings) -> None:
        self._servers = servers
        self._served = served
        self._grader = Grader(servers, served, settings.mode, beliefs=settings.soft)
        self._settings = settings

    def begin(self, line: RawLine) -> AnnotatedThread:
        return AnnotatedThread(line, self._served, self._settings)

    def order(self, item: AnnotatedThread) -> list[str]:
        """Threads of a tree begin alike."""
        return item.texts

    def finish(self, item: AnnotatedThread) -> tuple[Mapping[str, Any], Mapping[str, int]]:
        done = annotated(item.conversation, item.attributes, self._settings, item.beliefs)
        return done.to_record(), {**item.counts, TURNS: len(item.attributes)}

    def ask(self, items: Sequence[AnnotatedThread]) -> None:
        """Grade every wanted turn: first turns of all conversations together, then second turns, ..."""
        home = zlib.crc32(items[0].texts[1].encode())  # threads of one tree begin alike
        for step in range(max(len(item.to_ask) for item in items)):
            rows = [(item, item.to_ask[step]) for item in items if step < len(item.to_ask)]
            # Threads of a tree have turns in common: what is asked about them is asked once.
            questions = [(item.prompt(index), tuple(item.given[index].items())) for item, index in rows]
            unique = list(dict.fromkeys(questions))
            graded = self._grader.grade([prompt for prompt, _ in unique], [dict(given) for _, given in unique], home)
            found = dict(zip(unique, graded, strict=True))
            for (item, index), question in zip(rows, questions, strict=True):
                graded_line = found[question]
                beliefs = graded_line.beliefs
                if self._settings.soft and beliefs is None:
                    raise InputError(
                        f"--soft: {self._servers.where} does not tell how sure its model is. Serve it with "
                        "scripts/megatron_gpt_eval.py of this project, or run without --soft."
                    )
                with_lang = self._settings.process_lang
                item.attributes[index] = graded_line.attributes if with_lang else without_lang(graded_line.attributes)
                if self._settings.soft:
                    item.beliefs[index] = {
                        key: belief for key, belief in (beliefs or {}).items() if with_lang or key != LANG
                    }
                item.counts += graded_line.counts


def _compare(conversation: Conversation, settings: AnnotationSettings, comparison: Comparison) -> None:
    for index in wanted_turns(conversation, settings):
        turn = conversation.turns[index]
        if turn.attributes is not None and turn.truth is not None:
            comparison.add(turn.truth, turn.attributes)


def _write_comparison(output: Path, comparison: Comparison) -> None:
    """OUTPUT.comparison.json and .html, where there is something to compare; those of an earlier run do not stay."""
    for kind in ("json", "html"):
        remove_earlier(f"{output}.comparison.{kind}")
    if comparison.text():
        with atomic_output(f"{output}.comparison.json") as file:
            json.dump(comparison.to_dict(), file, indent=1)
        with atomic_output(f"{output}.comparison.html") as file:
            file.write(comparison_page(comparison, f"{output.name}: the model's attributes against people's"))
