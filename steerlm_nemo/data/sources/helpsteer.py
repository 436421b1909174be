"""HelpSteer and HelpSteer2: rated responses, and HelpSteer2's pairs with a preference.

Raw records, one a line. A rating is a whole number from 0 to 4 (arXiv:2311.09528, 2406.08673)::

    {"prompt": "What is 2+2?", "response": "It is 4.", "helpfulness": 3, "correctness": 4, "coherence": 4,
     "complexity": 2, "verbosity": 1}

    {"prompt": "What is 2+2?", "response_1": "4.", "response_2": "It is 4.", "preference_strength": 1,
     "split": "train", "preference_statement": "...", ...}

HelpSteer2's prompts of several turns hold the earlier ones between `<extra_id_1>Assistant` and `<extra_id_1>User`
lines; they become turns. Both responses of a pair have the attribute `quality:<strength>`, a strength from -3
(response_1 is much better) to 3, as NeMo-Aligner's reward models read it; it grades neither response. The system
prompt is NeMo-Aligner's, which has no newlines at its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from steerlm_nemo.attributes import HELPSTEER5, Attributes
from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, USER, Conversation, Pair, RecordRef, Response, Turn
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.sources.adapter import attributes_at, conversation, text_at
from steerlm_nemo.errors import InputError, RecordError, shown

ALIGNER_SYSTEM_PROMPT = SYSTEM_PROMPT.rstrip("\n")
_STRENGTH = re.compile(r"quality:-[1-3]").fullmatch
_EARLIER_TURN = re.compile(r"\n<extra_id_1>(Assistant|User)\n")


def ratings(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Conversation:
    """A rated response."""
    schema = options.schema or HELPSTEER5
    attributes = attributes_at(record, schema, ref)
    if attributes is None:
        raise RecordError(ref, f"bad label: no rating of schema {schema.name} ({', '.join(schema.names)})")
    response = Turn(ASSISTANT, text_at(record, "response", ref), attributes)
    return conversation([*_context(record, ref), response], ref, options, ALIGNER_SYSTEM_PROMPT)


def preference(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Pair:
    """A pair, the first response first; a strength of 0 prefers neither."""
    strength = record.get("preference_strength")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or strength not in range(-3, 4):
        raise RecordError(ref, f"bad label: preference_strength is {shown(strength)}; it runs from -3 to 3")
    attributes = Attributes((("quality", int(strength)),))
    context = conversation(_context(record, ref), ref, options, ALIGNER_SYSTEM_PROMPT)
    one, other = (
        Response((Turn(ASSISTANT, text_at(record, key, ref), attributes),)) for key in ("response_1", "response_2")
    )
    chosen: Literal[0, 1] | None = None if strength == 0 else 0 if strength < 0 else 1
    return Pair(context, (one, other), chosen, margin=abs(float(strength)))


def refuse_strengths(record: Mapping[str, Any], source: str) -> None:
    """Refuse the file of a record whose label is the strength of a preference, where grades are to be learnt.

    A strength that is not negative looks like a grade, so the records that can be read are no better.

    Raises:
        InputError: it is such a record.
    """
    turns = record.get("conversations")
    if "preference" not in record or not isinstance(turns, list):
        return
    labels = [turn.get("label") for turn in turns if isinstance(turn, Mapping)]
    if any(isinstance(label, str) and _STRENGTH(label) for label in labels):
        raise InputError(
            f"{source}: its labels are strengths of preference (quality:-3 to 3, of helpsteer2-preference), which say "
            "nothing of one response. They are for scripts/process_to_regression_format.py only; HelpSteer2's ratings "
            "are what can be cleaned and learnt from"
        )


def _context(record: Mapping[str, Any], ref: RecordRef) -> list[Turn]:
    """The turns of a prompt."""
    texts = _EARLIER_TURN.split(text_at(record, "prompt", ref))
    turns = [Turn(USER, texts[0]), *(Turn(role, text) for role, text in zip(texts[1::2], texts[2::2], strict=True))]
    if [turn.role for turn in turns] != [USER, ASSISTANT] * (len(turns) // 2) + [USER]:
        raise RecordError(ref, "malformed transcript: the speakers of the prompt do not take turns")
    return turns
