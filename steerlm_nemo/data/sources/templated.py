r"""Conversations that are already prompts: one text in NeMo-Aligner's template.

Raw record, one a line (what its reward model trainers read; see regression.py for the vector, which may be missing)::

    {"text": "<extra_id_0>System\nA chat ...\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello.\n<extra_id_2>",
     "label": [-100.0, -100.0, -100.0, -100.0, 4.0, 4.0, 4.0, 3.0, 2.0]}

The label prefix at the end is left out; the vector holds the attributes of the last turn. Lines of such a file often
come in pairs, the better response first; that order is not in the records, so give the pairs as prompt/chosen/rejected
where it matters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from steerlm_nemo.attributes import COMBINED9, Attributes, AttributeSchema
from steerlm_nemo.conversation import Conversation, RecordRef, Turn
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.regression import MISSING
from steerlm_nemo.data.sources.adapter import attributes_at, conversation, text_at
from steerlm_nemo.errors import RecordError, shown

_TEXT = re.compile(r"<extra_id_0>System\n(.*?)\n(<extra_id_1>.*?)(?:<extra_id_[12]>)?\n?", re.DOTALL)
_TURN_START = re.compile(r"(?:^|(?<=\n))<extra_id_1>(User|Assistant)\n")


def templated(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    found = _TEXT.fullmatch(text_at(record, "text", ref))
    before, *parts = _TURN_START.split(found[2]) if found else [""]
    texts = parts[1::2]
    if not found or before or len(texts) < 2 or not all(text.endswith("\n") for text in texts):
        raise RecordError(
            ref,
            "malformed transcript: 'text' must be <extra_id_0>System, then two or more turns that start with "
            "<extra_id_1>User or <extra_id_1>Assistant, each ended by a newline",
        )
    *turns, last = (Turn(role, text.removesuffix("\n")) for role, text in zip(parts[::2], texts, strict=True))
    last = replace(last, attributes=_attributes(record.get("label"), options.schema, ref))
    return replace(conversation([*turns, last], ref, options, ""), system=found[1])


def _attributes(vector: Any, schema: AttributeSchema | None, ref: RecordRef) -> Attributes | None:
    if vector is None:
        return None
    if not isinstance(vector, list) or len(vector) != len(COMBINED9.names):
        raise RecordError(ref, f"bad label: {shown(vector)} is not a vector of {len(COMBINED9.names)}")
    values = {name: None if value == MISSING else value for name, value in zip(COMBINED9.names, vector, strict=True)}
    return attributes_at(values, schema, ref)
