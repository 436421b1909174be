"""A file of records, each asked of servers: the annotator's work and the steering client's, done in one way.

Many records are in work at a time; those that begin alike run near each other, so that a server computes what they
share once. What is done is in a journal, and a run that was killed goes on from there. The output keeps the order of
the input and gets its name when it is complete. A record that cannot be used, or that the server refuses, is kept in
the reject file with its place and reason, and costs no other record its answer.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from steerlm_nemo.client.journal import Journal
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.client.server import RequestRefusedError, UnreachableError, named
from steerlm_nemo.errors import IncompleteError, InputError, RecordError, ServerError
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.outputs import require_writable
from steerlm_nemo.record_report import SUFFIX, schema_facts
from steerlm_nemo.records import (
    Accounting,
    RawLine,
    atomic_output,
    dump_record,
    read_lines,
    require_file,
    require_other_file,
)

WINDOW = 4096  # records that are put in order together: enough to bring trees together, few enough for memory


@dataclass(frozen=True)
class Words:
    """How messages name the work: `annotate`, `annotated`, `no attributes`, `turns` (of which the records have several,
    and which the job counts under this word; empty where the records themselves are counted), and the flag of the
    output."""

    task: str
    done: str
    nothing: str
    parts: str
    output_flag: str


class Item(Protocol):
    """A record in work."""

    @property
    def line(self) -> RawLine: ...


_Item = TypeVar("_Item", bound=Item)


class Job(Protocol[_Item]):
    """What is asked of each record, and what is made of the answers."""

    @property
    def words(self) -> Words: ...

    def begin(self, line: RawLine) -> _Item:
        """Raises RecordError for whatever would stop the record from being asked about, or written later."""

    def order(self, item: _Item) -> Any:
        """Sorts items that begin alike next to each other."""

    def ask(self, items: Sequence[_Item]) -> None:
        """Ask for all of them together; each keeps its answers. Raises ServerError."""

    def finish(self, item: _Item) -> tuple[Mapping[str, Any], Mapping[str, int]]:
        """The record to write, and what is to be counted of it."""


@dataclass
class Done:
    """What a finished run did. model: its identity; None where its server does not tell."""

    words: Words
    model: str | None = None
    num_records: int = 0
    num_resumed: int = 0
    num_rejected: int = 0
    seconds: float = 0.0
    rejects_path: Path | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        lines = []
        if self.num_rejected:
            total = self.num_records + self.num_rejected
            lines.append(
                f"WARNING: {total} read = {self.num_records} written + {self.num_rejected} rejected; "
                f"the rejected ones are in {self.rejects_path}"
            )
        lines.append(
            f"{self.num_records} records {self.words.done} ({self.num_resumed} of them by an earlier run) in "
            f"{self.seconds:.1f} s, by {named(self.model)}"
        )
        return "\n".join(lines)


@contextmanager
def working_through(
    source: Path,
    output: Path,
    servers: ServerPool,
    served: SteerLMFormat,
    job: Job[_Item],
    settings: Mapping[str, Any],
    done: Done,
    *,
    batch_size: int,
    allow_rejected: bool,
) -> Iterator[None]:
    """Do the job for every record of `source`, and say in `done` what was done. The block runs when `output` is
    complete, before the journal goes.

    `batch_size` records go into one request; `servers` says how many requests are under way at a time. A run goes on
    with equal `settings` and the same model only. `allow_rejected` completes the output without the records that are
    rejected.

    Raises:
        InputError: the input cannot be used, or the journal is of another run.
        IncompleteError: a record was rejected, or all servers went away. The output is not written; what is done is
            kept in OUTPUT.progress.jsonl, and the same command goes on from there.
    """
    if servers.identity is None:
        print(
            f"WARNING: {servers.where} does not tell which model it serves; going on with another goes unnoticed.",
            file=sys.stderr,
        )
    fingerprint = {
        **settings,
        "model": servers.identity,
        "schema": served.schema.name,
        "model_format": served.to_dict()["digest"],
    }
    words, start = job.words, time.monotonic()
    with Journal(Path(f"{output}.progress.jsonl"), fingerprint) as journal, Accounting.beside(output) as accounting:
        total = num_resumed = 0
        for line in read_lines(source):
            total += 1
            num_resumed += journal.has(line)
        if not total:
            raise InputError(f"{source}: holds no record")
        if len(journal) and not num_resumed:
            raise InputError(
                f"{journal.path} holds {len(journal)} records of another input, and none of {source}. Give another "
                f"{words.output_flag}, or delete that file to begin anew."
            )
        worker = _Worker(servers, job, journal, accounting)
        with tqdm(total=total, initial=num_resumed, unit="record", desc=words.task) as progress:
            stopped = worker.run(source, batch_size, progress)
        if stopped is not None:
            raise IncompleteError(
                f"stopped with {len(journal)} of {total} records {words.done}: {stopped}\n"
                f"Nothing is lost: they are in {journal.path}. Run the same command again to go on."
            )
        done.model, done.num_resumed, done.num_rejected = servers.identity, num_resumed, accounting.counts["rejected"]
        rejected = f"({accounting.reasons_text()}), the first {accounting.first_rejected}"
        if worker.num_server_faults:
            raise IncompleteError(
                f"{worker.num_server_faults} of {total} records have {words.nothing} because the server failed on "
                f"them {rejected}; {accounting.rejects_path} has each with its reason. {output} is not written. Run "
                f"the same command again when the server is well (the other {len(journal)} are kept)."
            )
        if done.num_rejected and not (allow_rejected and len(journal)):
            raise IncompleteError(
                f"{done.num_rejected} of {total} records could not be {words.done} {rejected}; "
                f"{accounting.rejects_path} has each with its reason. {output} is not written. "
                + (
                    f"Correct them and run the same command again (the other {len(journal)} are kept), or add "
                    "--allow_rejected to go without them."
                    if len(journal)
                    else "None could be: is this the right file?"
                )
            )
        with atomic_output(output) as file:
            for line in read_lines(source):
                if (found := journal.get(line)) is not None:
                    record, counts = found
                    file.write(dump_record(record) + "\n")
                    done.num_records += 1
                    done.counts += counts
        done.seconds = time.monotonic() - start
        accounting.counts["written"] = done.num_records
        accounting.save(f"{output}{SUFFIX}", input_file=str(source), model=done.model, **schema_facts(served.schema))
        yield
        journal.delete()
    done.rejects_path = accounting.rejects_path


def require_sound(source: str | Path, output: str | Path, servers: ServerPool, batch_size: int) -> tuple[Path, Path]:
    """The two paths, and what can be said before a server is asked. Raises InputError."""
    source = require_file(source)
    require_writable(output)
    require_other_file(output, source)
    for name, value in (("batch_size", batch_size), ("concurrency", servers.in_flight)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"--{name} must be a whole number of at least 1, found {value!r}")
    return source, Path(output)


@dataclass(frozen=True)
class _Result(Generic[_Item]):
    """What became of one record: it is answered, or the reason why it is not, or why the run must stop."""

    item: _Item
    problem: str | None = None
    server_fault: bool = False  # `problem` is the server's, not the record's
    fatal: ServerError | None = None


class _Worker(Generic[_Item]):
    """Feeds records to worker threads and books what comes back. Only `run`'s thread touches files."""

    def __init__(self, servers: ServerPool, job: Job[_Item], journal: Journal, accounting: Accounting) -> None:
        self._servers = servers
        self._job = job
        self._journal = journal
        self._accounting = accounting
        self._num_parts = 0
        self._start = time.monotonic()
        self.num_server_faults = 0

    def run(self, source: Path, batch_size: int, progress: Any) -> ServerError | None:
        """Do what the journal does not have yet. Returns the error that stopped the run early, if any."""
        tasks: queue.Queue[list[_Item] | None] = queue.Queue()
        results: queue.Queue[_Result[_Item] | BaseException] = queue.Queue()
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

    def _book(self, result: _Result[_Item] | BaseException, progress: Any) -> ServerError | None:
        if isinstance(result, BaseException):
            raise result
        if result.fatal is not None:
            return result.fatal
        line = result.item.line
        if result.problem is not None:
            self._accounting.rejected(line.ref, result.problem, line.raw)
            self.num_server_faults += result.server_fault
        else:
            record, counts = self._job.finish(result.item)
            self._journal.add(line, record, counts)
            if parts := self._job.words.parts:
                self._num_parts += counts[parts]
                elapsed_s = max(time.monotonic() - self._start, 0.001)
                progress.set_postfix_str(f"{self._num_parts / elapsed_s:.1f} {parts}/s", refresh=False)
        progress.update()
        return None

    def _groups(self, source: Path, batch_size: int, progress: Any) -> Iterator[list[_Item]]:
        """What is left to do, `batch_size` at a time, put in order window by window."""
        lines = (line for line in read_lines(source) if not self._journal.has(line))
        group: list[_Item] = []
        while window := list(islice(lines, WINDOW)):
            items = []
            for line in window:
                try:
                    items.append(self._job.begin(line))
                except RecordError as err:
                    self._accounting.rejected(line.ref, err.reason, line.raw)
                    progress.update()
            for item in sorted(items, key=self._job.order):
                group.append(item)
                if len(group) == batch_size:
                    yield group
                    group = []
        if group:
            yield group

    def _group(self, group: Sequence[_Item]) -> list[_Result[_Item]]:
        try:
            self._job.ask(group)
        except ServerError as err:
            refused = isinstance(err, RequestRefusedError)
            if isinstance(err, UnreachableError) or not (refused or self._servers.is_ready()):
                return [_Result(item, fatal=err) for item in group]
            if len(group) == 1:
                return [_Result(group[0], f"not {self._job.words.done}: {err}", server_fault=not refused)]
            # One record the server cannot take must not cost its neighbours their answers.
            return [result for item in group for result in self._group([self._job.begin(item.line)])]
        return [_Result(item) for item in group]
