"""Grading every turn of a chat file with a value model (SteerLM, arXiv:2310.05344, step 2).

Turns are graded in order and a later turn sees the attributes given to the earlier ones, as in the reference. Many
conversations are in work at a time; those that begin alike run near each other, so that a server computes what they
share once. The output keeps the order of the input and gets its name when it is complete.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from steerlm_nemo.annotation.grader import Grader
from steerlm_nemo.annotation.thread import (
    UNKNOWN,
    AnnotatedThread,
    AnnotationSettings,
    annotated,
    wanted_turns,
    without_lang,
)
from steerlm_nemo.attributes import LANG, NEMO12_LANG, AttributeSchema
from steerlm_nemo.client.journal import Journal
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.client.server import RequestRefusedError, UnreachableError, named
from steerlm_nemo.conversation import Conversation
from steerlm_nemo.errors import IncompleteError, InputError, RecordError, ServerError
from steerlm_nemo.evaluation.grading import Comparison
from steerlm_nemo.model_kind import GRADE, GRADER, SteerLMFormat
from steerlm_nemo.outputs import remove_earlier, require_writable
from steerlm_nemo.records import (
    Accounting,
    atomic_output,
    dump_record,
    read_lines,
    require_file,
    require_other_file,
)
from steerlm_nemo.report.comparison import comparison_page
from steerlm_nemo.template import EXTRA_ID_TEMPLATE

WINDOW = 4096  # records that are put in order together: enough to bring trees together, few enough for memory


@dataclass
class Summary:
    """What a finished run did.

    counts: turns found `by_line` and `by_slots`; `slots` asked; values `chosen` for the model, `given` by people, and
        given but `UNKNOWN` to the model.
    comparison: with the human attributes of graded turns; empty where these were kept.
    """

    comparison: Comparison
    model: str | None = None  # its identity; None where its server does not tell
    num_records: int = 0
    num_resumed: int = 0
    num_rejected: int = 0
    seconds: float = 0.0
    rejects_path: Path | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        c = self.counts
        lines = []
        if self.num_rejected:
            total = self.num_records + self.num_rejected
            lines.append(
                f"WARNING: {total} read = {self.num_records} written + {self.num_rejected} rejected; "
                f"the rejected ones are in {self.rejects_path}"
            )
        given = f"; {c['given']} human values kept" if c["given"] else ""
        if unknown := {key.removeprefix(UNKNOWN): count for key, count in c.items() if key.startswith(UNKNOWN)}:
            which = ", ".join(f"{key} {count}" for key, count in sorted(unknown.items()))
            given += (
                f"; {sum(unknown.values())} human values are of attributes the model does not know: in gt_label only "
                f"({which})"
            )
        lines += [
            f"{self.num_records} records annotated ({self.num_resumed} of them by an earlier run) in "
            f"{self.seconds:.1f} s, graded by {named(self.model)}; {c['by_line'] + c['by_slots']} turns: "
            f"{c['by_line']} by whole line, {c['by_slots']} with {c['slots']} values asked one by one; {c['chosen']} "
            f"values are the likeliest legal one because the model's first choice was not legal{given}"
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
    """Annotate a whole file.

    `batch_size` conversations go into one request; `servers` says how many requests are under way at a time.
    `allow_rejected` completes the output without the records that cannot be annotated (they stay in the reject
    file). Where human attributes can be compared, OUTPUT.comparison.json and .html are written.

    Raises:
        InputError: the input cannot be read, the servers' model is no value model, or not the one that began.
        IncompleteError: a record was rejected, or all servers went away. The output is not written; what is done is
            kept in OUTPUT.progress.jsonl, and the same command goes on from there.
    """
    source, output = require_file(input_file), Path(output_file)
    require_writable(output)
    require_other_file(output, source)
    for name, value in (("batch_size", batch_size), ("concurrency", servers.in_flight)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"--{name} must be a whole number of at least 1, found {value!r}")
    served = servers.format()
    if served is None and settings.compat:
        served = SteerLMFormat(EXTRA_ID_TEMPLATE, NEMO12_LANG, GRADER)
    else:
        served = servers.require_format(GRADE)
    if servers.identity is None:
        print(
            f"WARNING: {servers.where} does not tell which model it serves; going on with another goes unnoticed.",
            file=sys.stderr,
        )
    fingerprint = {
        **vars(settings),
        "model": servers.identity,
        "schema": served.schema.name,
        "model_format": served.to_dict()["digest"],
    }
    start = time.monotonic()
    with Journal(Path(f"{output}.progress.jsonl"), fingerprint) as journal, Accounting.beside(output) as accounting:
        annotator = _Annotator(servers, served, settings, journal, accounting)
        total = num_resumed = 0
        for line in read_lines(source):
            total += 1
            num_resumed += journal.has(line)
        if not total:
            raise InputError(f"{source}: holds no record")
        if len(journal) and not num_resumed:
            raise InputError(
                f"{journal.path} holds {len(journal)} records of another input, and none of {source}. Give another "
                "--output_file_name, or delete that file to begin anew."
            )
        with tqdm(total=total, initial=num_resumed, unit="thread", desc="annotate") as progress:
            stopped = annotator.run(source, batch_size, progress)
        num_rejected = accounting.counts["rejected"]
        if stopped is not None:
            raise IncompleteError(
                f"stopped with {len(journal)} of {total} records annotated: {stopped}\n"
                f"Nothing is lost: they are in {journal.path}. Run the same command again to go on."
            )
        if annotator.num_server_faults:
            raise IncompleteError(
                f"{annotator.num_server_faults} of {total} records have no attributes because the server failed on "
                f"them ({accounting.reasons_text()}); "
                f"{accounting.rejects_path} has each with its reason. {output} is not written. Run the same command "
                f"again when the server is well (the other {len(journal)} are kept)."
            )
        if num_rejected and not (allow_rejected and len(journal)):
            raise IncompleteError(
                f"{num_rejected} of {total} records could not be annotated ({accounting.reasons_text()}); "
                f"{accounting.rejects_path} has each with its reason. {output} is not written. "
                + (
                    f"Correct them and run the same command again (the other {len(journal)} are kept), or add "
                    "--allow_rejected to go without them."
                    if len(journal)
                    else "None could be: is this the right file?"
                )
            )
        summary = _write(source, output, journal, settings, served.schema)
        summary.num_resumed, summary.seconds, summary.model = num_resumed, time.monotonic() - start, servers.identity
        _write_comparison(output, summary.comparison)
        journal.delete()
    summary.num_rejected, summary.rejects_path = num_rejected, accounting.rejects_path
    return summary


@dataclass(frozen=True)
class _Result:
    """What became of one record: it is graded, or the reason why it is not, or why the run must stop."""

    thread: AnnotatedThread
    problem: str | None = None
    server_fault: bool = False  # `problem` is the server's, not the record's
    fatal: ServerError | None = None


class _Annotator:
    """Feeds conversations to worker threads and books what comes back. Only `run`'s thread touches files."""

    def __init__(
        self,
        servers: ServerPool,
        served: SteerLMFormat,
        settings: AnnotationSettings,
        journal: Journal,
        accounting: Accounting,
    ) -> None:
        self._servers = servers
        self._served = served
        self._grader = Grader(servers, served, settings.mode, beliefs=settings.soft)
        self._settings = settings
        self._journal = journal
        self._accounting = accounting
        self._num_turns = 0
        self._start = time.monotonic()
        self.num_server_faults = 0

    def run(self, source: Path, batch_size: int, progress: Any) -> ServerError | None:
        """Annotate what the journal does not have yet. Returns the error that stopped the run early, if any."""
        tasks: queue.Queue[list[AnnotatedThread] | None] = queue.Queue()
        results: queue.Queue[_Result | BaseException] = queue.Queue()
        num_workers = self._servers.in_flight * len(self._servers.addresses)

        def work() -> None:
            while (group := tasks.get()) is not None:
                try:
                    for result in self._group(group):
                        results.put(result)
                except BaseException as err:  # a defect of ours must end the run, not hang it
                    results.put(err)

        # Daemons: after Ctrl-C nobody waits for an answer that may take minutes.
        workers = [threading.Thread(target=work, daemon=True) for _ in range(num_workers)]
        for worker in workers:
            worker.start()
        stopped: ServerError | None = None
        in_flight = 0
        for group in self._groups(source, batch_size, progress):
            tasks.put(group)
            in_flight += len(group)
            # Two groups per worker: one in work, one ready. Memory does not grow with the file.
            while stopped is None and in_flight > 2 * num_workers * batch_size:
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
        thread = result.thread
        if result.problem is not None:
            self._accounting.rejected(thread.line.ref, result.problem, thread.line.raw)
            self.num_server_faults += result.server_fault
        else:
            done = annotated(thread.conversation, thread.attributes, self._settings, thread.beliefs)
            self._journal.add(thread.line, done.to_record(), thread.counts)
        self._num_turns += len(thread.attributes)
        elapsed_s = max(time.monotonic() - self._start, 0.001)
        progress.set_postfix_str(f"{self._num_turns / elapsed_s:.1f} turns/s", refresh=False)
        progress.update()
        return None

    def _groups(self, source: Path, batch_size: int, progress: Any) -> Iterator[list[AnnotatedThread]]:
        """What is left to do, `batch_size` at a time, window by window ordered by text: threads of a tree begin alike,
        and run near each other."""
        lines = (line for line in read_lines(source) if not self._journal.has(line))
        group: list[AnnotatedThread] = []
        while window := list(islice(lines, WINDOW)):
            threads = []
            for line in window:
                try:
                    threads.append(AnnotatedThread(line, self._served, self._settings))
                except RecordError as err:
                    self._accounting.rejected(line.ref, err.reason, line.raw)
                    progress.update()
            for thread in sorted(threads, key=lambda thread: thread.texts):
                group.append(thread)
                if len(group) == batch_size:
                    yield group
                    group = []
        if group:
            yield group

    def _group(self, group: Sequence[AnnotatedThread]) -> list[_Result]:
        try:
            self._grade(group)
        except ServerError as err:
            refused = isinstance(err, RequestRefusedError)
            if isinstance(err, UnreachableError) or not (refused or self._servers.is_ready()):
                return [_Result(thread, fatal=err) for thread in group]
            if len(group) == 1:
                return [_Result(group[0], f"not annotated: {err}", server_fault=not refused)]
            # One record the server cannot take must not cost its neighbours their attributes.
            return [
                result
                for thread in group
                for result in self._group([AnnotatedThread(thread.line, self._served, self._settings)])
            ]
        return [_Result(thread) for thread in group]

    def _grade(self, threads: Sequence[AnnotatedThread]) -> None:
        """Grade every wanted turn: first turns of all conversations together, then second turns, ..."""
        home = zlib.crc32(threads[0].texts[1].encode())  # threads of one tree begin alike
        for step in range(max(len(thread.to_ask) for thread in threads)):
            rows = [(thread, thread.to_ask[step]) for thread in threads if step < len(thread.to_ask)]
            # Threads of a tree have turns in common: what is asked about them is asked once.
            questions = [(thread.prompt(index), tuple(thread.given[index].items())) for thread, index in rows]
            unique = list(dict.fromkeys(questions))
            graded = self._grader.grade([prompt for prompt, _ in unique], [dict(given) for _, given in unique], home)
            found = dict(zip(unique, graded, strict=True))
            for (thread, index), question in zip(rows, questions, strict=True):
                graded_line = found[question]
                beliefs = graded_line.beliefs
                if self._settings.soft and beliefs is None:
                    raise InputError(
                        f"--soft: {self._servers.where} does not tell how sure its model is. Serve it with "
                        "scripts/megatron_gpt_eval.py of this project, or run without --soft."
                    )
                with_lang = self._settings.process_lang
                thread.attributes[index] = graded_line.attributes if with_lang else without_lang(graded_line.attributes)
                if self._settings.soft:
                    thread.beliefs[index] = {
                        key: belief for key, belief in (beliefs or {}).items() if with_lang or key != LANG
                    }
                thread.counts += graded_line.counts


def _write(
    source: Path, output: Path, journal: Journal, settings: AnnotationSettings, schema: AttributeSchema
) -> Summary:
    """The finished records in input order, under the final name."""
    summary = Summary(Comparison(schema))
    with atomic_output(output) as file:
        for line in read_lines(source):
            found = journal.get(line)
            if found is not None:
                record, counts = found
                file.write(dump_record(record) + "\n")
                summary.num_records += 1
                summary.counts += counts
                if not settings.only_missing:
                    _compare(Conversation.from_record(record, line.ref), settings, summary.comparison)
    return summary


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
