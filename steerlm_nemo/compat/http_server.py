"""uvicorn and h11 as this project needs them: a JSON answer to what is no HTTP, and an end that finishes its requests.

Both reach into parts that these packages do not promise to keep, so pyproject.toml pins them. To be removed when
uvicorn goes on answering while it drains, and lets its 400 be written by the application.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger("steerlm_nemo.serving")

ANSWER_S = 1.0  # for the last answers to be written


class Door(Protocol):
    """What the server asks of the application's front door."""

    draining: bool
    worker: Any  # its `failed` is what killed the engine, or None

    @property
    def num_in_flight(self) -> int: ...

    def cut(self, why: str) -> None: ...


class JsonProtocol(H11Protocol):
    """Says in JSON, too, that something is no HTTP request."""

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"message": msg}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class DrainingServer(uvicorn.Server):
    """Goes on answering, with 503, while the requests in flight are finished; none ends without an answer.

    Ends by returning: uvicorn raises the signal again at the end, which would skip the other ranks' farewell. A second
    signal ends the process, as soon as the requests in flight have been told.
    """

    def __init__(self, config: uvicorn.Config, door: Door, drain_s: float) -> None:
        super().__init__(config)
        self._door = door
        self._drain_s = drain_s
        self._drained_by: float | None = None
        self._gone_by: float | None = None
        self._second_signal: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._door.draining:
            self._door.draining = True
        elif self._second_signal is None:
            self._second_signal = sig
            # If the loop is stuck, too.
            failsafe = threading.Timer(2 * ANSWER_S, os._exit, [128 + sig])
            failsafe.daemon = True
            failsafe.start()
        else:
            os._exit(128 + sig)

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if self._door.draining and self._drained_by is None:
            self._drained_by = now + self._drain_s
            logger.info(
                "ending: %d requests in flight have %g s; a second signal ends them at once",
                self._door.num_in_flight,
                self._drain_s,
            )
        if self._gone_by is None and (why := self._why_cut(now)):
            logger.info("%d requests in flight are answered with 503: %s", self._door.num_in_flight, why)
            self._door.cut(why)
            self._gone_by = now + ANSWER_S
        is_ending = self._drained_by is not None or self._gone_by is not None
        if is_ending and (not self._door.num_in_flight or (self._gone_by is not None and now > self._gone_by)):
            if self._second_signal is not None:
                os._exit(128 + self._second_signal)
            self.should_exit = True
        return await super().on_tick(counter)

    def _why_cut(self, now: float) -> str | None:
        if self._second_signal is not None:
            return "the server was told twice to end"
        if self._door.worker.failed is not None:
            return f"the engine died: {self._door.worker.failed}; the server ends"
        if self._drained_by is not None and now > self._drained_by:
            return f"the server is ending and waited no longer than {self._drain_s:g} s"
        return None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
