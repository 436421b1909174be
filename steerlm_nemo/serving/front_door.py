"""What every request passes before its route: a number, the token, the limits, the count; and one line in the log.

And what none leaves without: an answer. What a route raises, and what cuts it short, is answered here.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString
from starlette.routing import Match, Route

from steerlm_nemo.engine.protocol import Engine
from steerlm_nemo.engine.worker import EngineWorker
from steerlm_nemo.errors import ConfigError, InputError
from steerlm_nemo.model_kind import MODEL_HEADER
from steerlm_nemo.serving.http import error_event, error_response
from steerlm_nemo.serving.page import PARTS

logger = logging.getLogger("steerlm_nemo.serving")

TOKEN_VARIABLE = "STEERLM_TOKEN"
# Whoever asks whether the server lives has no token, and the page has to be there to ask its reader for it.
WITHOUT_TOKEN = ("/", "/health", "/ready")
WHILE_DRAINING = ("/health", "/ready", "/metrics")
State = Literal["ready", "stalled", "draining", "failed"]
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = ("GET", "PUT", "POST", "HEAD", "OPTIONS", "DELETE", "PATCH")
_MODEL = ("model_name",)
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class HttpSettings:
    """`http` of nemo_configs/megatron_gpt_inference.yaml, which has the defaults; the token read."""

    token: str | None
    max_body_mb: float
    max_prompts: int
    max_waiting_requests: int
    drain_s: float
    cors_allow_origins: tuple[str, ...]

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)


def settings_from(config: Any) -> HttpSettings:
    """Check the `http` section; the token comes from `token_file` or from the environment, STEERLM_TOKEN.

    Never from the command line, which every user of the machine can read.

    Raises:
        ConfigError: every value that cannot be, together.
        InputError: the token file cannot be read.
    """
    problems = [
        f"http.{key} is {config[key]!r}; it must be a number greater than 0"
        for key in ("max_body_mb", "max_prompts", "max_waiting_requests", "drain_s")
        if isinstance(config[key], bool) or not isinstance(config[key], (int, float)) or not config[key] > 0
    ]
    token = _token(config.token_file)
    origins = config.cors_allow_origins
    if isinstance(origins, str) or not all(isinstance(origin, str) and _is_origin(origin) for origin in origins or ()):
        problems.append(
            f"http.cors_allow_origins is {origins}; it must be a list of what browsers send as Origin, which has no "
            "path: [https://chat.example.org, http://localhost:3000]"
        )
    elif "*" in (origins or ()) and token is not None:
        problems.append(
            "http.cors_allow_origins has *, and the server a token, which no page but those you know should be given; "
            "list their origins"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return HttpSettings(
        token=token,
        max_body_mb=float(config.max_body_mb),
        max_prompts=int(config.max_prompts),
        max_waiting_requests=int(config.max_waiting_requests),
        drain_s=float(config.drain_s),
        cors_allow_origins=tuple(origins or ()),
    )


def _is_origin(text: str) -> bool:
    """As browsers write them: in small letters, without a path, a user or the scheme's own port."""
    parts = urlsplit(text)
    is_bare = text == f"{parts.scheme}://{parts.netloc}".lower() and parts.netloc != "" and "@" not in text
    return text == "*" or (
        is_bare and not parts.netloc.endswith({"http": ":80", "https": ":443"}.get(parts.scheme, "@"))
    )


def _token(path: str | None) -> str | None:
    if path is None:
        token, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        source = f"http.token_file {path}"
        try:
            token = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(f"{source}: cannot read a token from it: {err}") from err
    if token is None:
        return None
    if not re.fullmatch(r"[!-~]+", token := token.strip()):
        raise ConfigError(f"{source} must hold one word of printable ASCII characters, such as `openssl rand -hex 32`")
    return token


