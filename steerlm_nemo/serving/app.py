"""The ASGI application of a server: the routes that its model can answer, behind the front door.

Every error is JSON, `{"message": "..."}`, or OpenAI's error object where its clients call, with a status that says
whose fault it is. Bodies are never logged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from steerlm_nemo.engine.protocol import Engine, ModelInfo
from steerlm_nemo.engine.watch import Patience
from steerlm_nemo.engine.worker import EngineWorker
from steerlm_nemo.errors import InputError
from steerlm_nemo.model_kind import MODEL_HEADER
from steerlm_nemo.serving import http as answers
from steerlm_nemo.serving import page
from steerlm_nemo.serving.front_door import FrontDoor, HttpSettings
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.routes.document import document
from steerlm_nemo.serving.routes.operation import Operation, Server, abilities_of, why_absent
from steerlm_nemo.serving.routes.table import TABLE, TABLE_NEMO123, for_chat
from steerlm_nemo.serving.samples.chat import Chat, chat_of

logger = logging.getLogger("steerlm_nemo.serving")


def build_app(
    engine: Engine, *, http: HttpSettings, max_batch_rows: int, patience: Patience, compat: str | None = None
) -> Starlette:
    """Its lifespan starts and drains the one thread that steps the engine. `app.state.server` is what its routes share.

    `compat="nemo1.23"` answers failed checks of /generate with status 200 and a bare JSON string, ignores unknown keys
    and pads rows that ended early with eos, as the reference does.
    """
    worker = EngineWorker(engine, max_batch_rows, http.max_waiting_requests, patience)
    info = engine.info
    door = FrontDoor(worker, engine, http.token)
    chat, problem = _chat_of(info)
    table = [for_chat(row, chat) for row in (TABLE_NEMO123 if compat else TABLE)]
    operations = [row for row in table if row.ability is None or row.ability in abilities_of(info, chat)]
    absent = {row.path: why_absent(row, info, problem) for row in table if row not in operations}
    server = Server(
        answers.EngineCalls(worker),
        door,
        info,
        chat,
        int(time.time()),
        http.max_prompts,
        document(operations, info),
        pads_rows=compat is not None,
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)
        if chat:
            chat.close()

    async def http_error(request: Request, err: Any) -> Response:
        path = request.url.path
        if err.status_code == 404 and path in absent:
            return answers.error_response(path, 404, absent[path], "model", "not_of_this_kind")
        return answers.error_response(path, err.status_code, str(err.detail), headers=err.headers)

    async def bad_request(request: Request, err: Any) -> Response:
        if compat and request.url.path == "/generate" and not err.always_400:
            return answers.json_response(str(err))
        return answers.error_response(request.url.path, err.status, str(err), err.param, err.code)

    app = Starlette(
        routes=[*page.ROUTES, *(_route(operation, server) for operation in operations)],
        exception_handlers={
            HTTPException: http_error,
            BadRequest: bad_request,
            ClientDisconnect: answers.client_gone,
            RecursionError: answers.too_deep,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # its redirects repeat the Host that the client names
    app.state.server, app.state.max_body_bytes = server, http.max_body_bytes
    app.add_middleware(door.around, routes=app.routes)
    if http.cors_allow_origins:
        # Around the door: what it refuses is for the page to read, too, and a preflight has no token. Any header, as
        # clients have some of their own; no cookies, so that a page sends a token only if it has been given one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.cors_allow_origins,
            allow_methods=("GET", "PUT", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After", MODEL_HEADER),
        )
    return app


def _chat_of(info: ModelInfo) -> tuple[Chat | None, str]:
    """How the model is chatted with, or why it is not although it brings a template; then the rest is served."""
    try:
        return chat_of(info), ""
    except InputError as err:
        logger.warning("no chat with model %s: %s", info.name, err)
        return None, str(err)


def _route(operation: Operation, server: Server) -> Route:
    # Names of models may have a slash.
    return Route(
        operation.path.replace("{model}", "{model:path}"),
        _endpoint(operation, server),
        methods=list(operation.methods),
        name=operation.name,
    )


def _endpoint(operation: Operation, server: Server) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        body = None
        if operation.body is not None:
            body = operation.body.from_json(await answers.json_body(request), server.max_prompts)
        return await operation.answer(server, request, body)

    return answer
