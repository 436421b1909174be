"""Grading every turn of a chat file with a value model (SteerLM, arXiv:2310.05344, step 2).

Turns are graded in order and a later turn sees the grades given to the earlier ones, as in the reference. Many
conversations are in work at a time; the output keeps the order of the input and gets its name when it is complete.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from steerlm_nemo.annotation.journal import Journal
from steerlm_nemo.annotation.lines import LineReader
from steerlm_nemo.attributes import LANG, NEMO12_LANG, Attributes
from steerlm_nemo.conversation import RECORD_TYPES, TEXT_TO_VALUE, VALUE_TO_TEXT, Conversation, Turn
from steerlm_nemo.errors import IncompleteError, InputError, RecordError, ServerError
from steerlm_nemo.records import Accounting, RawLine, atomic_output, dump_record, read_lines, require_file
from steerlm_nemo.serving.client import RequestRefusedError, ServerClient
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, SteerLMFormat

KEEP = "keep"


@dataclass(frozen=True)
class AnnotationSettings:
    """What is written. Two runs with equal settings and equal servers write the same bytes.

    turns: "assistant" grades the turns of every speaker that is not a mask role; "all" grades user turns, too.
    mode: "line" asks once per turn for the whole line; "slots" once per value.
    output_type: "keep" leaves `type` as it is. "VALUE_TO_TEXT" makes the output ready for training the SteerLM
        model; turns that were not graded then get a null label, as preprocessing writes them.
    process_lang: write `lang` where the model's schema has it.
    """

    turns: str = "assistant"
    mode: str = "line"
    output_type: str = KEEP
    process_lang: bool = True

    def __post_init__(self) -> None:
        for name, legal in (
            ("turns", ("assistant", "all")),
            ("mode", ("line", "slots")),
            ("output_type", (KEEP, *RECORD_TYPES)),
        ):
            if getattr(self, name) not in legal:
                raise InputError(f"--{name} is {getattr(self, name)!r}; it must be one of {', '.join(legal)}")


@dataclass
class Agreement:
    """Model against human grades of one attribute, over the turns that have both."""

    num_turns: int = 0
    num_equal: int = 0
    absolute_error: int = 0  # summed; stays 0 for `lang`, which has no distance

    @property
    def exact(self) -> float:
        return self.num_equal / self.num_turns

    @property
    def mae(self) -> float:
        return self.absolute_error / self.num_turns


@dataclass
class Summary:
    """What a finished run did. `counts`: turns found `by_line` and `by_slots`; `slots` asked; values `chosen`."""

    num_records: int = 0
    num_resumed: int = 0
    num_rejected: int = 0
    rejects_path: Path | None = None
    counts: Counter[str] = field(default_factory=Counter)
    agreement: dict[str, Agreement] = field(default_factory=dict)

    def text(self) -> str:
        c = self.counts
        lines = []
        if self.num_rejected:
            total = self.num_records + self.num_rejected
            lines.append(
                f"WARNING: {total} read = {self.num_records} written + {self.num_rejected} rejected; "
                f"the rejected ones are in {self.rejects_path}"
            )
        lines += [
            f"{self.num_records} records annotated ({self.num_resumed} of them by an earlier run); "
            f"{c['by_line'] + c['by_slots']} turns: {c['by_line']} by whole line, {c['by_slots']} with "
            f"{c['slots']} values asked one by one; {c['chosen']} values are the likeliest legal one because the "
            "model's first choice was not legal"
        ]
        if self.agreement:
            lines.append("compared with the labels that were there before:")
            lines.append(f"  {'attribute':<20}{'turns':>8}{'exact':>8}{'MAE':>8}")
            for key, found in self.agreement.items():
                mae = "" if key == LANG else f"{found.mae:8.3f}"
                lines.append(f"  {key:<20}{found.num_turns:>8}{found.exact:>8.3f}{mae}")
        return "\n".join(lines)


def annotate(
    input_file: str | Path,
    output_file: str | Path,
    client: ServerClient,
    settings: AnnotationSettings,
    *,
    batch_size: int = 1,
    concurrency: int = 8,
    allow_rejected: bool = False,
    compat: bool = False,
) -> Summary:
    """Annotate a whole file.

    `batch_size` conversations go into one request and `concurrency` requests are under way at a time.
    `allow_rejected` completes the output without the records that cannot be annotated (they stay in the reject
    file). `compat` grades with NeMo's markers and attributes where the server does not tell its own.

    Raises:
        InputError: the input cannot be read, or the server's model is no value model.
        IncompleteError: a record was rejected, or the server went away. The output is not written; what is done is
            kept in OUTPUT.progress.jsonl, and the same command goes on from there.
    """
    source, output = require_file(input_file), Path(output_file)
    if output.is_dir():
        raise InputError(f"{output} is a directory; give the name of a file to write")
    for name, value in (("batch_size", batch_size), ("concurrency", concurrency)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"--{name} must be a whole number of at least 1, found {value!r}")
    served = client.format()
    if served is None and compat:
        served = SteerLMFormat(EXTRA_ID_TEMPLATE, NEMO12_LANG, TEXT_TO_VALUE)
    else:
        served = client.require_format(TEXT_TO_VALUE)
    fingerprint = {**vars(settings), "model_format": served.to_dict()["digest"]}
    with Journal(Path(f"{output}.progress.jsonl"), fingerprint) as journal, Accounting.beside(output) as accounting:
        num_resumed = len(journal)
        annotator = _Annotator(client, served, settings, journal, accounting)
        total = sum(1 for _ in read_lines(source))
        with tqdm(total=total, unit="record", desc="annotate") as progress:
            stopped = annotator.run(source, batch_size, concurrency, progress)
        num_rejected = accounting.counts["rejected"]
        if stopped is not None:
            raise IncompleteError(
                f"stopped with {len(journal)} of {total} records annotated: {stopped}\n"
                f"Nothing is lost: they are in {journal.path}. Run the same command again to go on."
            )
        if annotator.num_server_faults:
            raise IncompleteError(
                f"{annotator.num_server_faults} of {total} records have no grades because the server failed on them; "
                f"{accounting.rejects_path} has each with its reason. {output} is not written. Run the same command "
                f"again when the server is well (the other {len(journal)} are kept)."
            )
        if num_rejected and not allow_rejected:
            raise IncompleteError(
                f"{num_rejected} of {total} records could not be annotated; {accounting.rejects_path} has each with "
                f"its reason. {output} is not written. Correct them and run the same command again "
                f"(the other {len(journal)} are kept), or add --allow_rejected to go without them."
            )
        summary = _write(source, output, journal, settings)
        summary.num_resumed = num_resumed
        summary.num_rejected, summary.rejects_path = num_rejected, accounting.rejects_path
        journal.delete()
    return summary


@dataclass(frozen=True)
class _Result:
    """What became of one record: its grades per turn, or the reason it has none, or why the run must stop."""

    line: RawLine
    grades: dict[int, Attributes]
    counts: Counter[str]
    problem: str | None = None
    server_fault: bool = False  # `problem` is the server's, not the record's
    fatal: ServerError | None = None


class _Annotator:
    """Feeds conversations to worker threads and books what comes back. Only `run`'s thread touches files."""

    def __init__(
        self,
        client: ServerClient,
        served: SteerLMFormat,
        settings: AnnotationSettings,
        journal: Journal,
        accounting: Accounting,
    ) -> None:
        self._client = client
        self._template = served.template
        self._reader = LineReader(client, served, settings.mode)
        self._settings = settings
        self._journal = journal
        self._accounting = accounting
        self.num_server_faults = 0

    def run(self, source: Path, batch_size: int, concurrency: int, progress: Any) -> ServerError | None:
        """Annotate what the journal does not have yet. Returns the error that stopped the run early, if any."""
        tasks: queue.Queue[list[tuple[RawLine, Conversation]] | None] = queue.Queue()
        results: queue.Queue[_Result | BaseException] = queue.Queue()

        def work() -> None:
            while (group := tasks.get()) is not None:
                try:
                    for result in self._group(group):
                        results.put(result)
                except BaseException as err:  # a defect of ours must end the run, not hang it
                    results.put(err)

        # Daemons: after Ctrl-C nobody waits for an answer that may take minutes.
        workers = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
        for worker in workers:
            worker.start()
        stopped: ServerError | None = None
        in_flight = 0
        for group in self._groups(source, batch_size, progress):
            tasks.put(group)
            in_flight += len(group)
            # Two groups per worker: one in work, one ready. Memory does not grow with the file.
            while stopped is None and in_flight > 2 * concurrency * batch_size:
                stopped = self._book(results.get(), progress)
                in_flight -= 1
            if stopped is not None:
                break
        if stopped is not None:
            with suppress(queue.Empty):  # what has not begun is not begun any more
                while True:
                    in_flight -= len(tasks.get_nowait() or ())
        for _ in range(in_flight):
            stopped = self._book(results.get(), progress) or stopped
        for _ in workers:
            tasks.put(None)
        return stopped

    def _book(self, result: _Result | BaseException, progress: Any) -> ServerError | None:
        if isinstance(result, BaseException):
            raise result
        if result.fatal is not None:
            return result.fatal
        if result.problem is not None:
            self._accounting.rejected(result.line.ref, result.problem, result.line.raw)
            self.num_server_faults += result.server_fault
        else:
            assert result.line.record is not None
            self._journal.add(result.line, labelled(result.line.record, result.grades, self._settings), result.counts)
        progress.update()
        return None

    def _groups(self, source: Path, batch_size: int, progress: Any) -> Iterator[list[tuple[RawLine, Conversation]]]:
        group: list[tuple[RawLine, Conversation]] = []
        for line in read_lines(source):
            if self._journal.has(line):
                progress.update()
                continue
            try:
                group.append((line, _conversation(line)))
            except RecordError as err:
                self._accounting.rejected(line.ref, str(err).removeprefix(f"{line.ref}: "), line.raw)
                progress.update()
                continue
            if len(group) == batch_size:
                yield group
                group = []
        if group:
            yield group

    def _group(self, group: Sequence[tuple[RawLine, Conversation]]) -> list[_Result]:
        try:
            graded = self._grade([conversation for _, conversation in group])
        except ServerError as err:
            if len(group) > 1 and (isinstance(err, RequestRefusedError) or self._client.is_ready()):
                # One record the server cannot take must not cost its neighbours their grades.
                return [result for member in group for result in self._group([member])]
            if isinstance(err, RequestRefusedError) or self._client.is_ready():
                fault = not isinstance(err, RequestRefusedError)
                return [_Result(line, {}, Counter(), f"not annotated: {err}", fault) for line, _ in group]
            return [_Result(line, {}, Counter(), fatal=err) for line, _ in group]
        return [_Result(line, *found) for (line, _), found in zip(group, graded, strict=True)]

    def _grade(self, conversations: Sequence[Conversation]) -> list[tuple[dict[int, Attributes], Counter[str]]]:
        """Grades of every wanted turn: first turns of all conversations together, then second turns, ..."""
        turns = [list(conversation.turns) for conversation in conversations]
        wanted = [self._wanted(conversation) for conversation in conversations]
        grades: list[dict[int, Attributes]] = [{} for _ in conversations]
        counts: list[Counter[str]] = [Counter() for _ in conversations]
        for step in range(max(map(len, wanted))):
            rows = [row for row, indices in enumerate(wanted) if step < len(indices)]
            prompts = [
                self._template.annotation_prompt(
                    replace(conversations[row], turns=tuple(turns[row])), wanted[row][step]
                )
                for row in rows
            ]
            for row, (full, found) in zip(rows, self._reader.read(prompts), strict=True):
                index = wanted[row][step]
                line = full if self._settings.process_lang else _without_lang(full)
                turns[row][index] = Turn(turns[row][index].role, turns[row][index].text, line)
                grades[row][index] = line
                counts[row] += found
        return list(zip(grades, counts, strict=True))

    def _wanted(self, conversation: Conversation) -> list[int]:
        every = self._settings.turns == "all"
        return [i for i, turn in enumerate(conversation.turns) if every or turn.role not in conversation.mask_roles]


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


