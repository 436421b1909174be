"""OpenAssistant messages, one a line, in any order -> the trees they form.

Raw record, as the dataset has it when loaded by name; `labels` are parallel lists (those of the tree files do too)::

    {"message_id": "m2", "parent_id": "m1", "message_tree_id": "m1", "tree_state": "ready_for_export",
     "text": "It is 4.", "role": "assistant", "lang": "en", "deleted": false,
     "labels": {"name": ["spam", "quality"], "value": [0.0, 0.875], "count": [3, 3]}}

A message without `parent_id` starts a tree; trees come in the order of their first messages, replies in the order of
the file. The index takes some 300 bytes of memory per message; texts stay in the file.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from steerlm_nemo.attributes import AttributeSchema
from steerlm_nemo.conversation import RecordRef
from steerlm_nemo.data.rows import Lines
from steerlm_nemo.data.sources.oasst import Message, Path, message_of
from steerlm_nemo.errors import RecordError, shown
from steerlm_nemo.records import RawLine

Reject = Callable[[RawLine, str], None]
_ROOT, _UNKNOWN, _ORPHAN, _CYCLE, _REJECTED = -1, -2, -3, -4, -5


class MessageTrees:
    """The trees of a message file. Messages that belong to none are given to `reject` with the reason."""

    def __init__(self, lines: Lines, reject: Reject) -> None:
        self._lines = lines
        ids: dict[str, int] = {}
        parent_ids: list[str | None] = []
        fate = array("q")  # the index of the tree's first message, or why there is none
        for index in range(len(lines)):
            line = lines[index]
            parent_id, problem = None, line.problem
            if line.record is not None:
                message_id, parent_id = line.record.get("message_id"), line.record.get("parent_id")
                if not isinstance(message_id, str):
                    problem = f"no message_id: keys seen are {shown(sorted(line.record))}"
                elif message_id in ids:
                    problem = f"duplicate message_id: {message_id} is also at {lines.ref(ids[message_id])}"
                elif parent_id is not None and not isinstance(parent_id, str):
                    problem = f"wrong type: 'parent_id' must be a string or null, found {type(parent_id).__name__}"
                else:
                    ids[message_id] = index
            if problem:
                reject(line, problem)
            fate.append(_REJECTED if problem else _UNKNOWN)
            parent_ids.append(None if problem else parent_id)
        self._parents = array("q", (_ROOT if parent is None else ids.get(parent, _ORPHAN) for parent in parent_ids))
        for index in range(len(lines)):
            self._follow(index, fate)
        self._members: dict[int, array[int]] = {}
        for index, root in enumerate(fate):
            if root >= 0:
                self._members.setdefault(root, array("q")).append(index)
            elif root != _REJECTED:
                reject(lines[index], self._problem(index, root, parent_ids[index]))
        self._roots = array("q", self._members)

    def _follow(self, index: int, fate: array[int]) -> None:
        """Settle the fate of a message and of its ancestors."""
        walked: dict[int, None] = {}
        while fate[index] == _UNKNOWN:
            walked[index] = None
            parent = self._parents[index]
            if parent in (_ROOT, _ORPHAN):
                fate[index] = index if parent == _ROOT else _ORPHAN
            elif parent in walked:
                fate[index] = _CYCLE
            else:
                index = parent
        # A rejected ancestor makes orphans of those below it.
        end = _ORPHAN if fate[index] == _REJECTED else fate[index]
        for message in walked:
            fate[message] = end

    def _problem(self, index: int, fate: int, parent_id: str | None) -> str:
        if fate == _CYCLE:
            return f"cycle: parent_id {parent_id} and those above it lead to no first message"
        if self._parents[index] == _ORPHAN:
            return f"orphan: parent_id {parent_id} is not in the file or was rejected"
        return "orphan: a message above it is not in the file or was rejected"

    def __len__(self) -> int:
        return len(self._roots)

    def members(self, tree: int) -> Iterator[RawLine]:
        """The lines of a tree's messages, in file order."""
        return (self._lines[index] for index in self._members[self._roots[tree]])

    def paths(self, tree: int, schema: AttributeSchema, reject: Reject) -> tuple[list[Path], dict[str | None, RawLine]]:
        """Every root-to-leaf path, as `oasst.paths` gives them, and the line of each message by its id.

        A message that cannot be used is given to `reject`, and so is every one below it.
        """
        indices = self._members[self._roots[tree]]
        lines: dict[int, RawLine] = {index: self._lines[index] for index in indices}
        messages: dict[int, Message] = {}
        replies: dict[int, list[int]] = {index: [] for index in indices}
        for index, line in lines.items():
            replies.setdefault(self._parents[index], []).append(index)
            try:
                messages[index] = message_of(with_label_map(line.require_record(), line.ref), schema, line.ref)
            except RecordError as err:
                reject(line, err.reason)
        paths: list[Path] = []
        reached: set[int] = set()
        pending: list[tuple[int, Path]] = [(self._roots[tree], ())]
        while pending:
            index, before = pending.pop()
            if index not in messages:
                continue
            reached.add(index)
            path = (*before, messages[index])
            below = [reply for reply in replies[index] if reply in messages]
            pending.extend((reply, path) for reply in reversed(below))
            if not below:
                paths.append(path)
        for index in messages.keys() - reached:
            reject(lines[index], "orphan: a message above it was rejected")
        by_id = {messages[index].turn.id: lines[index] for index in reached}
        return paths, by_id

    def first(self, tree: int) -> Mapping[str, Any]:
        """The raw first message of a tree."""
        return self._lines[self._roots[tree]].require_record()


def with_label_map(record: Mapping[str, Any], ref: RecordRef) -> Mapping[str, Any]:
    """The record with `labels` as a map `{name: {"value": value}}`, whichever of the two forms it has.

    Raises:
        RecordError: lists of different lengths.
    """
    labels = record.get("labels")
    if not isinstance(labels, Mapping) or not isinstance(labels.get("name"), list):
        return record
    names, values = labels["name"], labels.get("value")
    if not isinstance(values, list) or len(names) != len(values) or not all(isinstance(name, str) for name in names):
        raise RecordError(ref, "bad label: 'name' and 'value' of the labels are not lists of the same length")
    # A value that nobody gave is null.
    given = {name: {"value": value} for name, value in zip(names, values, strict=True) if value is not None}
    return {**record, "labels": given}
