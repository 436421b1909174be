"""The thread that owns the engine: rows of all requests join and leave it between its steps, in order of arrival.

A second thread watches that its steps end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from steerlm_nemo.engine.protocol import (
    Completion,
    Engine,
    Event,
    Failed,
    Finished,
    Sample,
    Scored,
    ScoreRequest,
    Scores,
    TokenMade,
)
from steerlm_nemo.engine.timings import Timings
from steerlm_nemo.engine.watch import Patience, Watch

logger = logging.getLogger("steerlm_nemo.serving")

OnToken = Callable[[int, TokenMade], None]  # (place of the sample in its request, token), called in the engine's thread


class QueueFullError(Exception):
    """Too many requests are waiting."""


class EngineDiedError(RuntimeError):
    """The engine cannot work any more; the server should end."""


class EngineHungError(RuntimeError):
    """A forward pass has not ended for so long that it is not expected to."""


@dataclass(eq=False)
class _Job:
    work: Sequence[Sample | ScoreRequest]
    on_token: OnToken | None = None
    arrived: float = field(default_factory=time.perf_counter)
    result: Future[list[Any]] = field(default_factory=Future)  # a Completion or Scores for each
    rows: list[int] = field(default_factory=list)  # of the engine; one per piece of work once it has joined
    done: dict[int, Completion | Scores] = field(default_factory=dict)  # by engine row

    @property
    def has_joined(self) -> bool:
        return len(self.rows) == len(self.work)


@dataclass(eq=False)
class _Row:
    job: _Job
    place: int  # in its request
    told_at: float | None = None  # its last token


class EngineWorker:
    """Steps `engine` in one thread for as long as it has rows, at most `max_batch_rows` at a time.

    A request of more rows than fit joins bit by bit. `failed` is what killed the engine, or None: what it raised, or
    that no forward pass ended for as long as `patience` lasts.
    """

    def __init__(self, engine: Engine, max_batch_rows: int, max_waiting_requests: int, patience: Patience) -> None:
        self._engine = engine
        self._max_batch_rows = max_batch_rows
        self._max_waiting_requests = max_waiting_requests
        self._waiting: deque[_Job] = deque()  # not all rows have joined
        self._running: dict[int, _Row] = {}  # by the engine's number
        self._changed = threading.Condition()
        self._stopping = False
        self.patience = patience
        self.failed: Exception | None = None
        self.timings = Timings()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watch = Watch(patience.give_up_s, self._give_up)

    def start(self) -> None:
        self._thread.start()
        self._watch.start()

    def stop(self) -> None:
        """Finish what is waiting and running, then end the thread; one that is stalled is given up."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        while self._thread.is_alive() and self.failed is None:
            self._thread.join(0.1)
            if self.is_stalled:
                self._give_up()

    @property
    def still_s(self) -> float:
        """Seconds for which there has been work and no forward pass has ended."""
        return self._watch.still_s

    @property
    def is_stalled(self) -> bool:
        return self.still_s >= self.patience.stall_s

    @property
    def num_waiting(self) -> int:
        """Requests of which no row, or not every row, has joined the engine yet; cancelled ones do not count."""
        return sum(not job.result.done() for job in tuple(self._waiting))

    @property
    def num_rows_waiting(self) -> int:
        """Rows of those requests that have not joined the engine."""
        return sum(len(job.work) - len(job.rows) for job in tuple(self._waiting) if not job.result.done())

    @property
    def num_running(self) -> int:
        """Rows in the engine."""
        return len(self._running)

    @property
    def num_requests_running(self) -> int:
        """Requests with a row in the engine."""
        return len({id(row.job) for row in tuple(self._running.values())})

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
                num_passes = self._engine.counters.steps
                events = self._engine.step()
                if self.failed is not None:  # given up meanwhile
                    return
                if events or self._engine.counters.steps != num_passes:
                    self._watch.moved()
                self._take(events)
        except Exception as err:
            if self.failed is None:
                logger.critical("the engine died", exc_info=True)
            self._fail(err)
        finally:
            self._watch.stop()

    def _give_up(self) -> None:
        problem = (
            f"no forward pass has ended for {self.still_s:.0f} s, and {self.num_running + self.num_rows_waiting} rows "
            "wait: a rank or its device hangs, or engine.give_up_s is too short for this machine"
        )
        logger.critical(problem)
        self._fail(EngineHungError(problem))

    def _fail(self, err: Exception) -> None:
        """Everybody who waits is told. Called in the engine's thread or the watch's."""
        with self._changed:
            if self.failed is not None:
                return
            self.failed = err
            left = {id(job): job for job in (*self._waiting, *(row.job for row in self._running.values()))}
            self._waiting.clear()
            self._running.clear()
        for job in left.values():
            _refuse(job, EngineDiedError(f"the engine died: {err}"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            is_idle = not self._waiting and not self._running
            while not self._waiting and not self._running and not self._stopping:
                self._watch.moved(idle=True)
                self._changed.wait()
            if is_idle:
                self._watch.moved()
            return bool(self._waiting or self._running)

    def _drop_cancelled(self) -> None:
        for number, row in list(self._running.items()):
            if row.job.result.done():  # cancelled, or failed by another of its rows
                self._engine.cancel(number)
                del self._running[number]
        with self._changed:
            if any(job.result.done() for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.result.done())

    def _join_rows(self) -> None:
        now = time.perf_counter()
        while self._waiting and len(self._running) < self._max_batch_rows:
            job = self._waiting[0]
            place = len(job.rows)
            number = self._engine.add(job.work[place])
            job.rows.append(number)
            self._running[number] = _Row(job, place)
            self.timings.queue.add(now - job.arrived)
            self.timings.prompt_tokens += len(job.work[place].prompt_ids)
            if job.has_joined:
                with self._changed:
                    self._waiting.popleft()

    def _take(self, events: Sequence[Event]) -> None:
        now = time.perf_counter()
        last_told: Counter[float] = Counter()  # most rows were told their last token at the same moment
        for event in events:
            row = self._running[event.row]
            if isinstance(event, TokenMade):
                if row.told_at is None:
                    self.timings.first_token.add(now - row.job.arrived)
                else:
                    last_told[row.told_at] += 1
                row.told_at = now
                if row.job.on_token is not None and not row.job.result.done():
                    row.job.on_token(row.place, event)
                continue
            del self._running[event.row]
            if isinstance(event, Failed):
                logger.error("a row failed: %s", event.error)
                _refuse(row.job, event.error)
            else:
                self._end_row(row.job, event, now)
        for told_at, times in last_told.items():
            self.timings.between_tokens.add(now - told_at, times)

    def _end_row(self, job: _Job, event: Finished | Scored, now: float) -> None:
        job.done[event.row] = event.completion if isinstance(event, Finished) else event.scores
        if len(job.done) == len(job.work) and _settle(job.result.set_result, [job.done[row] for row in job.rows]):
            self.timings.request.add(now - job.arrived)


def _refuse(job: _Job, error: Exception) -> None:
    _settle(job.result.set_exception, error)


def _settle(settle: Callable[..., None], value: object) -> bool:
    """Was there still somebody to tell?"""
    try:
        settle(value)
    except InvalidStateError:
        logger.debug("a request was cancelled as it ended")
        return False
    return True
