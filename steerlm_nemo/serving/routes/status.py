"""What a server tells of itself: alive, ready, numbers, the format of its model, and its routes."""

from __future__ import annotations

from typing import Any, Literal

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import NotRequired, TypedDict

from steerlm_nemo.serving.http import json_response
from steerlm_nemo.serving.routes.operation import Server, what_it_is


class Health(TypedDict):
    status: Literal["ready", "draining", "failed"]
    ready: bool
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
    report = server.info.report
    answer: Health = {
        "status": server.door.state,
        "ready": server.door.state == "ready",
        "model": server.info.name,
        "tp_size": report.get("tp_size"),
        "dtype": report.get("dtype"),
        "context_length": server.info.context_length,
    }
    return json_response(answer)


async def ready(server: Server, request: Request, body: None) -> Response:
    if server.door.state == "ready":
        return json_response({"ready": True})
    return json_response({"ready": False, "message": f"the server is {server.door.state}"}, 503, {"Retry-After": "5"})


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
