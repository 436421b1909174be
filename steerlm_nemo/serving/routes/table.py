"""The routes of a server, a row each. The page at `/` is for people and stands beside them."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client import CONTENT_TYPE_LATEST

from steerlm_nemo.model_kind import CHAT, GENERATE, LINES
from steerlm_nemo.serving.requests.generate import GenerateRequest, Nemo123Request
from steerlm_nemo.serving.requests.grading import AnnotateRequest, AttributeLinesRequest
from steerlm_nemo.serving.requests.openai import ChatRequest, CompletionRequest
from steerlm_nemo.serving.routes import openai, status
from steerlm_nemo.serving.routes.annotate import AnnotateAnswer, annotate
from steerlm_nemo.serving.routes.attribute_lines import AttributeLinesAnswer, attribute_lines
from steerlm_nemo.serving.routes.document import Document
from steerlm_nemo.serving.routes.generate import GenerateAnswer, generate
from steerlm_nemo.serving.routes.operation import Operation
from steerlm_nemo.serving.samples.chat import Chat

TABLE = (
    Operation(
        ("PUT", "POST"),
        "/generate",
        "generate",
        "Continue every sentence, as NeMo's text generation server does",
        generate,
        GenerateAnswer,
        GenerateRequest,
        GENERATE,
    ),
    Operation(
        ("POST",),
        "/v1/chat/completions",
        "chat",
        "A response to a conversation",
        openai.chat,
        openai.ChatAnswer,
        ChatRequest,
        CHAT,
        streams=openai.ChatChunk,
        statuses=(404,),
    ),
    Operation(
        ("POST",),
        "/v1/completions",
        "complete",
        "Continue text as it is",
        openai.completions,
        openai.CompletionAnswer,
        CompletionRequest,
        GENERATE,
        streams=openai.CompletionChunk,
        statuses=(404,),
    ),
    Operation(("GET",), "/v1/models", "models", "The served model, as a list of one", openai.models, openai.Models),
    Operation(("GET",), "/v1/models/{model}", "model", "The served model", openai.model, openai.Model, statuses=(404,)),
    Operation(
        ("POST",),
        "/v1/annotate",
        "annotate",
        "Give the turns of conversations attributes",
        annotate,
        AnnotateAnswer,
        AnnotateRequest,
        LINES,  # that is how it grades; a model that grades by numbers alone cannot answer it
    ),
    Operation(
        ("POST",),
        "/v1/attribute_lines",
        "attribute_lines",
        "A full attribute line after each prompt",
        attribute_lines,
        AttributeLinesAnswer,
        AttributeLinesRequest,
        LINES,
    ),
    Operation(
        ("GET",),
        "/v1/attributes",
        "attributes",
        "Kind, markers and attribute schema of the model",
        status.served_format,
        status.Format,
        statuses=(404,),
    ),
    Operation(
        ("GET",),
        "/v1/template",
        "template",
        "The same as /v1/attributes",
        status.served_format,
        status.Format,
        statuses=(404,),
    ),
    Operation(
        ("GET",),
        "/health",
        "health",
        "The process lives and gets on; what it serves",
        status.health,
        status.Health,
        statuses=(503,),
        not_ready=status.Health,
        needs_token=False,
    ),
    Operation(
        ("GET",),
        "/ready",
        "ready",
        "New requests are served",
        status.ready,
        status.Ready,
        statuses=(503,),
        not_ready=status.Ready,
        needs_token=False,
    ),
    Operation(
        ("GET",),
        "/metrics",
        "metrics",
        "Numbers for Prometheus",
        status.metrics,
        media_type=CONTENT_TYPE_LATEST.partition("; charset")[0],
    ),
    Operation(("GET",), "/openapi.json", "openapi", "This document", status.openapi, Document),
)


def for_chat(operation: Operation, chat: Chat | None) -> Operation:
    """The row for models that are chatted with like this, which decides what a message may be."""
    return replace(operation, body=chat.body) if chat and operation.body is ChatRequest else operation


# With compat=nemo1.23: the same routes, one of which takes what NeMo's server took.
TABLE_NEMO123 = tuple(
    replace(operation, body=Nemo123Request) if operation.body is GenerateRequest else operation for operation in TABLE
)
