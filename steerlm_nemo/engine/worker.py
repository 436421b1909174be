"""The thread that owns the engine: rows of all requests join and leave it between its steps, in order of arrival."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from steerlm_nemo.engine.protocol import (
    Completion,
    Engine,
    Event,
    Failed,
    Finished,
    Sample,
    ScoreRequest,
    Scores,
    TokenMade,
)

logger = logging.getLogger("steerlm_nemo.serving")

OnToken = Callable[[int, TokenMade], None]  # (place of the sample in its request, token), called in the engine's thread


class QueueFullError(Exception):
    """Too many requests are waiting."""


class EngineDiedError(RuntimeError):
    """The engine cannot work any more; the server should end."""


@dataclass(eq=False)
class _Job:
    work: Sequence[Sample | ScoreRequest]
    on_token: OnToken | None = None
    result: Future[list[Any]] = field(default_factory=Future)  # a Completion or Scores for each
    rows: list[int] = field(default_factory=list)  # of the engine; one per piece of work once it has joined
    done: dict[int, Completion | Scores] = field(default_factory=dict)  # by engine row

    @property
    def has_joined(self) -> bool:
        return len(self.rows) == len(self.work)


class EngineWorker:
    """Steps `engine` in one thread for as long as it has rows, at most `max_batch_rows` at a time.

    A request of more rows than fit joins bit by bit. `failed` is what killed the engine, or None.
    """

    def __init__(self, engine: Engine, max_batch_rows: int, max_waiting_requests: int) -> None:
        self._engine = engine
        self._max_batch_rows = max_batch_rows
        self._max_waiting_requests = max_waiting_requests
        self._waiting: deque[_Job] = deque()  # not all rows have joined
        self._running: dict[int, tuple[_Job, int]] = {}  # engine row -> its request, its place there
        self._changed = threading.Condition()
        self._stopping = False
        self.failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what is waiting and running, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Requests of which no row, or not every row, has joined the engine yet; cancelled ones do not count."""
        return sum(not job.result.done() for job in tuple(self._waiting))

    @property
    def num_running(self) -> int:
        """Rows in the engine."""
        return len(self._running)

    def submit(self, samples: Sequence[Sample], on_token: OnToken | None = None) -> Future[list[Completion]]:
        """The future completions, in the order of the samples; cancelling it frees its rows before the next step.

        Raises:
            QueueFullError: as many requests as allowed are waiting already.
            EngineDiedError: see `failed`.
        """
        return self._enqueue(_Job(tuple(samples), on_token))

    def score(self, requests: Sequence[ScoreRequest]) -> Future[list[Scores]]:
        """The future scores, in the order of the requests; as `submit`."""
        return self._enqueue(_Job(tuple(requests)))

    def _enqueue(self, job: _Job) -> Future[list[Any]]:
        with self._changed:
            if self.failed is not None:
                raise EngineDiedError(f"the engine died: {self.failed}")
            if self.num_waiting >= self._max_waiting_requests:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()
        return job.result

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._join_rows()
                for event in self._engine.step():
                    self._take(event)
        except Exception as err:
            logger.critical("the engine died", exc_info=True)
            with self._changed:
                self.failed = err
                left = {id(job): job for job in (*self._waiting, *(job for job, _ in self._running.values()))}
                self._waiting.clear()
                self._running.clear()
            for job in left.values():
                _fail(job, EngineDiedError(f"the engine died: {err}"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._waiting and not self._running and not self._stopping:
                self._changed.wait()
            return bool(self._waiting or self._running)

    def _drop_cancelled(self) -> None:
        for row, (job, _) in list(self._running.items()):
            if job.result.done():  # cancelled, or failed by another of its rows
                self._engine.cancel(row)
                del self._running[row]
        with self._changed:
            if any(job.result.done() for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.result.done())

    def _join_rows(self) -> None:
        while self._waiting and len(self._running) < self._max_batch_rows:
            job = self._waiting[0]
            place = len(job.rows)
            row = self._engine.add(job.work[place])
            job.rows.append(row)
            self._running[row] = (job, place)
            if job.has_joined:
                with self._changed:
                    self._waiting.popleft()

    def _take(self, event: Event) -> None:
        job, place = self._running[event.row]
        if isinstance(event, TokenMade):
            if job.on_token is not None and not job.result.done():
                job.on_token(place, event)
            return
        del self._running[event.row]
        if isinstance(event, Failed):
            logger.error("a row failed: %s", event.error)
            _fail(job, event.error)
            return
        job.done[event.row] = event.completion if isinstance(event, Finished) else event.scores
        if len(job.done) == len(job.work):
            _settle(job.result.set_result, [job.done[row] for row in job.rows])


def _fail(job: _Job, error: Exception) -> None:
    _settle(job.result.set_exception, error)


def _settle(settle: Callable[..., None], value: object) -> None:
    from concurrent.futures import InvalidStateError

    try:
        settle(value)
    except InvalidStateError:
        logger.debug("a request was cancelled as it ended")