def labelled(record: dict[str, Any], grades: dict[int, Attributes], settings: AnnotationSettings) -> dict[str, Any]:
    """The record with new labels; a label that was there moves to `gt_label`, last in its turn as NeMo writes it.

    A `gt_label` that is there already is kept: it is the ground truth, and the label was a model's.
    """
    turns = []
    for index, raw in enumerate(record["conversations"]):
        turn = dict(raw)
        old = turn.get("label")
        ungrade = index not in grades and settings.output_type == VALUE_TO_TEXT
        if index in grades or (ungrade and old is not None):
            # The key keeps its place if it was there.
            turn["label"] = grades[index].line if index in grades else None
            if old is not None and turn.get("gt_label") is None:
                turn.pop("gt_label", None)
                turn["gt_label"] = old
        turns.append(turn)
    changed = {**record, "conversations": turns}
    if settings.output_type != KEEP:
        changed["type"] = settings.output_type
    return changed


def _without_lang(line: Attributes) -> Attributes:
    return Attributes(tuple(item for item in line.items if item[0] != LANG))


def _write(source: Path, output: Path, journal: Journal, settings: AnnotationSettings) -> Summary:
    """The finished records in input order, under the final name."""
    summary = Summary()
    with atomic_output(output) as file:
        for line in read_lines(source):
            found = journal.get(line)
            if found is not None:
                record, counts = found
                file.write(dump_record(record) + "\n")
                summary.num_records += 1
                summary.counts += counts
                _compare(record, settings, summary.agreement)
    return summary


def _compare(record: dict[str, Any], settings: AnnotationSettings, agreement: dict[str, Agreement]) -> None:
    for turn in record["conversations"]:
        if turn.get("label") is None or turn.get("gt_label") is None:
            continue
        model, human = Attributes.parse(turn["label"]).as_dict(), Attributes.parse(turn["gt_label"]).as_dict()
        for key, value in model.items():
            if key in human:
                found = agreement.setdefault(key, Agreement())
                found.num_turns += 1
                found.num_equal += value == human[key]
                if isinstance(value, int):
                    found.absolute_error += abs(value - int(human[key]))
