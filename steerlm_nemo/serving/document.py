"""GET /openapi.json: every route, with the schemas that requests are checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from steerlm_nemo.model_kind import KINDS
from steerlm_nemo.serving.requests.checking import Schema
from steerlm_nemo.serving.requests.openai import CHAT, COMPLETION
from steerlm_nemo.serving.routes.annotate import ANNOTATE

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(optional: Mapping[str, Schema] | None = None, /, **required: Schema) -> Schema:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


GENERATE: Schema = {
    "type": "object",
    "properties": {
        "sentences": {"type": "array", "minItems": 1, "items": TEXT},
        "tokens_to_generate": {"type": "integer", "minimum": 1, "default": 64},
        "all_probs": {**FLAG, "default": False},
        "temperature": {"type": "number", "exclusiveMinimum": 0, "maximum": 100, "default": 1},
        "add_BOS": {**FLAG, "default": False},
        "greedy": {**FLAG, "default": False},
        "top_k": {"type": "integer", "minimum": 0, "default": 0},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.9},
        "repetition_penalty": {"type": "number", "minimum": 1, "default": 1},
        "end_strings": {"type": "array", "items": {"type": "string", "minLength": 1}, "default": ["<|endoftext|>"]},
        "min_tokens_to_generate": {**COUNT, "default": 0},
        "neighbors": {"enum": [None, 0], "description": "Of retrieval models, which are not served."},
        "compute_logprob": {**FLAG, "default": False},
        "random_seed": {"anyOf": [{**COUNT, "maximum": 2**63 - 1}, {"type": "null"}], "default": None},
    },
    "required": ["sentences"],
    "additionalProperties": False,
}
ATTRIBUTE_LINES: Schema = {
    "type": "object",
    "properties": {
        "prompts": {"type": "array", "minItems": 1, "items": TEXT},
        "given": {"anyOf": [{"type": "array", "items": {"type": ["object", "null"]}}, {"type": "null"}]},
    },
    "required": ["prompts"],
    "additionalProperties": False,
}

_USAGE = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
_ENDS: Schema = {"enum": ["stop", "length"]}
_HEAD: dict[str, Schema] = {"id": TEXT, "created": COUNT, "model": TEXT, "system_fingerprint": _maybe(TEXT)}
_VALUES: Schema = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
_SPELT: dict[str, Schema] = {
    "token": TEXT,
    "bytes": _list({"type": "integer", "minimum": 0, "maximum": 255}),
    "logprob": NUMBER,
}
_CHAT_LOGPROBS = _maybe(
    _object(content=_list(_object(**_SPELT, top_logprobs=_list(_object(**_SPELT)))), refusal={"type": "null"})
)
_COMPLETION_LOGPROBS = _maybe(
    _object(
        tokens=_list(TEXT),
        token_logprobs=_list(NUMBER),
        top_logprobs=_list({"type": "object", "additionalProperties": NUMBER}),
        text_offset=_list(COUNT),
    )
)
_BELIEF = _object(
    {"value": {"type": ["integer", "string"]}, "logprob": NUMBER},
    probabilities={"type": "object", "additionalProperties": NUMBER},
    expected=_maybe(NUMBER),
    confidence=NUMBER,
)
_MODEL = _object(
    id=TEXT,
    object={"enum": ["model"]},
    created=COUNT,
    owned_by=TEXT,
    context_length=COUNT,
    kind=_maybe(TEXT),
)

SCHEMAS: dict[str, Schema] = {
    "GenerateRequest": GENERATE,
    "GenerateAnswer": _object(
        {"full_logprob": _list(_list(_list(_maybe(NUMBER))))},
        sentences=_list(TEXT),
        tokens=_list(_list(TEXT)),
        token_ids=_list(_list(COUNT)),
        logprob=_maybe(_list(_list(_maybe(NUMBER)))),
        offsets=_list(_list(COUNT)),
    ),
    "ChatRequest": CHAT,
    "ChatAnswer": _object(
        **_HEAD,
        object={"enum": ["chat.completion"]},
        attributes=_VALUES,
        choices=_list(
            _object(
                index=COUNT,
                finish_reason=_ENDS,
                message=_object(role={"enum": ["assistant"]}, content=TEXT, refusal={"type": "null"}),
                logprobs=_CHAT_LOGPROBS,
            )
        ),
        usage=_USAGE,
    ),
    "ChatChunk": _object(
        {"usage": _maybe(_USAGE)},
        **_HEAD,
        object={"enum": ["chat.completion.chunk"]},
        attributes=_VALUES,
        choices=_list(
            _object(
                index=COUNT,
                finish_reason=_maybe(_ENDS),
                delta=_object({"role": {"enum": ["assistant"]}, "content": TEXT}),
                logprobs=_CHAT_LOGPROBS,
            )
        ),
    ),
    "CompletionRequest": COMPLETION,
    "CompletionAnswer": _object(
        **_HEAD,
        object={"enum": ["text_completion"]},
        choices=_list(_object(index=COUNT, finish_reason=_ENDS, text=TEXT, logprobs=_COMPLETION_LOGPROBS)),
        usage=_USAGE,
    ),
    "CompletionChunk": _object(
        {"usage": _maybe(_USAGE)},
        **_HEAD,
        object={"enum": ["text_completion"]},
        choices=_list(_object(index=COUNT, finish_reason=_maybe(_ENDS), text=TEXT, logprobs=_COMPLETION_LOGPROBS)),
    ),
    "Model": _MODEL,
    "Models": _object(object={"enum": ["list"]}, data=_list(_MODEL)),
    "AnnotateRequest": ANNOTATE,
    "AnnotateAnswer": _object(
        conversations=_list(ANY_OBJECT),
        model={**TEXT, "description": "Identity of the model that graded."},
        num_turns=COUNT,
        num_overruled={**COUNT, "description": "Values where the model's first choice was not legal."},
    ),
    "AttributeLinesRequest": ATTRIBUTE_LINES,
    "AttributeLinesAnswer": _object(
        lines=_list(TEXT),
        num_overruled=_list(COUNT),
        attributes=_list({"type": "object", "additionalProperties": _BELIEF}),
        model=TEXT,
    ),
    "Format": _object(
        version=COUNT,
        kind={"enum": list(KINDS)},
        template={"type": "object", "additionalProperties": TEXT},
        schema=_object(
            name=TEXT,
            attributes=_list(
                _object(
                    name=TEXT,
                    minimum={"type": "integer"},
                    maximum={"type": "integer"},
                    default={"type": "integer"},
                )
            ),
            languages=_list(TEXT),
        ),
        digest=TEXT,
        identity=TEXT,
    ),
    "Health": _object(
        status={"enum": ["ready", "draining", "failed"]},
        ready=FLAG,
        model=TEXT,
        tp_size=_maybe(COUNT),
        dtype=_maybe(TEXT),
        context_length=COUNT,
    ),
    "Ready": _object({"message": TEXT}, ready=FLAG),
    "Document": _object(
        openapi=TEXT, info=ANY_OBJECT, paths=ANY_OBJECT, components=ANY_OBJECT, security=_list(ANY_OBJECT)
    ),
    "Error": _object(message=TEXT),
    "OpenAIError": _object(error=_object(message=TEXT, type=TEXT, param=_maybe(TEXT), code=_maybe(TEXT))),
}

_STATUSES = {
    400: "The request has to change; the message says how.",
    401: "The token is missing or wrong.",
    404: "No such model, or no such thing of this model.",
    413: "The body is larger than http.max_body_mb.",
    415: "The content type is not application/json.",
    429: "As many requests are waiting as may; Retry-After says when to come back.",
    500: "The server is at fault; its log has the reason.",
    503: "The server is ending or not ready; Retry-After says when to come back.",
}
_ON_BODIES = (400, 413, 415, 429, 500)


def _operation(
    name: str,
    summary: str,
    answer: str | None,
    request: str | None = None,
    *,
    errors: Sequence[int] = (),
    error: str = "Error",
    chunk: str | None = None,
    media_type: str = "application/json",
    parameters: Sequence[Mapping[str, Any]] = (),
    is_open: bool = False,
    not_ready: str | None = None,
) -> dict[str, Any]:
    content: dict[str, Any] = {media_type: {"schema": _ref(answer) if answer else TEXT}}
    if chunk:
        content["text/event-stream"] = {
            "schema": TEXT,
            "x-event-schema": _ref(chunk),
            "example": "data: {...}\n\ndata: [DONE]\n\n",
        }
    statuses = [*errors, *(_ON_BODIES if request else ()), *(() if is_open else (401, 503))]
    responses = {
        str(status): {
            "description": _STATUSES[status],
            "content": {"application/json": {"schema": _ref(not_ready if status == 503 and not_ready else error)}},
        }
        for status in sorted(set(statuses))
    }
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "OK", "content": content}, **responses},
    }
    if request:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    if parameters:
        operation["parameters"] = list(parameters)
    if is_open:
        operation["security"] = []
    return operation


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def document(name: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server of the model `name`."""
    generate = ("Continue every sentence, as NeMo's text generation server does", "GenerateAnswer", "GenerateRequest")
    openai: dict[str, Any] = {"error": "OpenAIError"}
    one_model = [{"name": "model", "in": "path", "required": True, "schema": TEXT}]
    paths = {
        "/generate": {"put": _operation("generate", *generate), "post": _operation("generate_by_post", *generate)},
        "/v1/chat/completions": {
            "post": _operation(
                "chat",
                "A response at the requested attribute values",
                "ChatAnswer",
                "ChatRequest",
                chunk="ChatChunk",
                errors=(404,),
                **openai,
            )
        },
        "/v1/completions": {
            "post": _operation(
                "complete",
                "Continue text as it is",
                "CompletionAnswer",
                "CompletionRequest",
                chunk="CompletionChunk",
                errors=(404,),
                **openai,
            )
        },
        "/v1/models": {"get": _operation("models", "The served model, as a list of one", "Models", **openai)},
        "/v1/models/{model}": {
            "get": _operation("model", "The served model", "Model", errors=(404,), parameters=one_model, **openai)
        },
        "/v1/annotate": {
            "post": _operation(
                "annotate", "Grade conversations with a value model", "AnnotateAnswer", "AnnotateRequest"
            )
        },
        "/v1/attribute_lines": {
            "post": _operation(
                "attribute_lines",
                "A full attribute line after each prompt, by a value model",
                "AttributeLinesAnswer",
                "AttributeLinesRequest",
            )
        },
        "/v1/attributes": {
            "get": _operation("attributes", "Markers and attribute schema of the model", "Format", errors=(404,))
        },
        "/v1/template": {"get": _operation("template", "The same as /v1/attributes", "Format", errors=(404,))},
        "/health": {"get": _operation("health", "The process lives; what it serves", "Health", is_open=True)},
        "/ready": {
            "get": _operation(
                "ready", "New requests are served", "Ready", is_open=True, errors=(503,), not_ready="Ready"
            )
        },
        "/metrics": {
            "get": _operation("metrics", "Numbers for Prometheus", None, media_type="text/plain; version=1.0.0")
        },
        "/openapi.json": {"get": _operation("openapi", "This document", "Document")},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"SteerLM server of {name}",
            "version": version("steerlm-nemo"),
            "description": "In bodies of /v1/, null counts as left out. docs/serving.md explains every endpoint.",
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }
