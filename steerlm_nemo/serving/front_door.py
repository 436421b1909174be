"""What every request passes before its route: a number, the token, the limits, the count; and one line in the log."""

from __future__ import annotations

import hmac
import logging
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.routing import Match, Route

from steerlm_nemo.engine.protocol import Engine
from steerlm_nemo.engine.worker import EngineWorker
from steerlm_nemo.errors import ConfigError, InputError
from steerlm_nemo.model_kind import MODEL_HEADER
from steerlm_nemo.serving.http import error_response

logger = logging.getLogger("steerlm_nemo.serving")

TOKEN_VARIABLE = "STEERLM_TOKEN"
# Whoever asks whether the server lives has no token, and the page has to be there to ask its reader for it.
WITHOUT_TOKEN = ("/", "/health", "/ready")
WHILE_DRAINING = ("/health", "/ready", "/metrics")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = ("GET", "PUT", "POST", "HEAD", "OPTIONS", "DELETE", "PATCH")
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class HttpSettings:
    """`http` of nemo_configs/megatron_gpt_inference.yaml, which has the defaults; the token read."""

    token: str | None
    max_body_mb: float
    max_prompts: int
    max_waiting_requests: int
    drain_s: float

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
    if problems:
        raise ConfigError("\n".join(problems))
    return HttpSettings(
        token=_token(config.token_file),
        max_body_mb=float(config.max_body_mb),
        max_prompts=int(config.max_prompts),
        max_waiting_requests=int(config.max_waiting_requests),
        drain_s=float(config.drain_s),
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
        self.num_in_flight = 0
        self._token = token.encode() if token else None
        identity = engine.info.identity.encode()
        self._model = [(MODEL_HEADER.encode(), identity)] if identity else []
        self._routes: Sequence[Any] = ()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, processor time, open files of this process
        self._registry.register(_EngineNumbers(self, engine))  # type: ignore[arg-type]
        self._requests = Counter(
            "steerlm_requests", "Requests answered", ["route", "method", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "steerlm_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def metrics(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    @property
    def state(self) -> Literal["ready", "draining", "failed"]:
        return "failed" if self.worker.failed else "draining" if self.draining else "ready"

    def around(self, app: Any, routes: Sequence[Any]) -> _App:
        self._routes = routes

        async def door(scope: Any, receive: Any, send: _Send) -> None:
            if scope["type"] == "http":
                await self._request(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return door

    async def _request(self, app: Any, scope: Any, receive: Any, send: _Send) -> None:
        start, status = time.perf_counter(), 500
        state = scope.setdefault("state", {})
        request_id = self._request_id(scope)
        refusal = self._refusal(scope)

        async def watch(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), *(self._model if refusal is None else ())]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        self.num_in_flight += refusal is None
        try:
            await (refusal or app)(scope, receive, watch)
        finally:
            self.num_in_flight -= refusal is None
            seconds = time.perf_counter() - start
            route = self._route(scope)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(route, method, str(status)).inc()
            self._seconds.labels(route).observe(seconds)
            rows = f" rows={state['num_rows']}" if "num_rows" in state else ""
            # Method, path, status, milliseconds, rows, number; never a body, an address or a query. Quoted, or a path
            # with a line end in it would write log lines of its own.
            logger.info(
                "%s %s %d %.1f ms%s id=%s", method, quote(scope["path"]), status, seconds * 1000, rows, request_id
            )

    def _refusal(self, scope: Any) -> Any:
        path = scope["path"]
        if self._token is not None and path not in WITHOUT_TOKEN and not _has_token(scope, self._token):
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


_Send = Callable[[Any], Awaitable[None]]
_App = Callable[[Any, Any, _Send], Awaitable[None]]


class _EngineNumbers:
    """Read when asked for, so that the engine's loop counts for nobody."""

    def __init__(self, door: FrontDoor, engine: Engine) -> None:
        self._door = door
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        worker, counters = self._door.worker, self._engine.counters
        gauges: tuple[tuple[str, str, float], ...] = (
            ("requests_in_flight", "Requests let in and not yet answered in full", self._door.num_in_flight),
            ("requests_waiting", "Requests whose rows have not all joined the engine", worker.num_waiting),
            ("rows_running", "Rows in the engine", worker.num_running),
            ("ready", "1 where new requests are served", self._door.state == "ready"),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"steerlm_{name}", text, float(value))
        totals = (
            ("forward_passes", "Forward passes of the model", counters.steps),
            ("prefilled_tokens", "Prompt tokens computed", counters.prefilled_tokens),
            ("reused_tokens", "Prompt tokens taken from the cache", counters.reused_tokens),
            ("generated_tokens", "Tokens generated, forced ones included", counters.generated_tokens),
            ("evicted_tokens", "Cached tokens given up for others", counters.evicted_tokens),
        )
        for name, text, value in totals:
            yield CounterMetricFamily(f"steerlm_{name}", text, float(value))
