"""What a route is: a row that names its path, its models and the ability it needs; and what its handler gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from steerlm_nemo.engine.protocol import ModelInfo
from steerlm_nemo.model_kind import ABILITIES_WITHOUT_KIND, SteerLMFormat, kinds_that
from steerlm_nemo.serving.front_door import FrontDoor
from steerlm_nemo.serving.http import EngineCalls
from steerlm_nemo.serving.requests.body import Body
from steerlm_nemo.serving.requests.generate import GenerateRequest


@dataclass(frozen=True)
class Server:
    """What the handlers of one server share."""

    calls: EngineCalls
    door: FrontDoor
    info: ModelInfo
    started: int  # seconds since 1970
    max_prompts: int  # of one request, times n
    document: Mapping[str, Any]  # what GET /openapi.json answers
    pads_rows: bool  # /generate pads rows that ended early with eos, as the reference does

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


def abilities_of(info: ModelInfo) -> frozenset[str]:
    return info.format.kind.abilities if info.format else ABILITIES_WITHOUT_KIND


def what_it_is(info: ModelInfo) -> str:
    """In a sentence, after "is"."""
    return info.format.kind.title if info.format else "a checkpoint without a kind, which continues text"


def why_absent(operation: Operation, info: ModelInfo) -> str:
    """Which models have the route, and what this one is."""
    able = " or ".join(f"{kind.title} ({kind.name})" for kind in kinds_that(operation.ability or ""))
    return f"{operation.path} needs {able}; model {info.name} is {what_it_is(info)}"