class FrontDoor:
    """ASGI middleware around all routes. `num_in_flight` counts requests let in and not yet answered in full."""

    def __init__(self, worker: EngineWorker, engine: Engine, token: str | None) -> None:
        self.worker = worker
        self.draining = False
        self._in_flight: dict[asyncio.Task[Any], str] = {}  # and why they have been cut short, or ""
        self._token = token.encode() if token else None
        identity = engine.info.identity.encode()
        self._model = [(MODEL_HEADER.encode(), identity)] if identity else []
        self._routes: Sequence[Any] = ()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, processor time, open files of this process
        self._registry.register(_EngineNumbers(self, engine))  # type: ignore[arg-type]
        self._model_name = engine.info.name
        self._requests = Counter(
            "steerlm_requests",
            "Requests answered",
            ["model_name", "route", "method", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "steerlm_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["model_name", "route"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def metrics(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    @property
    def state(self) -> State:
        if self.worker.failed is not None:
            return "failed"
        if self.worker.is_stalled:
            return "stalled"
        return "draining" if self.draining else "ready"

    @property
    def why_not_ready(self) -> str:
        """In a sentence; empty where it is."""
        worker = self.worker
        return {
            "ready": "",
            "draining": "the server is ending, and finishes the requests that it has",
            "stalled": f"rows wait, and no forward pass has ended for {worker.still_s:.0f} s; "
            f"the server gives up after {worker.patience.give_up_s:g} s",
            "failed": f"the engine died: {worker.failed}",
        }[self.state]

    def cut(self, why: str) -> None:
        """Answer all requests in flight now: with 503, or with an error event where a stream has begun."""
        for task in self._in_flight:
            self._in_flight[task] = why
            task.cancel()

    def around(self, app: Any, routes: Sequence[Any]) -> _App:
        self._routes = routes

        async def door(scope: Any, receive: Any, send: _Send) -> None:
            if scope["type"] == "http":
                await self._request(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return door

    async def _request(self, app: Any, scope: Any, receive: Any, send: _Send) -> None:
        start = time.perf_counter()
        state = scope.setdefault("state", {})
        refusal = self._refusal(scope)
        answer = _Answer(send, self._request_id(scope), self._model if refusal is None else [])
        if refusal is not None:
            await refusal(scope, receive, answer.send)
        else:
            await self._let_in(app, scope, receive, answer)
        seconds = time.perf_counter() - start
        route = self._route(scope)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(self._model_name, route, method, str(answer.status)).inc()
        self._seconds.labels(self._model_name, route).observe(seconds)
        rows = f" rows={state['num_rows']}" if "num_rows" in state else ""
        broken = " broken off" * answer.is_broken_off
        # Method, path, status, milliseconds, rows, number; never a body, an address or a query. Quoted, or a path
        # with a line end in it would write log lines of its own.
        logger.info(
            "%s %s %d %.1f ms%s%s id=%s",
            *(method, quote(scope["path"]), answer.status, seconds * 1000, rows, broken, answer.request_id),
        )

    async def _let_in(self, app: Any, scope: Any, receive: Any, answer: _Answer) -> None:
        """Whatever becomes of the request, it is answered."""
        task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        self._in_flight[task] = ""
        try:
            await app(scope, receive, answer.send)
        except asyncio.CancelledError:
            why = self._in_flight[task] or "the server is ending"
            await answer.end(scope, receive, 503, f"{why}; ask again when it is back", {"Retry-After": "5"})
        except Exception:
            logger.exception("%s %s: a defect of this server", scope["method"], quote(scope["path"]))
            await answer.end(scope, receive, 500, "Internal Server Error")
        finally:
            del self._in_flight[task]

    def _refusal(self, scope: Any) -> Any:
        path = scope["path"]
        is_open = path in WITHOUT_TOKEN or path.startswith(PARTS)
        if self._token is not None and not is_open and not _has_token(scope, self._token):
            return error_response(
                path,
                401,
                "this server wants a token: send the header Authorization: Bearer TOKEN",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.draining and path not in WHILE_DRAINING:
            headers = {"Retry-After": "5", "Connection": "close"}
            return error_response(path, 503, "the server is ending; ask again when it is back", headers=headers)
        return None

    def _request_id(self, scope: Any) -> str:
        sent = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        return sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex

    def _route(self, scope: Any) -> str:
        for route in self._routes:
            if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE:
                return route.path
        return "other"


def _has_token(scope: Any, token: bytes) -> bool:
    sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    kind, _, word = sent.partition(b" ")
    return hmac.compare_digest(word.strip(), token) and kind.lower() == b"bearer"


class _Answer:
    """What a request has been answered so far."""

    def __init__(self, send: _Send, request_id: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status = 500
        self.request_id = request_id
        self.is_broken_off = False
        self._send = send
        self._headers = [*headers, (b"x-request-id", request_id.encode())]
        self._has_started = self._has_ended = self._is_stream = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._has_started, self.status = True, message["status"]
            headers = message.get("headers", ())
            self._is_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
            message["headers"] = [*headers, *self._headers]
        else:
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def end(self, scope: Any, receive: Any, status: int, message: str, headers: Any = None) -> None:
        """With an error, in the way that is left; what can only be broken off is."""
        if not self._has_started:
            await error_response(scope["path"], status, message, headers=headers)(scope, receive, self.send)
        elif not self._has_ended:
            self.is_broken_off = True
            if self._is_stream:
                event = error_event(status, message).encode()
                await self.send({"type": "http.response.body", "body": event, "more_body": False})


_Send = Callable[[Any], Awaitable[None]]
_App = Callable[[Any, Any, _Send], Awaitable[None]]


class _EngineNumbers:
    """Read when asked for, so that the engine's loop counts for nobody."""

    def __init__(self, door: FrontDoor, engine: Engine) -> None:
        self._door = door
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        worker, counters, timings = self._door.worker, self._engine.counters, self._door.worker.timings
        name_of_model = [self._engine.info.name]
        gauges: tuple[tuple[str, str, float], ...] = (
            ("requests_in_flight", "Requests let in and not yet answered in full", self._door.num_in_flight),
            ("num_requests_running", "Requests with a row in the engine", worker.num_requests_running),
            ("num_requests_waiting", "Requests whose rows have not all joined the engine", worker.num_waiting),
            ("rows_running", "Rows in the engine", worker.num_running),
            ("rows_waiting", "Rows that have not joined the engine", worker.num_rows_waiting),
            ("still_seconds", "Since a forward pass ended, while rows wait", worker.still_s),
            ("ready", "1 where new requests are served", self._door.state == "ready"),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"steerlm_{name}", text, labels=_MODEL)
            gauge.add_metric(name_of_model, float(value))
            yield gauge
        totals = (
            ("forward_passes", "Forward passes of the model", counters.steps),
            ("prompt_tokens", "Tokens of prompts that joined the engine", timings.prompt_tokens),
            ("prefilled_tokens", "Prompt tokens computed", counters.prefilled_tokens),
            ("reused_tokens", "Prompt tokens taken from the cache", counters.reused_tokens),
            ("generation_tokens", "Tokens generated, forced ones included", counters.generated_tokens),
            ("evicted_tokens", "Cached tokens given up for others", counters.evicted_tokens),
        )
        for name, text, value in totals:
            counter = CounterMetricFamily(f"steerlm_{name}", text, labels=_MODEL)
            counter.add_metric(name_of_model, float(value))
            yield counter
        histograms = (
            ("time_to_first_token", "Of a row, from the queue to its first token", timings.first_token),
            ("inter_token_latency", "Between two tokens of a row", timings.between_tokens),
            ("request_queue_time", "Of a row, in the queue", timings.queue),
            ("e2e_request_latency", "Of a request, from the queue to its last token", timings.request),
        )
        for name, text, counts in histograms:
            histogram = HistogramMetricFamily(f"steerlm_{name}_seconds", text, labels=_MODEL)
            bounds = [*map(floatToGoString, counts.bounds), "+Inf"]
            histogram.add_metric(name_of_model, list(zip(bounds, accumulate(counts.counts), strict=True)), counts.total)
            yield histogram
