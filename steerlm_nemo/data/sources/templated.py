r"""Conversations that are already prompts: one text in NeMo-Aligner's template.

Raw record, one a line (what its reward model trainers read; see regression.py for the vector, which may be missing)::

    {"text": "<extra_id_0>System\nA chat ...\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello.\n<extra_id_2>",
     "label": [-100.0, -100.0, -100.0, -100.0, 4.0, 4.0, 4.0, 3.0, 2.0]}

The label prefix at the end is left out; the vector grades the last turn. Lines of such a file often come in pairs, the
better response first; that order is not in the records, so give the pairs as prompt/chosen/rejected where it matters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from steerlm_nemo.attributes import COMBINED9, Attributes, AttributeSchema
from steerlm_nemo.conversation import Conversation, RecordRef, Turn
from steerlm_nemo.data.regression import MISSING
from steerlm_nemo.data.sources.adapter import Sample, grades_at, text_at
from steerlm_nemo.errors import RecordError

_TEXT = re.compile(r"<extra_id_0>System\n(.*?)\n(<extra_id_1>.*?)(?:<extra_id_[12]>)?\n?", re.DOTALL)
_TURN_START = re.compile(r"(?:^|(?<=\n))<extra_id_1>(User|Assistant)\n")


def templated(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    found = _TEXT.fullmatch(text_at(record, "text", ref))
    before, *parts = _TURN_START.split(found[2]) if found else [""]
    texts = parts[1::2]
    if not found or before or len(texts) < 2 or not all(text.endswith("\n") for text in texts):
        raise RecordError(
            f"{ref}: malformed transcript: 'text' must be <extra_id_0>System, then two or more turns that start with "
            "<extra_id_1>User or <extra_id_1>Assistant, each ended by a newline"
        )
    turns = tuple(Turn(role, text.removesuffix("\n")) for role, text in zip(parts[::2], texts, strict=True))
    turns = (*turns[:-1], Turn(turns[-1].role, turns[-1].text, _attributes(record.get("label"), schema, ref)))
    return [Sample(Conversation(found[1], turns, ref), has_own_system=True)]


def _attributes(vector: Any, schema: AttributeSchema | None, ref: RecordRef) -> Attributes | None:
    if vector is None:
        return None
    if not isinstance(vector, list) or len(vector) != len(COMBINED9.names):
        raise RecordError(f"{ref}: bad label: {vector!r} is not a vector of {len(COMBINED9.names)}")
    graded = {name: None if value == MISSING else value for name, value in zip(COMBINED9.names, vector, strict=True)}
    return grades_at(graded, schema, ref)
