"""Grades from a second file, joined by message id: what turns a translated OASST into labelled conversations.

The second file is OpenAssistant trees or messages in any container, or one JSON object from id to labels::

    {"m2": {"name": ["quality"], "value": [0.875]}, "m3": {"quality": {"value": 0.5}}}

A grade that a message already has is never overwritten. Languages are not taken over: a translation has its own.
Memory grows with the labelled messages of the second file, some 200 bytes each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steerlm_nemo.attributes import LANG, Attributes, AttributeSchema
from steerlm_nemo.conversation import RecordRef
from steerlm_nemo.data.containers import Lines, require_source
from steerlm_nemo.data.formats import OASST_MESSAGES, OASST_TREES, format_of
from steerlm_nemo.data.oasst import grades
from steerlm_nemo.data.oasst_messages import with_label_map
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import open_bytes


class LabelSource:
    """Attributes by message id. Raises InputError or RecordError: the file cannot be read or a label is bad."""

    def __init__(self, source: str | Path, schema: AttributeSchema, scratch_dir: Path) -> None:
        self._lines: dict[str, str] = {}
        for message_id, node, ref in _messages(str(source), scratch_dir):
            attributes = grades(with_label_map(node, ref).get("labels"), schema, ref)
            if attributes.items and self._lines.setdefault(message_id, attributes.line) != attributes.line:
                raise RecordError(f"{ref}: duplicate message_id: {message_id} has other labels further up")
        if not self._lines:
            raise InputError(f"{source}: no message in it has a message_id and labels of schema {schema.name}")

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, message_id: str | None) -> Attributes | None:
        line = self._lines.get(message_id) if message_id is not None else None
        return None if line is None else Attributes.parse(line)


def completed(own: Attributes | None, other: Attributes | None, schema: AttributeSchema | None) -> Attributes | None:
    """`own` with the attributes it lacks taken from `other`, in schema order; an attribute of `own` stays."""
    if other is None:
        return own
    values = {**other.as_dict(), **(own.as_dict() if own is not None else {})}
    order = (*(schema.names if schema is not None else ()), *(key for key in values if key != LANG), LANG)
    return Attributes(tuple((key, values[key]) for key in dict.fromkeys(order) if key in values))


def _messages(source: str, scratch_dir: Path) -> Iterator[tuple[str, Mapping[str, Any], RecordRef]]:
    """(id, raw message, place) of every message that has an id."""
    require_source(source)
    if (by_id := _id_map(source)) is not None:
        for number, (message_id, labels) in enumerate(by_id.items(), 1):
            yield message_id, {"labels": labels}, RecordRef(source, number)
        return
    with Lines(source, scratch_dir) as lines:
        name = format_of((lines[index] for index in range(len(lines))), source).name
        if name not in (OASST_TREES, OASST_MESSAGES):
            raise InputError(f"{source} is of shape {name}; labels are taken from {OASST_TREES} or {OASST_MESSAGES}")
        for index in range(len(lines)):
            line = lines[index]
            if line.record is None:
                raise RecordError(f"{line.ref}: {line.problem}")
            pending: list[Any] = [line.record.get("prompt", line.record)]
            while pending:
                node = pending.pop()
                if not isinstance(node, Mapping):
                    raise RecordError(f"{line.ref}: wrong type: a message must be an object")
                pending.extend(node.get("replies") or [])
                if isinstance(node.get("message_id"), str):
                    yield node["message_id"], node, line.ref


def _id_map(source: str) -> Mapping[str, Any] | None:
    """A file that is one JSON object spread over it, from id to labels; None where it is anything else."""
    if Path(source).suffix != ".json" or not Path(source).is_file():
        return None
    with open_bytes(Path(source)) as file:
        if file.read(4096).lstrip()[:1] != b"{":
            return None
    with open_bytes(Path(source)) as file:
        try:
            data = json.load(file)
        except ValueError:
            return None  # JSON lines under another name
    return data if isinstance(data, dict) and "message_id" not in data and "message_tree_id" not in data else None
