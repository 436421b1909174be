r"""Pairs of a better and a worse response: HH-RLHF transcripts, CValues-Comparison, and prompt/chosen/rejected.

Raw records, one of these a line (Anthropic's HH-RLHF, arXiv:2204.05862; CValues-Comparison, arXiv:2307.09705;
RewardBench, arXiv:2403.13787)::

    {"chosen": "\n\nHuman: What is 2+2?\n\nAssistant: It is 4.", "rejected": "\n\nHuman: What is 2+2?\n\nAssistant: 5."}
    {"prompt": "...", "pos_resp": "...", "neg_resp": "...", "pos_type": "拒绝为主", "neg_type": "风险回复"}
    {"prompt": "What is 2+2?", "chosen": "It is 4.", "rejected": "5.", "subset": "...", "id": 0}

The better response comes first; those of CValues keep the kind of response (`response_type`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise, takewhile
from typing import Any

from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, USER, Pair, RecordRef, Response, Turn
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.sources.adapter import conversation, text_at
from steerlm_nemo.errors import RecordError

_SPEAKER = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n)|$)")
_ROLES = {"Human": USER, "Assistant": ASSISTANT}


def hh_rlhf(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Pair:
    """The two sides of a row seldom part before the last turn, but some do."""
    chosen, rejected = (transcript(text_at(record, side, ref), side, ref) for side in ("chosen", "rejected"))
    num_shared = len(list(takewhile(lambda turns: turns[0] == turns[1], zip(chosen, rejected, strict=False))))
    context = conversation(chosen[:num_shared], ref, options, SYSTEM_PROMPT)
    return Pair(context, (Response(chosen[num_shared:]), Response(rejected[num_shared:])), chosen=0)


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
        raise RecordError(ref, f"malformed transcript: {side!r} {problem}")
    return tuple(Turn(_ROLES[role], text) for role, text in zip(roles, texts, strict=True))


def cvalues(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Pair:
    context = conversation([Turn(USER, text_at(record, "prompt", ref))], ref, options, SYSTEM_PROMPT)
    good, bad = (
        Response(
            (Turn(ASSISTANT, text_at(record, f"{side}_resp", ref)),),
            further={"response_type": text_at(record, f"{side}_type", ref)},
        )
        for side in ("pos", "neg")
    )
    return Pair(context, (good, bad), chosen=0)


def prompted(record: Mapping[str, Any], ref: RecordRef, options: Options) -> Pair:
    context = conversation([Turn(USER, text_at(record, "prompt", ref))], ref, options, SYSTEM_PROMPT)
    chosen, rejected = (Response((Turn(ASSISTANT, text_at(record, side, ref)),)) for side in ("chosen", "rejected"))
    return Pair(context, (chosen, rejected), chosen=0)
