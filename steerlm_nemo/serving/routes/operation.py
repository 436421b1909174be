"""What a route is: a row that names its path, its models and the ability it needs; and what its handler gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from steerlm_nemo.engine.protocol import ModelInfo
from steerlm_nemo.model_kind import ABILITIES_WITHOUT_KIND, CHAT, GENERATE, SteerLMFormat, kinds_that
from steerlm_nemo.serving.front_door import FrontDoor
from steerlm_nemo.serving.http import EngineCalls
from steerlm_nemo.serving.requests.body import Body
from steerlm_nemo.serving.requests.generate import GenerateRequest
from steerlm_nemo.serving.samples.chat import Chat


@dataclass(frozen=True)
class Server:
    """What the handlers of one server share."""

    calls: EngineCalls
    door: FrontDoor
    info: ModelInfo
    chatting: Chat | None  # how the model is chatted with
    started: int  # seconds since 1970
    max_prompts: int  # of one request, times n
    document: Mapping[str, Any]  # what GET /openapi.json answers
    pads_rows: bool  # /generate pads rows that ended early with eos, as the reference does

    def chat(self) -> Chat:
        """Of a model with the ability, as all are that the route is there for."""
        if self.chatting is None:
            raise TypeError(f"model {self.info.name} does not chat")
        return self.chatting

    def format(self) -> SteerLMFormat:
        """Of a model with a kind, as all are that routes with an ability of a kind are there for."""
        if self.info.format is None:
            raise TypeError(f"model {self.info.name} has no kind")
        return self.info.format


@dataclass(frozen=True)
class Operation:
    """A row of the table of routes.

    `body` is the model that a request's body is checked against, `returns` the type of the JSON that is answered (None:
    text of `media_type`) and `streams` that of an event, where a client may ask for a stream. They are what
    GET /openapi.json shows. A model without the `ability` does not have the route.
    """

    methods: tuple[str, ...]
    path: str
    name: str
    summary: str
    answer: Callable[[Server, Request, Any], Awaitable[Response]]
    returns: Any = None
    body: type[Body] | type[GenerateRequest] | None = None
    ability: str | None = None
    streams: Any = None
    statuses: tuple[int, ...] = ()  # besides those that all routes of its sort have
    not_ready: Any = None  # what is answered with 503, where that is no error
    needs_token: bool = True
    media_type: str = "application/json"


def abilities_of(info: ModelInfo, chat: Chat | None) -> frozenset[str]:
    if info.format:
        return info.format.kind.abilities
    return ABILITIES_WITHOUT_KIND | ({CHAT} if chat else frozenset())


def what_it_is(info: ModelInfo) -> str:
    """In a sentence, after "is"."""
    if info.format:
        return info.format.kind.title
    if info.own_template:
        return "a checkpoint with a chat template of its own"
    return "a checkpoint without a kind, which continues text"


def why_absent(operation: Operation, info: ModelInfo, problem: str) -> str:
    """Which models have the route, and what this one is; or the problem with it."""
    if operation.ability == CHAT and problem:
        return f"{operation.path} is not there (POST /v1/completions continues text), for {problem}"
    able = " or ".join(f"{kind.title} ({kind.name})" for kind in kinds_that(operation.ability or ""))
    if operation.ability == CHAT:
        able += " or a checkpoint with a chat template of its own"
        able += " (POST /v1/completions continues text)" if GENERATE in abilities_of(info, None) else ""
    return f"{operation.path} needs {able}; model {info.name} is {what_it_is(info)}"
