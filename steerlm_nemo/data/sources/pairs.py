r"""Pairs of a better and a worse response: HH-RLHF transcripts, CValues-Comparison, and prompt/chosen/rejected.

Raw records, one of these a line (Anthropic's HH-RLHF, arXiv:2204.05862; CValues-Comparison, arXiv:2307.09705;
RewardBench, arXiv:2403.13787)::

    {"chosen": "\n\nHuman: What is 2+2?\n\nAssistant: It is 4.", "rejected": "\n\nHuman: What is 2+2?\n\nAssistant: 5."}
    {"prompt": "...", "pos_resp": "...", "neg_resp": "...", "pos_type": "拒绝为主", "neg_type": "风险回复"}
    {"prompt": "What is 2+2?", "chosen": "It is 4.", "rejected": "5.", "subset": "...", "id": 0}

A pair becomes two records in a row, the better response first. Each says which it is (`"preference": "chosen"`), and
those of CValues keep the kind of response (`response_type`). The two always end in the same split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from steerlm_nemo.attributes import AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, USER, Conversation, RecordRef, Turn
from steerlm_nemo.data.sources.adapter import CHOSEN, REJECTED, Sample, text_at, two_turns
from steerlm_nemo.errors import RecordError

_SPEAKER = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n)|$)")
_ROLES = {"Human": USER, "Assistant": ASSISTANT}


def hh_rlhf(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    return [
        Sample(Conversation(SYSTEM_PROMPT, transcript(text_at(record, side, ref), side, ref), ref), fields)
        for side, fields in (("chosen", CHOSEN), ("rejected", REJECTED))
    ]


def transcript(text: str, side: str, ref: RecordRef) -> tuple[Turn, ...]:
    """The turns of a transcript, from a human's question to an assistant's response.

    Raises:
        RecordError: malformed; the message says on which side and how.
    """
    before, *parts = _SPEAKER.split(text)
    roles, texts = parts[::2], parts[1::2]
    same = next((number for number, (one, other) in enumerate(pairwise(roles), 1) if one == other), None)
    empty = next((number for number, text in enumerate(texts, 1) if not text.strip()), None)
    problem = None
    if before or not roles or roles[0] != "Human":
        problem = r"does not start with '\n\nHuman: '"
    elif roles[-1] != "Assistant":
        problem = "does not end with the assistant"
    elif same:
        problem = f"turns {same} and {same + 1} are both from the {roles[same].lower()}"
    elif empty:
        problem = f"turn {empty} of {len(texts)} is empty"
    if problem:
        raise RecordError(f"{ref}: malformed transcript: {side!r} {problem}")
    return tuple(Turn(_ROLES[role], text) for role, text in zip(roles, texts, strict=True))


def cvalues(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    question = text_at(record, "prompt", ref)
    return [
        two_turns(
            question,
            text_at(record, f"{side}_resp", ref),
            ref,
            system=SYSTEM_PROMPT,
            fields={**fields, "response_type": text_at(record, f"{side}_type", ref)},
        )
        for side, fields in (("pos", CHOSEN), ("neg", REJECTED))
    ]


def prompted(record: Mapping[str, Any], ref: RecordRef, schema: AttributeSchema | None) -> list[Sample]:
    question = text_at(record, "prompt", ref)
    return [
        two_turns(question, text_at(record, side, ref), ref, system=SYSTEM_PROMPT, fields=fields)
        for side, fields in (("chosen", CHOSEN), ("rejected", REJECTED))
    ]
