"""The thread that owns the engine: takes waiting requests, batches them, hands back completions.

While the engine works, requests gather; the next batch is whatever has gathered. Order of arrival is kept.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from steerlm_nemo.serving.sampling import Completion, Engine, Sample

logger = logging.getLogger("steerlm_nemo.serving")


class QueueFullError(Exception):
    """Too many requests are waiting."""


@dataclass(frozen=True)
class _Job:
    samples: tuple[Sample, ...]
    result: Future[list[Completion]]


class EngineWorker:
    """Calls `engine.generate` from one thread, with the samples of several requests at a time."""

    def __init__(self, engine: Engine, max_batch_rows: int, max_waiting_requests: int) -> None:
        self._engine = engine
        self._max_batch_rows = max_batch_rows
        self._jobs: queue.Queue[_Job | None] = queue.Queue(max_waiting_requests)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what is waiting, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        return self._jobs.qsize()

    def submit(self, samples: Sequence[Sample]) -> Future[list[Completion]]:
        """The future completions; cancelling it before its turn drops the request.

        Raises:
            QueueFullError: as many requests as allowed are waiting already.
        """
        job = _Job(tuple(samples), Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise QueueFullError from None
        return job.result

    def _run(self) -> None:
        held: _Job | None = None  # taken from the queue, but too large for the batch before it
        while True:
            job = held or self._jobs.get()
            held = None
            if job is None:
                return
            batch, num_rows, stop = [job], len(job.samples), False
            while True:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    stop = True
                    break
                if num_rows + len(job.samples) > self._max_batch_rows:
                    held = job
                    break
                batch.append(job)
                num_rows += len(job.samples)
            self._serve([job for job in batch if job.result.set_running_or_notify_cancel()])
            if stop:
                return

    def _serve(self, batch: list[_Job]) -> None:
        if not batch:
            return
        try:
            completions = self._engine.generate([sample for job in batch for sample in job.samples])
        except Exception as err:
            if len(batch) > 1:
                # One request's fault must not become its neighbours': each gets a call of its own.
                logger.warning("engine failed on a batch of %d requests; serving them one by one", len(batch))
                for job in batch:
                    self._serve([job])
                return
            logger.exception("engine failed on a request of %d rows", len(batch[0].samples))
            batch[0].result.set_exception(err)
            return
        start = 0
        for job in batch:
            job.result.set_result(completions[start : start + len(job.samples)])
            start += len(job.samples)
