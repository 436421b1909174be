r"""Graded conversations -> what NeMo-Aligner's regression reward model is trained on.

One line per graded turn: the conversation up to and including it in NeMo-Aligner's template, and its attributes as a
vector. -100 stands for one that it does not have; the loss leaves it out::

    {"text": "<extra_id_0>System\nA chat ...\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello.\n<extra_id_2>",
     "label": [4.0, 0.0, 2.0, 2.0, -100.0, -100.0, -100.0, -100.0, -100.0]}

As in the reference the system prompt is always the same one, whatever the record says, and earlier turns carry no
labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from steerlm_nemo.attributes import COMBINED9, LANG, items_of
from steerlm_nemo.conversation import ASSISTANT, USER, RecordRef, turns_of
from steerlm_nemo.data.sources.helpsteer import ALIGNER_SYSTEM_PROMPT
from steerlm_nemo.data.statistics import AttributeStatistics
from steerlm_nemo.errors import InputError, RecordError, listed, shown
from steerlm_nemo.records import Accounting, atomic_output, dump_record, read_lines, require_file, require_other_file

# The order of the vector is the order that models published with it answer in.
VECTOR = COMBINED9.names
MISSING = -100.0
_HEADER = f"<extra_id_0>System\n{ALIGNER_SYSTEM_PROMPT}\n"
_LABEL_PREFIX = "<extra_id_2>"


def vector_of(label: str) -> tuple[list[float], list[str]]:
    """The vector of a label line, and the keys of the line that have no place in it.

    A strength of preference may be negative. Raises ValueError saying which item is malformed.
    """
    values: dict[str, float] = {}
    others = []
    for key, value in items_of(label):
        if key not in VECTOR:
            others.append(key)
        elif re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", value, re.ASCII):
            values[key] = float(value)
        else:
            raise ValueError(f"attribute {key} has value {shown(value)}, which is not a number")
    return [values.get(name, MISSING) for name in VECTOR], others


def process_to_regression_format(
    input_file: str | Path, output_file: str | Path, records: Accounting, statistics: AttributeStatistics
) -> Counter[str]:
    """Write one line per graded turn. Returns the keys that had no place in the vector, with their number of turns.

    `records` counts each record read: written (one turn or more), filtered (no turn has an attribute of the vector),
    rejected (it cannot be read, or a label is malformed).

    Raises:
        InputError: an unusable file, or no line to write.
        RecordError: an unusable record in strict mode.
    """
    require_file(input_file)
    require_other_file(output_file, input_file)
    others: Counter[str] = Counter()
    with records, atomic_output(output_file) as output:
        for line in read_lines(input_file):
            try:
                samples = _samples(turns_of(line.require_record(), line.ref), line.ref, others)
            except RecordError as err:
                records.rejected(line.ref, err.reason, line.raw)
                continue
            if not samples:
                records.filtered(line.ref, "no turn has an attribute of the vector")
                continue
            for text, vector in samples:
                output.write(dump_record({"text": text, "label": vector}) + "\n")
                statistics.add({n: value for n, value in zip(VECTOR, vector, strict=True) if value != MISSING})
            records.written()
        if not records.counts["written"]:
            raise InputError(f"{input_file}: no graded turn to write. Records: {records.summary()}")
    return others


def _samples(turns: Sequence[object], ref: RecordRef, others: Counter[str]) -> Sequence[tuple[str, list[float]]]:
    """(text, vector) of every turn with an attribute of the vector. Raises RecordError for an invalid sample."""
    text, samples = _HEADER, []
    for number, turn in enumerate(turns):
        role, value, label = (turn.get(key) for key in ("from", "value", "label")) if isinstance(turn, dict) else "???"
        if role not in (USER, ASSISTANT) or not isinstance(value, str) or not isinstance(label, str | None):
            raise RecordError(ref, f"wrong type: turn {number} must have 'from' ({USER} or {ASSISTANT}) and 'value'")
        text += f"<extra_id_1>{role}\n{value}\n"
        if not label:
            continue
        try:
            vector, without_place = vector_of(label)
        except ValueError as err:
            raise RecordError(ref, f"invalid sample: turn {number}: {err}") from err
        others.update(without_place)
        if any(value != MISSING for value in vector):
            samples.append((text + _LABEL_PREFIX, vector))
    return samples


def note_on(others: Counter[str]) -> str:
    """What to say about keys without a place in the vector; `lang` is none and goes without saying."""
    lost = {key: count for key, count in others.items() if key != LANG}
    return listed((f"{key}: {count}" for key, count in sorted(lost.items())), "; ")
