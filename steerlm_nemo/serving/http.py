"""What all routes share: JSON in and out, errors, server-sent events, and requests that end when a client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from typing_extensions import TypedDict

from steerlm_nemo.engine.protocol import Completion, Sample, TokenMade
from steerlm_nemo.engine.worker import EngineDiedError, EngineWorker, QueueFullError
from steerlm_nemo.serving.requests.body import BadRequest

logger = logging.getLogger("steerlm_nemo.serving")

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it tells the log why the row count is missing
NATIVE_PATHS = ("/v1/template", "/v1/attributes", "/v1/attribute_lines", "/v1/annotate")  # the rest of /v1/ is OpenAI's
# The words OpenAI's clients know; their exception types follow from the status alone.
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Error(TypedDict):
    message: str


class OpenAIErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(TypedDict):
    error: OpenAIErrorObject


Made = list[tuple[int, TokenMade]]  # (place of the sample in its request, its next token)


@dataclass(frozen=True)
class Done:
    completions: list[Completion]


class EngineCalls:
    """The engine as routes call it: until the answer is there or the client has gone."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker

    async def complete(self, request: Request, samples: Sequence[Sample]) -> list[Completion]:
        future = asyncio.wrap_future(self._submit(request, samples, None))
        gone = asyncio.ensure_future(_disconnect(request.receive))
        waits: list[asyncio.Future[Any]] = [future, gone]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise ClientDisconnect
            return _result(future)
        finally:
            gone.cancel()
            future.cancel()  # frees its rows, or its place in the queue

    def stream(self, request: Request, samples: Sequence[Sample]) -> AsyncGenerator[Made | Done]:
        """Tokens as they are made, all that there are at a time; at last the completions.

        The request is in the queue when this returns, so that a full queue is still a status of its own.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, TokenMade] | None] = asyncio.Queue()

        def tell(item: tuple[int, TokenMade] | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.put_nowait, item)

        future = self._submit(request, samples, lambda place, token: tell((place, token)))
        future.add_done_callback(lambda _: tell(None))

        async def events() -> AsyncGenerator[Made | Done]:
            try:
                ended = False
                while not ended:
                    items = [await news.get()]
                    while not news.empty():
                        items.append(news.get_nowait())
                    ended = items[-1] is None
                    if made := [item for item in items if item is not None]:
                        yield made
                yield Done(_result(future))
            finally:
                future.cancel()

        return events()

    def _submit(
        self, request: Request, samples: Sequence[Sample], on_token: Callable[[int, TokenMade], None] | None
    ) -> Future[list[Completion]]:
        request.state.num_rows = len(samples)
        try:
            return self._worker.submit(samples, on_token)
        except QueueFullError:
            raise HTTPException(
                429, f"{self._worker.num_waiting} requests are waiting already; try again later", {"Retry-After": "1"}
            ) from None
        except EngineDiedError as err:
            raise HTTPException(503, str(err), {"Retry-After": "30"}) from err


def _result(future: Any) -> list[Completion]:
    try:
        return future.result()
    except EngineDiedError as err:
        raise HTTPException(503, f"{err}; the server ends", {"Retry-After": "30"}) from err
    except Exception as err:
        raise HTTPException(
            500, "the engine failed on this request; the server's log has the reason. Other requests are served."
        ) from err


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, stopped when the client goes away: Starlette leaves that to the server from ASGI 2.4 on."""

    def __init__(self, events: AsyncGenerator[object]) -> None:
        self._text = _lines(events)
        super().__init__(self._text, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.ensure_future(self.stream_response(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.wait({sending, gone})
            await self._text.aclose()  # it may have been given up between two events
        if not sending.cancelled() and (error := sending.exception()) is not None:
            raise error


async def _lines(events: AsyncGenerator[object]) -> AsyncGenerator[str]:
    try:
        async with aclosing(events):
            async for event in events:
                yield f"data: {json_text(event)}\n\n"
    except HTTPException as err:
        yield error_event(err.status_code, err.detail)
        return
    yield "data: [DONE]\n\n"


async def json_body(request: Request) -> Any:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, f"the content type must be application/json, found {content_type or 'none'!r}")
    limit = request.app.state.max_body_bytes
    promised = request.headers.get("content-length", "0")
    body = bytearray()
    if not promised.isdecimal() or int(promised) <= limit:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                break
        else:
            return _parsed(bytes(body))
    raise HTTPException(413, f"the body is larger than {limit} bytes; send less at a time, or raise http.max_body_mb")


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise BadRequest(f"the body is not JSON: {err}") from err


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def json_response(content: object, status: int = 200, headers: Any = None) -> Response:
    """Compact JSON with sorted keys and a line end, as the reference's framework writes it."""
    return Response(json_text(content) + "\n", status, headers, media_type="application/json")


def json_text(content: object) -> str:
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a probability of zero has the logarithm -inf, which JSON cannot say
        return json.dumps(_finite(content), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


async def client_gone(request: Request, err: Exception) -> Response:
    return error_response(request.url.path, CLIENT_CLOSED_REQUEST, "the client went away")


async def too_deep(request: Request, err: Exception) -> Response:
    return error_response(request.url.path, 400, "the body is nested too deeply")


def error_response(
    path: str, status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
) -> Response:
    """OpenAI's error object where its clients call, NeMo's `message` elsewhere."""
    if speaks_openai(path):
        return json_response(_openai_error(status, message, param, code), status, headers)
    return json_response({"message": message}, status, headers)


def error_event(status: int, message: str) -> str:
    """The last event of a stream that failed, when it is too late for a status: OpenAI's clients raise on it."""
    return f"data: {json_text(_openai_error(status, message))}\n\n"


def speaks_openai(path: str) -> bool:
    return path.startswith("/v1/") and path not in NATIVE_PATHS


def _openai_error(status: int, message: str, param: str | None = None, code: str | None = None) -> OpenAIError:
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
