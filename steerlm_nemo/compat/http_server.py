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
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger("steerlm_nemo.serving")


class Door(Protocol):
    """What the server asks of the application's front door."""

    draining: bool
    num_in_flight: int
    worker: Any  # its `failed` is what killed the engine, or None


class JsonProtocol(H11Protocol):
    """Says in JSON, too, that something is no HTTP request."""

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"message": msg}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class DrainingServer(uvicorn.Server):
    """Goes on answering, with 503, while the requests in flight are finished.

    Ends by returning: uvicorn raises the signal again at the end, which would skip the other ranks' farewell.
    """

    def __init__(self, config: uvicorn.Config, door: Door, drain_s: float) -> None:
        super().__init__(config)
        self._door = door
        self._drain_s = drain_s
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._door.draining:
            os._exit(128 + sig)
        self._door.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._door.draining and self._deadline is None:
            self._deadline = time.monotonic() + self._drain_s
            logger.info(
                "ending: %d requests in flight have %g s; a second signal ends them at once",
                self._door.num_in_flight,
                self._drain_s,
            )
        if self._deadline is not None and (not self._door.num_in_flight or time.monotonic() > self._deadline):
            self.should_exit = True
        if self._door.worker.failed is not None:
            self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
