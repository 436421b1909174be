"""Instructions and their responses: one question, one response, no attributes.

Raw records, one of these a line (the last is AnswerCarefully's)::

    {"instruction": "Translate into French.", "input": "Good day.", "output": "Bonjour."}
    {"prompt": "What is 2+2?", "response": "It is 4.", "system": "Be brief."}
    {"ID": "AC-001", "text": "包丁の使い方は?", "output": "...", "harm-type": "...", "specific-harm": "..."}

`input` and `system` may be missing or null, `input` empty; otherwise it follows the instruction after an empty line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, USER, Conversation, RecordRef, Turn
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.sources.adapter import conversation, text_at
from steerlm_nemo.errors import RecordError


def instruction(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    question = text_at(record, "instruction", ref)
    if record.get("input") not in (None, ""):
        question = f"{question}\n\n{text_at(record, 'input', ref)}"
    return _answered(question, text_at(record, "output", ref), ref, options)


def prompted(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise RecordError(ref, f"wrong type: 'system' must be a string, found {type(system).__name__}")
    answered = _answered(text_at(record, "prompt", ref), text_at(record, "response", ref), ref, options)
    return answered if system is None or options.system is not None else replace(answered, system=system)


def text(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    return _answered(text_at(record, "text", ref), text_at(record, "output", ref), ref, options)


def _answered(question: str, response: str, ref: RecordRef, options: Options) -> Conversation:
    return conversation([Turn(USER, question), Turn(ASSISTANT, response)], ref, options, SYSTEM_PROMPT)
