"""The calls that the page makes, answered as a test says: it shows what the page does, whatever a server does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG, AttributeSchema
from steerlm_nemo.serving import page

# What a server tells of its model, by what the page is for with it.
CARDS: dict[str, dict[str, Any]] = {
    "steer": {"kind": "steerlm", "title": "a SteerLM model, which responds at attributes", "template": "markers"},
    "chat": {"kind": None, "title": "a checkpoint with a chat template of its own", "template": "own"},
    "plain": {
        "kind": "plain",
        "title": "a model fine-tuned on conversations without attributes",
        "template": "markers",
    },
    "grade": {"kind": "grader", "title": "a value model, which grades by writing", "template": "markers"},
    "continue": {"kind": None, "title": "a checkpoint without a kind, which continues text", "template": None},
    "none": {"kind": "reward", "title": "a pairwise reward model", "template": None},
}
ABILITIES = {
    "steer": ["chat", "generate", "steer"],
    "chat": ["chat", "generate"],
    "plain": ["chat", "generate"],
    "grade": ["generate", "grade", "lines"],
    "continue": ["generate"],
    "none": ["score"],
}


class PageStub:
    """`mode` and `schema` say what is served, `answer` what a request gets; `asked` are the bodies that came."""

    def __init__(self) -> None:
        self.app = Starlette(
            routes=[
                *page.ROUTES,
                Route("/v1/models", self._models),
                Route("/v1/attributes", self._attributes),
                *(
                    Route(path, self._answer, methods=["POST"])
                    for path in ("/v1/chat/completions", "/v1/completions", "/v1/annotate")
                ),
            ]
        )
        self.reset()

    def reset(self) -> None:
        self.mode = "steer"
        self.schema: AttributeSchema = HELPSTEER5
        self.asked: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], Response] = lambda body: said("Yes.")

    async def _models(self, request: Request) -> Response:
        card = {"id": "stub", "context_length": 512, "abilities": ABILITIES[self.mode], **CARDS[self.mode]}
        return JSONResponse({"object": "list", "data": [card]})

    async def _attributes(self, request: Request) -> Response:
        if self.mode not in ("steer", "grade", "plain"):
            return JSONResponse({"message": "it has no template and no attributes"}, 404)
        return JSONResponse({"kind": CARDS[self.mode]["kind"], "schema": self.schema.to_dict(), "digest": "0" * 16})

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        return self.answer(body)


def said(*pieces: str, broken: bool = False, error: str = "", held: bool = False) -> Response:
    """A streamed answer. It may break off, end with an error, or go on without a word until the client leaves."""

    async def events() -> AsyncIterator[str]:
        for piece in pieces:
            yield _event({"choices": [{"delta": {"content": piece}, "text": piece, "finish_reason": None}]})
        if held:
            await asyncio.sleep(60)
        if error:
            yield _event({"error": {"message": error}})
        elif not broken:
            yield _event({"choices": [], "usage": {"completion_tokens": len(pieces)}})
            yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def refused(status: int, message: str, code: str | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "code": code}}, status)


def graded(body: dict[str, Any], schema: AttributeSchema = NEMO12_LANG) -> Response:
    """Every attribute at its highest value, of which the model is sure to 70 %."""
    (conversation,) = body["conversations"]
    attributes, soft = {}, {}
    for key in schema.keys():  # noqa: SIM118 - no mapping
        legal = schema.legal_values(key)
        rest = 0.3 / (len(legal) - 1)
        attributes[key] = legal[-1] if key == "lang" else int(legal[-1])
        soft[key] = {
            "expected": None if key == "lang" else 3.4,
            "probabilities": {value: 0.7 if value == legal[-1] else rest for value in legal},
            "confidence": 0.7,
        }
    conversation["messages"][-1].update(attributes=attributes, attributes_soft=soft)
    return JSONResponse({"conversations": [conversation]})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def past_messages(body: dict[str, Any]) -> Sequence[str]:
    """What a request told the model of earlier turns, and now."""
    return [message["content"] for message in body["messages"]]
