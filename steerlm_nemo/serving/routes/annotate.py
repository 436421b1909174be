"""POST /v1/annotate: conversations in, the same conversations with graded turns out.

What is asked, and what is written, are the annotator's own: the same prompts, the same forced lines, the same records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from steerlm_nemo.annotation.thread import KEEP, AnnotatedThread, AnnotationSettings, labelled
from steerlm_nemo.attributes import Attributes
from steerlm_nemo.conversation import RECORD_TYPES, SYSTEM_PROMPT, TEXT_TO_VALUE, USER, RecordRef
from steerlm_nemo.engine.protocol import ModelInfo, Sample
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.messages import ROLES
from steerlm_nemo.model_kind import GRADE, SteerLMFormat
from steerlm_nemo.records import RawLine
from steerlm_nemo.serving.attribute_lines import line_answer, line_samples
from steerlm_nemo.serving.http import EngineCalls, json_body, json_response
from steerlm_nemo.serving.requests.checking import Schema, check, read
from steerlm_nemo.serving.requests.generate import BadRequest
from steerlm_nemo.serving.requests.openai import FLAG, MESSAGE

ANNOTATE: Schema = {
    "type": "object",
    "properties": {
        "conversations": {
            "description": "Chat records as in training files, or {messages: [{role, content, attributes}, ...]}.",
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "additionalProperties": True},
        },
        "turns": {"enum": ["assistant", "all"], "default": "assistant"},
        "only_missing": {**FLAG, "description": "Keep the values that people gave."},
        "soft": {**FLAG, "description": "Tell expected value, confidence and probabilities of every chosen value."},
        "output_type": {"enum": [KEEP, *RECORD_TYPES], "default": KEEP},
    },
    "required": ["conversations"],
}
_CHAT: Schema = {
    "type": "object",
    "properties": {"messages": {"type": "array", "minItems": 1, "items": MESSAGE}},
    "additionalProperties": True,
}


def annotate_route(calls: EngineCalls) -> Route:
    info = calls.info

    async def annotate(request: Request) -> Response:
        body = read(await json_body(request), ANNOTATE, "/v1/annotate")
        settings = AnnotationSettings(
            turns=body["turns"],
            output_type=body["output_type"],
            only_missing=body["only_missing"],
            soft=body["soft"],
        )
        threads = await asyncio.to_thread(_threads, body["conversations"], info, settings, calls.max_prompts)
        num_overruled = 0
        # First turns of all conversations together, then second turns: a turn is graded in the knowledge of the
        # grades before it.
        for step in range(max(len(thread.to_ask) for thread in threads)):
            rows = [(thread, thread.to_ask[step]) for thread in threads if step < len(thread.to_ask)]
            asked, samples = await asyncio.to_thread(_samples, rows, info, calls.max_prompts)
            answer = line_answer(await calls.complete(request, samples), asked, info)
            for (thread, index), line, beliefs in zip(rows, answer["lines"], answer["attributes"], strict=True):
                thread.grades[index] = Attributes.parse(line)
                if settings.soft:
                    thread.beliefs[index] = beliefs
            num_overruled += sum(answer["num_overruled"])
        return json_response(
            {
                "conversations": [
                    _graded(conversation, thread, settings)
                    for conversation, thread in zip(body["conversations"], threads, strict=True)
                ],
                "model": info.identity,
                "num_turns": sum(len(thread.grades) for thread in threads),
                "num_overruled": num_overruled,
            }
        )

    return Route("/v1/annotate", annotate, methods=["POST"])


def _threads(
    conversations: Sequence[Mapping[str, Any]], info: ModelInfo, settings: AnnotationSettings, max_prompts: int
) -> list[AnnotatedThread]:
    if info.format is None or GRADE not in info.format.kind.abilities:
        raise BadRequest(f"model {info.name} is no value model; it does not grade conversations")
    if len(conversations) > max_prompts:
        raise BadRequest(f"at most {max_prompts} conversations are graded per request, found {len(conversations)}")
    return [
        _thread(conversation, f"conversations[{index}]", info.format, settings)
        for index, conversation in enumerate(conversations)
    ]


def _thread(
    conversation: Mapping[str, Any], where: str, served: SteerLMFormat, settings: AnnotationSettings
) -> AnnotatedThread:
    record = _record(conversation, where, served) if "messages" in conversation else dict(conversation)
    ref = RecordRef(where, 1)
    try:
        return AnnotatedThread(RawLine(ref, b"", record), served, settings)
    except RecordError as err:
        raise BadRequest(str(err).replace(str(ref), where), param=where) from err


def _record(conversation: Mapping[str, Any], where: str, served: SteerLMFormat) -> dict[str, Any]:
    """Messages as a chat record; attributes of a message are what somebody graded it."""
    check(conversation, _CHAT, where)
    turns, system = [], SYSTEM_PROMPT
    for index, message in enumerate(conversation["messages"]):
        content, place = message["content"], f"{where}.messages[{index}]"
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if message["role"] not in ROLES:
            if index:
                raise BadRequest(f"{place}: only the first message may be a {message['role']} message", param=place)
            system = text
            continue
        turn = {"from": ROLES[message["role"]], "value": text}
        if message.get("attributes") is not None:
            try:
                turn["label"] = served.schema.order(message["attributes"]).line
            except InputError as err:
                raise BadRequest(f"{place}: {err}", param=place) from err
        turns.append(turn)
    return {"conversations": turns, "system": system, "mask": USER, "type": TEXT_TO_VALUE}


def _samples(
    rows: Sequence[tuple[AnnotatedThread, int]], info: ModelInfo, max_prompts: int
) -> tuple[dict[str, Any], list[Sample]]:
    prompts = [thread.prompt(index) for thread, index in rows]
    asked = {"prompts": prompts, "given": [thread.given[index] for thread, index in rows]}
    try:
        return asked, line_samples(asked, info, max_prompts)
    except BadRequest:
        for (thread, index), prompt in zip(rows, prompts, strict=True):  # whose fault is it?
            try:
                line_samples({"prompts": [prompt]}, info)
            except BadRequest as err:
                raise BadRequest(f"{thread.line.ref.path} turn {index}: {err}", param=thread.line.ref.path) from err
        raise


def _graded(conversation: Mapping[str, Any], thread: AnnotatedThread, settings: AnnotationSettings) -> dict[str, Any]:
    """The conversation as it came, with its grades."""
    record = labelled(thread.line.record or {}, thread.grades, settings, thread.beliefs)
    if "messages" not in conversation:
        return record
    messages = [dict(message) for message in conversation["messages"]]
    spoken = [message for message in messages if message["role"] in ROLES]
    for message, turn in zip(spoken, record["conversations"], strict=True):
        if turn.get("label") is not None:
            message["attributes"] = Attributes.parse(turn["label"]).as_dict()
        if "label_soft" in turn:
            message["attributes_soft"] = turn["label_soft"]
    return {**conversation, "messages": messages}
