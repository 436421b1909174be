"""What a server tells of itself: alive, ready, numbers, the format of its model, and its routes."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import NotRequired, TypedDict

from steerlm_nemo.serving.front_door import State
from steerlm_nemo.serving.http import json_response
from steerlm_nemo.serving.routes.operation import Server, what_it_is


class Health(TypedDict):
    """`message` says why the server is not ready."""

    status: State
    ready: bool
    message: NotRequired[str]
    model: str
    tp_size: int | None
    dtype: str | None
    context_length: int


class Ready(TypedDict):
    ready: bool
    message: NotRequired[str]


class ServedAttribute(TypedDict):
    name: str
    minimum: int
    maximum: int
    default: int


class ServedSchema(TypedDict):
    name: str
    attributes: list[ServedAttribute]
    languages: list[str]


class Format(TypedDict):
    """The format kept in the checkpoint, and the identity of the weights."""

    version: int
    kind: str
    template: dict[str, str]
    schema: ServedSchema
    digest: str
    identity: str


async def health(server: Server, request: Request, body: None) -> Response:
    report, state = server.info.report, server.door.state
    answer: Health = {
        "status": state,
        "ready": state == "ready",
        "model": server.info.name,
        "tp_size": report.get("tp_size"),
        "dtype": report.get("dtype"),
        "context_length": server.info.context_length,
    }
    if state == "ready":
        return json_response(answer)
    answer["message"] = server.door.why_not_ready
    # A server that is ending is well.
    return json_response(answer) if state == "draining" else json_response(answer, 503, {"Retry-After": "5"})


async def ready(server: Server, request: Request, body: None) -> Response:
    if server.door.state == "ready":
        return json_response({"ready": True})
    return json_response({"ready": False, "message": server.door.why_not_ready}, 503, {"Retry-After": "5"})


async def metrics(server: Server, request: Request, body: None) -> Response:
    return Response(server.door.metrics(), media_type=CONTENT_TYPE_LATEST)


async def served_format(server: Server, request: Request, body: None) -> Response:
    info = server.info
    if info.format is None:
        raise HTTPException(404, f"model {info.name} is {what_it_is(info)}: it has no template and no attributes")
    answer: dict[str, Any] = {**info.format.to_dict(), "identity": info.identity}
    return json_response(answer)


async def openapi(server: Server, request: Request, body: None) -> Response:
    return json_response(server.document)
