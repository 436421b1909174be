"""The HTTP side of `megatron_gpt_eval`: the index of its routes, and `/generate` as NeMo's clients know it.

    GET /                   the steering page
    PUT, POST /generate     NeMo's text generation request and answer
    POST /v1/chat/completions, /v1/completions; GET /v1/models    as OpenAI's clients use them (see openai_api)
    GET /health             model name, state, tensor parallel size, number type: 200 as long as the process lives
    GET /ready              200 where new requests are served, 503 while the server ends
    GET /metrics            numbers of requests, queue and engine in Prometheus' text format
    GET /openapi.json       all of this for programs
    GET /v1/template        markers and attribute schema of the model (the format kept in its checkpoint), identity
    GET /v1/attributes      the same
    POST /v1/annotate       conversations -> the same with graded turns, by a value model
    POST /v1/attribute_lines   {"prompts": [...], "given": [...]} -> full attribute lines of a value model, values
                            always legal, with probabilities

Every error is JSON, `{"message": "..."}`, or OpenAI's error object where its clients call, with a status that says
whose fault it is. Bodies are never logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from steerlm_nemo.engine.protocol import Completion, Engine, ModelInfo
from steerlm_nemo.engine.worker import EngineWorker
from steerlm_nemo.serving import http as web
from steerlm_nemo.serving.attribute_lines import line_answer, line_samples
from steerlm_nemo.serving.document import document
from steerlm_nemo.serving.front_door import FrontDoor, HttpSettings
from steerlm_nemo.serving.http import json_body, json_response
from steerlm_nemo.serving.page import page
from steerlm_nemo.serving.requests.generate import BadRequest, GenerateRequest
from steerlm_nemo.serving.routes.annotate import annotate_route
from steerlm_nemo.serving.routes.openai import openai_routes


def build_app(
    engine: Engine, *, compat: str | None = None, max_batch_rows: int = 128, http: HttpSettings | None = None
) -> Starlette:
    """The ASGI application. Its lifespan starts and drains the one thread that steps the engine.

    `compat="nemo1.23"` answers failed checks with status 200 and a bare JSON string, ignores unknown keys and pads
    rows that ended early with eos, as the reference does. `app.state.door` is its FrontDoor.
    """
    http = http or HttpSettings()
    worker = EngineWorker(engine, max_batch_rows, http.max_waiting_requests)
    info = engine.info
    calls = web.EngineCalls(worker, info, http.max_prompts)
    door = FrontDoor(worker, engine, http.token)

    described = document(info.name)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    async def generate(request: Request) -> Response:
        try:
            body = GenerateRequest.from_json(await json_body(request), compat, http.max_prompts)
            samples = await asyncio.to_thread(body.samples, info)
        except BadRequest as err:
            if compat and not err.always_400:
                return json_response(str(err))
            raise
        completions = await calls.complete(request, samples)
        return await asyncio.to_thread(lambda: json_response(_answer(body, completions, info, pad=compat is not None)))

    async def attribute_lines(request: Request) -> Response:
        body = await json_body(request)
        samples = await asyncio.to_thread(line_samples, body, info, http.max_prompts)
        return json_response(line_answer(await calls.complete(request, samples), body, info))

    async def health(request: Request) -> Response:
        return json_response(
            {
                "status": door.state,
                "ready": door.state == "ready",
                "model": info.name,
                "tp_size": info.report.get("tp_size"),
                "dtype": info.report.get("dtype"),
                "context_length": info.context_length,
            }
        )

    async def ready(request: Request) -> Response:
        if door.state == "ready":
            return json_response({"ready": True})
        return json_response({"ready": False, "message": f"the server is {door.state}"}, 503, {"Retry-After": "5"})

    async def metrics(request: Request) -> Response:
        return Response(door.metrics(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(request: Request) -> Response:
        return json_response(described)

    async def served_format(request: Request) -> Response:
        if info.format is None:
            raise HTTPException(
                404, f"model {info.name} carries no SteerLM format; it was not trained by scripts/train_gpt_sft.py"
            )
        return json_response({**info.format.to_dict(), "identity": info.identity})

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/generate", generate, methods=["PUT", "POST"]),
            *openai_routes(calls),
            annotate_route(calls),
            Route("/v1/attribute_lines", attribute_lines, methods=["POST"]),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            Route("/v1/template", served_format),
            Route("/v1/attributes", served_format),
        ],
        exception_handlers={
            HTTPException: web.http_error,
            BadRequest: web.bad_request,
            ClientDisconnect: web.client_gone,
            RecursionError: web.too_deep,
            Exception: web.defect,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # its redirects repeat the Host that the client names
    app.state.door, app.state.max_body_bytes = door, http.max_body_bytes
    app.add_middleware(door.around, routes=app.routes)
    return app


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
