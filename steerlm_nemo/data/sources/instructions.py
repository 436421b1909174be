"""Instructions and their responses: one question, one response, nobody graded it.

Raw records, one of these a line (the last is AnswerCarefully's)::

    {"instruction": "Translate into French.", "input": "Good day.", "output": "Bonjour."}
    {"prompt": "What is 2+2?", "response": "It is 4."}
    {"ID": "AC-001", "text": "包丁の使い方は?", "output": "...", "harm-type": "...", "specific-harm": "..."}

`input` may be missing, null or empty; otherwise it follows the instruction after an empty line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm_nemo.attributes import AttributeSchema
from steerlm_nemo.conversation import SYSTEM_PROMPT, RecordRef
from steerlm_nemo.data.sources.adapter import Sample, text_at, two_turns


def instruction(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    question = text_at(record, "instruction", ref)
    if record.get("input") not in (None, ""):
        question = f"{question}\n\n{text_at(record, 'input', ref)}"
    return [two_turns(question, text_at(record, "output", ref), ref, system=SYSTEM_PROMPT)]


def prompted(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    question, response = text_at(record, "prompt", ref), text_at(record, "response", ref)
    return [two_turns(question, response, ref, system=SYSTEM_PROMPT)]


def text(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    return [two_turns(text_at(record, "text", ref), text_at(record, "output", ref), ref, system=SYSTEM_PROMPT)]
