"""HelpSteer and HelpSteer2: rated responses, and HelpSteer2's pairs with a preference.

Raw records, one a line. A rating is a whole number from 0 to 4 (arXiv:2311.09528, 2406.08673)::

    {"prompt": "What is 2+2?", "response": "It is 4.", "helpfulness": 3, "correctness": 4, "coherence": 4,
     "complexity": 2, "verbosity": 1}

    {"prompt": "What is 2+2?", "response_1": "4.", "response_2": "It is 4.", "preference_strength": 1,
     "split": "train", "preference_statement": "...", ...}

HelpSteer2's prompts of several turns hold the earlier ones between `<extra_id_1>Assistant` and `<extra_id_1>User`
lines; they become turns. A pair becomes two records in a row, both labelled `quality:<strength>`; a strength from -3
(response_1 is much better) to 3. The system prompt is NeMo-Aligner's, which has no newlines at its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, USER, Conversation, RecordRef, Turn
from steerlm_nemo.data.sources.adapter import CHOSEN, REJECTED, Sample, grades_at, text_at
from steerlm_nemo.errors import RecordError

ALIGNER_SYSTEM_PROMPT = SYSTEM_PROMPT.rstrip("\n")
_EARLIER_TURN = re.compile(r"\n<extra_id_1>(Assistant|User)\n")


def ratings(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    """A rated response."""
    assert schema is not None
    attributes = grades_at(record, schema, ref)
    if attributes is None:
        raise RecordError(f"{ref}: bad label: no rating of schema {schema.name} ({', '.join(schema.names)})")
    return [_sample(record, "response", attributes, {}, ref)]


def preference(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    """A pair, the first response first."""
    strength = record.get("preference_strength")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or strength not in range(-3, 4):
        raise RecordError(f"{ref}: bad label: preference_strength is {strength!r}; it runs from -3 to 3")
    attributes = Attributes((("quality", int(strength)),))
    first, second = (CHOSEN, REJECTED) if strength < 0 else (REJECTED, CHOSEN) if strength > 0 else ({}, {})
    return [
        _sample(record, "response_1", attributes, first, ref),
        _sample(record, "response_2", attributes, second, ref),
    ]


def _sample(
    record: Mapping[str, Any], response_key: str, attributes: Attributes, fields: Mapping[str, Any], ref: RecordRef
) -> Sample:
    texts = _EARLIER_TURN.split(text_at(record, "prompt", ref))
    turns = [Turn(USER, texts[0]), *(Turn(role, text) for role, text in zip(texts[1::2], texts[2::2], strict=True))]
    if [turn.role for turn in turns] != [USER, ASSISTANT] * (len(turns) // 2) + [USER]:
        raise RecordError(f"{ref}: malformed transcript: the speakers of the prompt do not take turns")
    turns.append(Turn(ASSISTANT, text_at(record, response_key, ref), attributes))
    return Sample(Conversation(ALIGNER_SYSTEM_PROMPT, tuple(turns), ref), fields)
