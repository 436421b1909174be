"""Attributes from a second file, joined by message id: what turns a translated OASST into graded conversations.

The second file is OpenAssistant trees or messages in any container, or one JSON object from id to labels::

    {"m2": {"name": ["quality"], "value": [0.875]}, "m3": {"quality": {"value": 0.5}}}

Or it is a file of chat records (conversation.py), an annotated one for example. Its turns have no ids; there a turn is
known by its text and all that was said before.

An attribute that a message already has is never overwritten. Languages are not taken over: a translation has its own.
Memory grows with the messages of the second file that have attributes, some 200 bytes each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlm_nemo.attributes import LANG, Attributes, AttributeSchema
from steerlm_nemo.conversation import RecordRef, Turn
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.rows import Lines, require_source
from steerlm_nemo.data.sources.adapter import checked
from steerlm_nemo.data.sources.chat import conversations
from steerlm_nemo.data.sources.formats import CHAT, OASST_MESSAGES, OASST_TREES, format_of
from steerlm_nemo.data.sources.oasst import attributes_of
from steerlm_nemo.data.sources.oasst_messages import with_label_map
from steerlm_nemo.errors import InputError, RecordError, shown
from steerlm_nemo.records import open_bytes


class AttributeSource:
    """Attributes by message id. Raises InputError or RecordError: the file cannot be read or a label is bad."""

    def __init__(self, source: str | Path, schema: AttributeSchema, scratch_dir: Path) -> None:
        self._lines: dict[str, str] = {}
        for message_id, attributes, ref in _found(str(source), schema, scratch_dir):
            if attributes.items and self._lines.setdefault(message_id, attributes.line) != attributes.line:
                raise RecordError(ref, f"duplicate message_id: {message_id} has other labels further up")
        if not self._lines:
            raise InputError(f"{source}: nothing in it has a message_id (or is a chat) and labels of {schema.name}")

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


def said_so_far(turns: Sequence[Turn]) -> str:
    """What stands for the id of the last of these turns where there is none."""
    said = json.dumps([(turn.role, turn.text) for turn in turns])
    return hashlib.blake2b(said.encode("ascii"), digest_size=12).hexdigest()


def _found(source: str, schema: AttributeSchema, scratch_dir: Path) -> Iterator[tuple[str, Attributes, RecordRef]]:
    """(id, attributes, place) of every message that has an id, or of every turn of a chat that has attributes."""
    require_source(source)
    if (by_id := _id_map(source)) is not None:
        for number, (message_id, labels) in enumerate(by_id.items(), 1):
            ref = RecordRef(source, number)
            yield message_id, _attributes({"labels": labels}, schema, ref), ref
        return
    options = Options()  # a chat keeps every attribute
    with Lines(source, scratch_dir) as lines:
        name = format_of(lines, source).name
        if name not in (OASST_TREES, OASST_MESSAGES, CHAT):
            known = ", ".join((OASST_TREES, OASST_MESSAGES, CHAT))
            raise InputError(f"{source} is of shape {name}; labels are taken from {known}")
        for line in lines:
            record = line.require_record()
            if name == CHAT:
                turns = conversations(record, line.ref, options).turns
                for number, turn in enumerate(turns, 1):
                    if turn.attributes is not None:
                        values = checked(turn.attributes, schema, line.ref).as_dict()
                        kept = Attributes(tuple((key, values[key]) for key in schema.names if key in values))
                        yield said_so_far(turns[:number]), kept, line.ref
                continue
            if not {"prompt", "message_id", "replies"} & record.keys():
                raise RecordError(
                    line.ref, f"neither a message nor a tree of them: keys seen are {shown(sorted(record))}"
                )
            pending: list[Any] = [record.get("prompt", record)]
            while pending:
                node = pending.pop()
                replies = node.get("replies") or [] if isinstance(node, Mapping) else None
                if not isinstance(replies, list):
                    raise RecordError(line.ref, "wrong type: a message must be an object, its replies a list of them")
                pending.extend(replies)
                if isinstance(node.get("message_id"), str):
                    yield node["message_id"], _attributes(node, schema, line.ref), line.ref


def _attributes(node: Mapping[str, Any], schema: AttributeSchema, ref: RecordRef) -> Attributes:
    return attributes_of(with_label_map(node, ref).get("labels"), schema, ref)


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
