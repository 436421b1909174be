"""GET /openapi.json: the table of routes, with the schemas of the very models that check requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema
from typing_extensions import TypedDict

from steerlm_nemo.engine.protocol import ModelInfo
from steerlm_nemo.serving.http import Error, OpenAIError, speaks_openai
from steerlm_nemo.serving.routes.operation import Operation, what_it_is


class Document(TypedDict):
    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]
    security: list[dict[str, Any]]


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
_WITH_BODY = (400, 413, 415, 429, 500)
_BEHIND_THE_DOOR = (401, 503)


def document(operations: Sequence[Operation], info: ModelInfo) -> Document:
    """The OpenAPI 3.1 document of a server that has these routes."""
    types = {kind: TypeAdapter(kind) for operation in operations for kind in _types_of(operation)}
    schemas, parts = TypeAdapter.json_schemas(
        [(kind, "validation", adapter) for kind, adapter in types.items()],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schemas,
    )
    schema_of = {kind: schema for (kind, _), schema in schemas.items()}
    paths: dict[str, Any] = {}
    for operation in operations:
        for method in operation.methods:
            told = _described(operation, schema_of)
            # Names of operations are unique: the first method has the plain one.
            told["operationId"] += "" if method == operation.methods[0] else f"_by_{method.lower()}"
            paths.setdefault(operation.path, {})[method.lower()] = told
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"SteerLM server of {info.name}",
            "version": version("steerlm-nemo"),
            "description": f"The model is {what_it_is(info)}; routes that it cannot answer are not there. "
            "docs/serving.md explains every endpoint.",
            "x-model-kind": info.format.kind.name if info.format else None,
        },
        "paths": paths,
        "components": {
            "schemas": parts["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _types_of(operation: Operation) -> Iterable[Any]:
    found = (operation.body, operation.returns, operation.streams, operation.not_ready, _error_of(operation))
    return (kind for kind in found if kind is not None)


def _error_of(operation: Operation) -> Any:
    return OpenAIError if speaks_openai(operation.path) else Error


def _described(operation: Operation, schema_of: Mapping[Any, JsonSchemaValue]) -> dict[str, Any]:
    text = {"type": "string"}
    content: dict[str, Any] = {
        operation.media_type: {"schema": schema_of[operation.returns] if operation.returns else text}
    }
    if operation.streams:
        content["text/event-stream"] = {
            "schema": text,
            "x-event-schema": schema_of[operation.streams],
            "example": "data: {...}\n\ndata: [DONE]\n\n",
        }
    statuses = {
        *operation.statuses,
        *(_WITH_BODY if operation.body else ()),
        *(_BEHIND_THE_DOOR if operation.needs_token else ()),
    }
    told: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            "200": {"description": "OK", "content": content},
            **{
                str(status): {
                    "description": _STATUSES[status],
                    "content": {
                        "application/json": {
                            "schema": schema_of[
                                operation.not_ready if status == 503 and operation.not_ready else _error_of(operation)
                            ]
                        }
                    },
                }
                for status in sorted(statuses)
            },
        },
    }
    if operation.body:
        told["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[operation.body]}},
        }
    if "{model}" in operation.path:
        told["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": text}]
    if not operation.needs_token:
        told["security"] = []
    return told


class _Schemas(GenerateJsonSchema):
    """Without what repeats a name; answers have no other keys than those of their type."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def str_schema(self, schema: core_schema.StringSchema) -> JsonSchemaValue:
        told = super().str_schema(schema)
        return {key: value for key, value in told.items() if (key, value) != ("minLength", 0)}

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        told = super().default_schema(schema)
        return {key: value for key, value in told.items() if (key, value) != ("default", None)}

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        return {key: value for key, value in super().model_schema(schema).items() if key != "title"}

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        told = super().typed_dict_schema(schema)
        return {**{key: value for key, value in told.items() if key != "title"}, "additionalProperties": False}
