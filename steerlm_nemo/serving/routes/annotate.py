"""POST /v1/annotate: conversations in, the same conversations with the attributes of their turns out.

What is asked, and what is written, are the annotator's own: the same prompts, the same forced lines, the same records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from steerlm_nemo.annotation.thread import AnnotatedThread, AnnotationSettings, annotated
from steerlm_nemo.attributes import Attributes
from steerlm_nemo.conversation import SYSTEM_PROMPT, USER, RecordRef
from steerlm_nemo.engine.protocol import ModelInfo, Sample
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.messages import ROLES, conversation_to_grade
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.records import RawLine, lone_surrogate
from steerlm_nemo.serving.http import json_response
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.grading import AnnotateRequest, Conversation
from steerlm_nemo.serving.routes.attribute_lines import chosen_values, lines_of
from steerlm_nemo.serving.routes.operation import Server
from steerlm_nemo.serving.samples.attribute_lines import line_samples


class AnnotateAnswer(TypedDict):
    """`model` is the identity of the one that graded; `num_overruled` counts first choices that were not legal."""

    conversations: list[dict[str, Any]]
    model: str
    num_turns: int
    num_overruled: int


async def annotate(server: Server, request: Request, body: AnnotateRequest) -> Response:
    served = server.format()
    settings = AnnotationSettings(
        turns=body.turns, output_type=body.output_type, only_missing=body.only_missing, soft=body.soft
    )
    threads = await asyncio.to_thread(_threads, body.conversations, served, settings)
    num_overruled = 0
    # First turns of all conversations together, then second turns: a turn is graded in the knowledge of the
    # attributes before it.
    for step in range(max(len(thread.to_ask) for thread in threads)):
        rows = [(thread, thread.to_ask[step]) for thread in threads if step < len(thread.to_ask)]
        samples = await asyncio.to_thread(_samples, rows, server.info, served)
        completions = await server.calls.complete(request, samples)
        lines = lines_of(completions, server.info, served)
        for (thread, index), line, completion in zip(rows, lines, completions, strict=True):
            thread.attributes[index] = Attributes.parse(line)
            if settings.soft:
                chosen = chosen_values(completion, thread.given[index], served)
                thread.beliefs[index] = {key: dict(value) for key, value in chosen.items()}
            num_overruled += completion.num_overruled
    answer: AnnotateAnswer = {
        "conversations": [
            _annotated(conversation, thread, settings)
            for conversation, thread in zip(body.conversations, threads, strict=True)
        ],
        "model": server.info.identity,
        "num_turns": sum(len(thread.attributes) for thread in threads),
        "num_overruled": num_overruled,
    }
    return json_response(answer)


def _threads(
    conversations: Sequence[Conversation], served: SteerLMFormat, settings: AnnotationSettings
) -> list[AnnotatedThread]:
    return [
        _thread(conversation, f"conversations[{index}]", served, settings)
        for index, conversation in enumerate(conversations)
    ]


def _thread(
    conversation: Conversation, where: str, served: SteerLMFormat, settings: AnnotationSettings
) -> AnnotatedThread:
    try:
        record = _record(conversation, served)
        problem = lone_surrogate(record)
        line = RawLine(RecordRef(where), b"", None if problem else record, problem)
        return AnnotatedThread(line, served, settings)
    except InputError as err:
        raise BadRequest(f"{where}: {err}", param=where) from err
    except RecordError as err:
        raise BadRequest(str(err), param=where) from err


def _record(conversation: Conversation, served: SteerLMFormat) -> dict[str, Any]:
    """As the annotator reads it. Raises InputError."""
    if conversation.messages is None:
        return conversation.sent
    messages = [message.plain() for message in conversation.messages]
    read = conversation_to_grade(messages, served.schema, SYSTEM_PROMPT)
    turns = [
        {"from": turn.role, "value": turn.text, "label": None if turn.attributes is None else turn.attributes.line}
        for turn in read.turns
    ]
    return {"conversations": turns, "system": read.system, "mask": USER, "type": read.type}


def _samples(rows: Sequence[tuple[AnnotatedThread, int]], info: ModelInfo, served: SteerLMFormat) -> list[Sample]:
    prompts = {f"{thread.line.ref.path} turn {index}: the prompt": thread.prompt(index) for thread, index in rows}
    return line_samples(prompts, [thread.given[index] for thread, index in rows], info, served)


def _annotated(conversation: Conversation, thread: AnnotatedThread, settings: AnnotationSettings) -> dict[str, Any]:
    """The conversation as it came, with its attributes."""
    done = annotated(thread.conversation, thread.attributes, settings, thread.beliefs)
    if conversation.messages is None:
        return done.to_record()
    messages = [dict(message) for message in conversation.sent["messages"]]
    spoken = [message for message in messages if message["role"] in ROLES]
    for message, turn in zip(spoken, done.turns, strict=True):
        if turn.attributes is not None:
            message["attributes"] = turn.attributes.as_dict()
        if turn.beliefs is not None:
            message["attributes_soft"] = turn.beliefs
    return {**conversation.sent, "messages": messages}
