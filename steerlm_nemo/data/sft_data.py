"""Conversations with predicted attributes -> data to train an attribute-conditioned model on (SteerLM step 3).

Two forms of the same conversations: VALUE_TO_TEXT records for `train_gpt_sft.py`, and plain `messages` for any other
trainer. There the attribute line is the last line of the user message that the response answers::

    {"messages": [{"role": "system", "content": "A chat ..."},
                  {"role": "user", "content": "Hi\\nquality:4,toxicity:0"},
                  {"role": "assistant", "content": "Hello."}]}
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerlm_nemo.attributes import LANG
from steerlm_nemo.conversation import (
    ASSISTANT,
    USER,
    VALUE_TO_TEXT,
    Conversation,
    Turn,
    require_every_loss,
    to_lines,
)
from steerlm_nemo.data.sources.helpsteer import refuse_strengths
from steerlm_nemo.data.statistics import AttributeStatistics
from steerlm_nemo.errors import InputError, RecordError, shown
from steerlm_nemo.records import Accounting, atomic_output, dump_record, read_lines, require_file, require_other_file


def build_sft_data(
    input_file: str | Path,
    output_file: str | Path,
    records: Accounting,
    statistics: AttributeStatistics,
    messages_file: str | Path | None = None,
) -> None:
    """Write the VALUE_TO_TEXT records and, where asked for, the same conversations as `messages`.

    `records` counts each record read: written, filtered (a response without attributes would teach the model to respond
    without them), rejected (it cannot be read).

    Raises:
        InputError: an unusable file, or no record to write.
        RecordError: an unusable record in strict mode.
    """
    require_file(input_file)
    for output in (output_file, messages_file):
        if output:
            require_other_file(output, input_file)
    with ExitStack() as stack:
        stack.enter_context(records)
        out = stack.enter_context(atomic_output(output_file))
        plain = stack.enter_context(atomic_output(messages_file)) if messages_file else None
        for line in read_lines(input_file):
            try:
                conversation = Conversation.from_record(line.require_record(), line.ref)
                require_every_loss(conversation)
                responses = [turn for turn in conversation.turns if turn.role not in conversation.mask_roles]
                values = [_values_of(turn) for turn in responses]
                if not all(values) or not values:
                    records.filtered(line.ref, "a response without attributes" if responses else "no response")
                    continue
                (sft,) = to_lines([_value_to_text(conversation)])
                as_messages = dump_record(_messages(conversation)) if plain else ""
            except RecordError as err:
                refuse_strengths(line.record or {}, line.ref.path)
                records.rejected(line.ref, err.reason, line.raw)
                continue
            out.write(sft + "\n")
            if plain:
                plain.write(as_messages + "\n")
            for one in values:
                statistics.add(one)
            records.written()
        if not records.counts["written"]:
            raise InputError(f"{input_file}: no record to write. Records: {records.summary()}")


def _values_of(turn: Turn) -> dict[str, float]:
    """A turn's attributes without its language; empty where it has none."""
    items = turn.attributes.items if turn.attributes is not None else ()
    return {key: int(value) for key, value in items if key != LANG}


def _value_to_text(conversation: Conversation) -> Conversation:
    """With its type set and without attributes on the turns that are not learnt; all else as it was."""
    turns = tuple(
        replace(turn, attributes=None) if turn.role in conversation.mask_roles else turn for turn in conversation.turns
    )
    return replace(conversation, turns=turns, type=VALUE_TO_TEXT)


def _messages(conversation: Conversation) -> dict[str, Any]:
    """The conversation as `messages`. Raises RecordError for another speaker, or a response without a question."""
    messages = [{"role": "system", "content": conversation.system.rstrip("\n")}]
    for number, turn in enumerate(conversation.turns):
        if turn.role not in (USER, ASSISTANT):
            raise RecordError(conversation.ref, f"unknown role: turn {number} is from {shown(turn.role)}")
        if turn.role == ASSISTANT:
            if messages[-1]["role"] != "user":
                raise RecordError(conversation.ref, f"no question: turn {number} answers no message of the user")
            if turn.attributes is not None:
                messages[-1]["content"] += f"\n{turn.attributes.line}"
        messages.append({"role": turn.role.lower(), "content": turn.text})
    return {"messages": messages}
