"""A value model that is a checksum, behind the calls the annotator makes.

`python stub_server.py PORT SHARE LOG` answers a share of the model calls with a fault, and notes each fault in LOG.

The value after a text is a checksum of that text, so a single byte of a prompt, a history label or an order that is
wrong shows in the labels. It needs no model and starts at once, so it can be killed often and answers in no time.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from steerlm_nemo.attributes import NEMO12_LANG, AttributeSchema
from steerlm_nemo.model_kind import GRADER, MODEL_HEADER, STEERLM, SteerLMFormat
from steerlm_nemo.template import EXTRA_ID_TEMPLATE

CLIENT_TIMEOUT_S = 1.0  # of the tests that run behind faults
FORMAT = SteerLMFormat(EXTRA_ID_TEMPLATE, NEMO12_LANG, GRADER)
STEERED = SteerLMFormat(EXTRA_ID_TEMPLATE, NEMO12_LANG, STEERLM)


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


def response(prompt: str) -> str:
    return f"It is {zlib.crc32(prompt.encode())}."


def build_stub(
    identity: str = "stub-1",
    served: SteerLMFormat = FORMAT,
    *,
    only_generate: bool = False,
    tells_beliefs: bool = True,
    tells_model: bool = True,
    salt: str = "",
    pause_s: float = 0.0,
    dies_after: int | None = None,
    longest: int = 4000,
) -> Starlette:
    """A value model, or a SteerLM model that answers a prompt with its checksum.

    `only_generate`: as NeMo's own server, which has no other call and tells nothing. `tells_model`: its answers name
    their model. `salt`: makes it another model. `dies_after`: answers 503 to everything after so many model calls.
    `longest`: characters of a prompt that are accepted.
    """
    asked: list[Any] = []

    def is_dead() -> bool:
        return dies_after is not None and len(asked) >= dies_after

    def gone() -> Response:
        return JSONResponse({"message": "the server is ending"}, 503)

    def answered(content: Any) -> Response:
        return JSONResponse(
            content, headers={MODEL_HEADER: app.state.identity} if tells_model and not only_generate else {}
        )

    largest = {"now": 0, "most": 0}

    async def attribute_lines(request: Request) -> Response:
        if is_dead():
            return gone()
        body = await request.json()
        largest["now"] += 1
        largest["most"] = max(largest["most"], largest["now"])
        await asyncio.sleep(pause_s)
        given = body.get("given") or [{}] * len(body["prompts"])
        asked.extend(zip(body["prompts"], given, strict=True))
        found = [line(salt + p, known or {}, served.schema) for p, known in zip(body["prompts"], given, strict=True)]
        largest["now"] -= 1
        return answered(
            {
                "lines": [text for text, _ in found],
                "num_overruled": [0] * len(found),
                "attributes": [beliefs for _, beliefs in found] if tells_beliefs else None,
                "model": app.state.identity if tells_model else None,
            }
        )

    async def generate(request: Request) -> Response:
        if is_dead():
            return gone()
        body = json.loads(await request.body())
        if (most := max(map(len, body["sentences"]))) > longest:
            return JSONResponse({"message": f"sentences has one of {most} characters; {longest} are accepted"}, 400)
        asked.extend(body["sentences"])
        await asyncio.sleep(pause_s)
        sentences = []
        for sentence in body["sentences"]:
            if served.kind is STEERLM:
                sentences.append(sentence + response(salt + sentence))
                continue
            key = sentence.rpartition(",")[2].rpartition(served.template.label_start)[2].removesuffix(":")
            sentences.append(sentence + value(salt + sentence, key, served.schema))
        return answered({"sentences": sentences})

    async def health(request: Request) -> Response:
        return gone() if is_dead() else JSONResponse({"ready": True})

    async def format_(request: Request) -> Response:
        return gone() if is_dead() else answered({**served.to_dict(), "identity": app.state.identity})

    routes = [Route("/generate", generate, methods=["PUT"]), Route("/health", health)]
    if not only_generate:
        routes += [
            Route("/v1/attribute_lines", attribute_lines, methods=["POST"]),
            Route("/v1/attributes", format_),
        ]
    app = Starlette(routes=routes)
    app.state.identity, app.state.asked, app.state.largest = identity, asked, largest
    return app


class Swapped:
    """Behind one address the first server, and the second from the `after`th answer of the first on."""

    def __init__(self, first: Starlette, second: Starlette, after: int) -> None:
        self._first, self._second, self._after = first, second, after

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._second if len(self._first.state.asked) >= self._after else self._first
        await app(scope, receive, send)


class Faults:
    """Middleware: answers that really come from networks and servers in trouble, instead of the right one."""

    KINDS = ("500", "502 html", "cut json", "broken connection", "timeout", "other json")

    def __init__(self, app: Any, share: float, log: Path) -> None:
        self._app, self._share, self._log = app, share, log
        self._chance = random.Random(time.time_ns())  # a server that was killed must not repeat its faults

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/v1/attribute_lines" or self._chance.random() >= self._share:
            await self._app(scope, receive, send)
            return
        kind = self._chance.choice(self.KINDS)
        with self._log.open("a") as file:
            file.write(kind + "\n")
        parts: list[Any] = []

        async def collect(message: Any) -> None:
            parts.append(message)

        await self._app(scope, receive, collect)
        answer = b"".join(part.get("body", b"") for part in parts)
        status, kept = 200, answer
        if kind == "500":
            status, kept = 500, b'{"message": "Internal Server Error"}'
        elif kind == "502 html":
            status, kept = 502, b"<html>Bad Gateway</html>"
        elif kind == "cut json":
            kept = answer[: len(answer) // 2]
        elif kind == "other json":
            kept = b'{"lines": []}'
        elif kind == "timeout":
            await asyncio.sleep(CLIENT_TIMEOUT_S * 1.5)
        promised = len(answer) if kind == "broken connection" else len(kept)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(promised).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if kind == "broken connection":
            await send({"type": "http.response.body", "body": answer[:10], "more_body": True})
            raise ConnectionResetError
        await send({"type": "http.response.body", "body": kept})


def main() -> None:
    import uvicorn

    port, share, log = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    uvicorn.run(Faults(build_stub(), share, log), host="127.0.0.1", port=port, log_level="critical")


if __name__ == "__main__":
    main()
