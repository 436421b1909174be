"""`python stub_server.py PORT [IDENTITY]`: a value model that is a checksum, behind the calls the annotator makes.

The value after a text is a checksum of that text, so a single byte of a prompt, a history label or an order that is
wrong shows in the labels. It needs no model and starts at once, so it can be killed often and answers in no time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import zlib
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from steerlm_nemo.attributes import NEMO12_LANG, AttributeSchema
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, SteerLMFormat

FORMAT = SteerLMFormat(EXTRA_ID_TEMPLATE, NEMO12_LANG, "TEXT_TO_VALUE")


def shares(text: str, key: str, schema: AttributeSchema) -> dict[str, float]:
    """What the model believes after `text`, which ends with `key:`. The likeliest value is unique."""
    legal = schema.legal_values(key)
    best = zlib.crc32(text.encode()) % len(legal)
    rest = 0.4 / max(len(legal) - 1, 1)
    return {value: 0.6 if place == best else rest for place, value in enumerate(legal)}


def value(text: str, key: str, schema: AttributeSchema = NEMO12_LANG) -> str:
    return max((found := shares(text, key, schema)), key=found.__getitem__)


def line(prompt: str, given: dict[str, Any], schema: AttributeSchema = NEMO12_LANG) -> tuple[str, dict[str, Any]]:
    text, beliefs = "", {}
    for key in schema.keys():  # noqa: SIM118 - no mapping
        text += f"{',' if text else ''}{key}:"
        if key in given:
            text += str(given[key])
            continue
        probabilities = shares(prompt + text, key, schema)
        chosen = value(prompt + text, key, schema)
        expected = None if key == "lang" else sum(int(v) * p for v, p in probabilities.items())
        beliefs[key] = {"value": chosen, "probabilities": probabilities, "expected": expected, "confidence": 0.6}
        text += chosen
    return text, beliefs


def build_stub(identity: str = "stub-1", served: SteerLMFormat = FORMAT, *, only_generate: bool = False) -> Starlette:
    """`only_generate`: as NeMo's own server, which has no other call and tells nothing."""
    asked: list[Any] = []
    largest = {"now": 0, "most": 0}

    async def attribute_lines(request: Request) -> Response:
        body = await request.json()
        largest["now"] += 1
        largest["most"] = max(largest["most"], largest["now"])
        await asyncio.sleep(0)
        given = body.get("given") or [{}] * len(body["prompts"])
        asked.extend(zip(body["prompts"], given, strict=True))
        found = [line(p, known or {}, served.schema) for p, known in zip(body["prompts"], given, strict=True)]
        largest["now"] -= 1
        return JSONResponse(
            {
                "lines": [text for text, _ in found],
                "num_overruled": [0] * len(found),
                "attributes": [beliefs for _, beliefs in found],
                "model": identity,
            }
        )

    async def generate(request: Request) -> Response:
        body = json.loads(await request.body())
        asked.extend(body["sentences"])
        sentences = []
        for sentence in body["sentences"]:
            key = sentence.rpartition(",")[2].rpartition(served.template.label_start)[2].removesuffix(":")
            sentences.append(sentence + value(sentence, key, served.schema))
        return JSONResponse({"sentences": sentences})

    async def health(request: Request) -> Response:
        return JSONResponse({"ready": True})

    async def format_(request: Request) -> Response:
        return JSONResponse({**served.to_dict(), "identity": identity})

    routes = [Route("/generate", generate, methods=["PUT"]), Route("/health", health)]
    if not only_generate:
        routes += [
            Route("/v1/attribute_lines", attribute_lines, methods=["POST"]),
            Route("/v1/attributes", format_),
        ]
    app = Starlette(routes=routes)
    app.state.asked, app.state.largest = asked, largest
    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(build_stub(*sys.argv[2:]), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical")
