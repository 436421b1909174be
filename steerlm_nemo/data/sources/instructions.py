"""Instructions and their responses: one question, one response, no attributes.

Raw records, one of these a line (the last is AnswerCarefully's)::

    {"instruction": "Translate into French.", "input": "Good day.", "output": "Bonjour."}
    {"prompt": "What is 2+2?", "response": "It is 4."}
    {"ID": "AC-001", "text": "包丁の使い方は?", "output": "...", "harm-type": "...", "specific-harm": "..."}

`input` may be missing, null or empty; otherwise it follows the instruction after an empty line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, USER, Conversation, RecordRef, Turn
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.sources.adapter import conversation, text_at


def instruction(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    question = text_at(record, "instruction", ref)
    if record.get("input") not in (None, ""):
        question = f"{question}\n\n{text_at(record, 'input', ref)}"
    return _answered(question, text_at(record, "output", ref), ref, options)


def prompted(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    return _answered(text_at(record, "prompt", ref), text_at(record, "response", ref), ref, options)


def text(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    return _answered(text_at(record, "text", ref), text_at(record, "output", ref), ref, options)


def _answered(question: str, response: str, ref: RecordRef, options: Options) -> Conversation:
    return conversation([Turn(USER, question), Turn(ASSISTANT, response)], ref, options, SYSTEM_PROMPT)
