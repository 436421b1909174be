"""The HTTP side of `megatron_gpt_eval`: `/generate` as NeMo's clients know it, and what our clients read.

    PUT, POST /generate     NeMo's text generation request and answer
    GET /health             model name, readiness, tensor parallel size, number type
    GET /v1/template        markers and attribute schema of the model (the format kept in its checkpoint), identity
    GET /v1/attributes      the same
    POST /v1/attribute_lines   {"prompts": [...], "given": [...]} -> full attribute lines of a value model, values
                            always legal, with probabilities

Every error is JSON, `{"message": "..."}`, with a status that says whose fault it is. Bodies are never logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from steerlm_nemo.serving.lines import line_answer, line_samples
from steerlm_nemo.serving.request import BadRequest, GenerateRequest
from steerlm_nemo.serving.sampling import Completion, Engine, ModelInfo, Sample
from steerlm_nemo.serving.worker import EngineWorker, QueueFullError

logger = logging.getLogger("steerlm_nemo.serving")

MAX_BODY_BYTES = 16 * 2**20
DISCONNECT_POLL_S = 0.5
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it tells the log why the row count is missing


def build_app(
    engine: Engine, *, compat: str | None = None, max_batch_rows: int = 128, max_waiting_requests: int = 256
) -> Starlette:
    """The ASGI application. Its lifespan starts and drains the one thread that calls `engine.generate`.

    `compat="nemo1.23"` answers failed checks with status 200 and a bare JSON string, ignores unknown keys and pads
    rows that ended early with eos, as the reference does.
    """
    worker = EngineWorker(engine, max_batch_rows, max_waiting_requests)
    info = engine.info

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    async def generate(request: Request) -> Response:
        try:
            body = GenerateRequest.from_json(await _json_body(request), compat)
            samples = await asyncio.to_thread(body.samples, info)
        except BadRequest as err:
            if compat and not err.always_400:
                return _json(str(err))
            raise HTTPException(400, str(err)) from err
        completions = await complete(request, samples)
        return await asyncio.to_thread(lambda: _json(_answer(body, completions, info, pad=compat is not None)))

    async def attribute_lines(request: Request) -> Response:
        try:
            body = await _json_body(request)
            samples = await asyncio.to_thread(line_samples, body, info)
        except BadRequest as err:
            raise HTTPException(400, str(err)) from err
        return _json(line_answer(await complete(request, samples), body, info))

    async def complete(request: Request, samples: Sequence[Sample]) -> list[Completion]:
        request.state.num_rows = len(samples)
        try:
            future = asyncio.wrap_future(worker.submit(samples))
        except QueueFullError:
            raise HTTPException(
                429, f"{worker.num_waiting} requests are waiting already; try again later", {"Retry-After": "1"}
            ) from None
        while not (await asyncio.wait({future}, timeout=DISCONNECT_POLL_S))[0]:
            if await request.is_disconnected():
                future.cancel()  # frees its place in the queue; a batch already running goes on for the others
                raise HTTPException(CLIENT_CLOSED_REQUEST, "the client went away")
        try:
            return future.result()
        except Exception as err:
            raise HTTPException(
                500, "the engine failed on this request; the server's log has the reason. Other requests are served."
            ) from err

    async def health(request: Request) -> Response:
        return _json(
            {
                "status": "ready",
                "ready": True,
                "model": info.name,
                "tp_size": info.report.get("tp_size"),
                "dtype": info.report.get("dtype"),
                "context_length": info.context_length,
            }
        )

    async def served_format(request: Request) -> Response:
        if info.format is None:
            raise HTTPException(
                404, f"model {info.name} carries no SteerLM format; it was not trained by scripts/train_gpt_sft.py"
            )
        return _json({**info.format.to_dict(), "identity": info.identity})

    app = Starlette(
        routes=[
            Route("/generate", generate, methods=["PUT", "POST"]),
            Route("/v1/attribute_lines", attribute_lines, methods=["POST"]),
            Route("/health", health),
            Route("/v1/template", served_format),
            Route("/v1/attributes", served_format),
        ],
        exception_handlers={HTTPException: _error, ClientDisconnect: _gone, Exception: _defect},
        lifespan=lifespan,
    )
    app.add_middleware(_AccessLog)
    return app


async def _json_body(request: Request) -> Any:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, f"the content type must be application/json, found {content_type or 'none'!r}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise BadRequest(f"the body is not JSON: {err}") from err


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _answer(
    body: GenerateRequest, completions: Sequence[Completion], info: ModelInfo, *, pad: bool
) -> dict[str, object]:
    tokenizer = info.tokenizer
    rows = [list(completion.token_ids) for completion in completions]
    if pad:
        longest = max(len(row) for row in rows)
        rows = [row + [tokenizer.eos_id] * (longest - len(row)) for row in rows]
    tokens = [[tokenizer.id_to_piece(token_id) for token_id in row] for row in rows]
    special = {tokenizer.bos_id, tokenizer.eos_id}
    answer: dict[str, object] = {
        "sentences": [
            sentence + completion_text(completion, info)
            for sentence, completion in zip(body.sentences, completions, strict=True)
        ],
        "tokens": tokens,
        "token_ids": rows,
        "logprob": [completion.logprob for completion in completions] if body.compute_logprob else None,
        "offsets": [_offsets(row, pieces, special) for row, pieces in zip(rows, tokens, strict=True)],
    }
    if body.all_probs:
        answer["full_logprob"] = [completion.full_logprob for completion in completions]
    return answer


def completion_text(completion: Completion, info: ModelInfo) -> str:
    """What the generated tokens add to the decoded prompt.

    Clients cut `len(prompt)` characters off a sentence, so the answer must begin with the prompt as it was sent.
    Decoding everything together gives that only if the tokenizer round-trips: Hugging Face drops special tokens.
    """
    ids = list(completion.token_ids)
    prompt = info.tokenizer.decode(ids[: completion.num_prompt_tokens])
    return info.tokenizer.decode(ids)[len(prompt) :]


def _offsets(token_ids: Sequence[int], pieces: Sequence[str], special: set[int | None]) -> list[int]:
    """Start of each piece when the pieces are joined, special pieces counting nothing (the reference's offsets)."""
    offsets, position = [], 0
    for token_id, piece in zip(token_ids, pieces, strict=True):
        offsets.append(position)
        position += 0 if token_id in special else len(piece)
    return offsets


def _json(content: object, status: int = 200, headers: Any = None) -> Response:
    """Compact JSON with sorted keys and a line end, as the reference's framework writes it."""
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a probability of zero has the logarithm -inf, which JSON cannot say
        text = json.dumps(_finite(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return Response(text + "\n", status, headers, media_type="application/json")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


async def _error(request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    return _json({"message": err.detail}, err.status_code, err.headers)


async def _gone(request: Request, err: Exception) -> Response:
    return _json({"message": "the client went away"}, CLIENT_CLOSED_REQUEST)


async def _defect(request: Request, err: Exception) -> Response:
    return _json({"message": "Internal Server Error"}, 500)


_Send = Callable[[Any], Awaitable[None]]


class _AccessLog:
    """One line per request: method, path, status, milliseconds, rows. Never a body, an address or a query."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        state = scope.setdefault("state", {})

        async def watch(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            duration_ms = (time.perf_counter() - start) * 1000
            rows = f" rows={state['num_rows']}" if "num_rows" in state else ""
            logger.info("%s %s %d %.1f ms%s", scope["method"], scope["path"], status, duration_ms, rows)
