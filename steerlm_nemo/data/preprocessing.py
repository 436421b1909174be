"""Datasets -> training records of the value model and of the SteerLM model (SteerLM steps 1 and 2).

For OpenAssistant trees the output is byte-equal to NeMo's `preprocessing.py` (v1.22 to v2.4) wherever that runs to its
end, but for two things (`compat=True` gives the reference's records): in VALUE_TO_TEXT records the label of a User turn
is null, because no prompt at inference has one, and trees of the same id end in the same split.

Two passes keep memory flat: the first notes where each record starts, the second reads them in shuffled order.
Shuffling the numbers of the trees gives the permutation that shuffling the trees would give. What must not be torn
apart is one unit of the shuffle: a tree; of other datasets, the rows that ask the same question.
"""

from __future__ import annotations

import hashlib
import random
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerlm_nemo.attributes import LANG, NEMO12_LANG, Attributes, AttributeSchema
from steerlm_nemo.conversation import RECORD_TYPES, USER, VALUE_TO_TEXT, Conversation, Pair, Turn, to_lines
from steerlm_nemo.data.attribute_source import AttributeSource, completed, said_so_far
from steerlm_nemo.data.options import Filters, Options
from steerlm_nemo.data.rows import Lines, require_source
from steerlm_nemo.data.sources import oasst
from steerlm_nemo.data.sources.chat import has_foreign_speakers
from steerlm_nemo.data.sources.formats import (
    CHAT,
    OASST_MESSAGES,
    OASST_TREES,
    Format,
    RowFormat,
    format_named,
    format_of,
)
from steerlm_nemo.data.sources.oasst_messages import MessageTrees
from steerlm_nemo.errors import InputError, RecordError, listed, shown
from steerlm_nemo.record_report import told_schema
from steerlm_nemo.records import Accounting, RawLine, atomic_output, require_other_file

# Python's JSON reader counts two levels per turn, so its default of 1000 refuses a thread of 500 turns.
DEEPEST_JSON = 10_000
AUTO = "auto"
_OWN_TYPES = (None, *RECORD_TYPES)  # other chat files may have a `type`, too


def allow_deep_json() -> None:
    sys.setrecursionlimit(max(sys.getrecursionlimit(), DEEPEST_JSON))


def shuffled_order(num_trees: int, seed: int) -> Sequence[int]:
    """The reference's order: Python's `random`, seeded, shuffling in place."""
    order = array("Q", range(num_trees))
    random.Random(seed).shuffle(order)
    return order


@dataclass
class Tally:
    """What one run did, beyond where each record went (which is `Accounting`'s)."""

    format: str = OASST_TREES
    conversations: Counter[str] = field(default_factory=Counter)  # train, val
    left_out: Counter[str] = field(default_factory=Counter)  # paths, by the option that refused them
    unread: Counter[str] = field(default_factory=Counter)  # rows, by a key that no adapter reads
    joined: Counter[str] = field(default_factory=Counter)  # messages, by whether the label file knows their id
    num_filled: int = 0  # attributes taken from the label file or from the defaults
    num_moved: int = 0  # trees that followed an earlier one of the same id to its side of the split
    languages: set[str] = field(default_factory=set)
    schema: AttributeSchema | None = None

    def foreign_languages(self) -> list[str]:
        """Languages found that a schema with languages does not know."""
        known = self.schema.languages if self.schema is not None else ()
        return sorted(self.languages - {*known}) if known else []

    @property
    def units(self) -> str:
        return {OASST_TREES: "trees", OASST_MESSAGES: "messages"}.get(self.format, "rows")

    def as_dict(self) -> dict[str, Any]:
        """Everything counted here, for a report."""
        return {
            "format": self.format,
            "units": self.units,
            "conversations": {part: self.conversations[part] for part in ("train", "val")},
            "paths_left_out": dict(self.left_out),
            "keys_not_carried_over": dict(self.unread),
            "messages_joined": dict(self.joined),
            "attributes_filled_in": self.num_filled,
            "trees_kept_with_an_earlier_one": self.num_moved,
            "languages": sorted(self.languages),
        }

    def summary(self, records: Accounting) -> str:
        text = f"{self.units}: {records.summary()}\nconversations: " + " + ".join(
            f"{self.conversations[part]} {part}" for part in ("train", "val")
        )
        if self.left_out:
            text += f"\npaths left out: {self.left_out.total()} ({_listed(self.left_out)})"
        if self.joined:
            text += f"\nmessages joined to labels: {_listed(self.joined)}"
        if self.num_filled:
            text += f"\nattributes filled in: {self.num_filled}"
        if self.num_moved:
            text += f"\ntrees kept on the side of an earlier one with the same id: {self.num_moved}"
        if self.unread:
            text += f"\nkeys not carried over, with the rows that had them: {_listed(self.unread)}"
        return text


def _listed(counts: Counter[str]) -> str:
    return listed((f"{name}: {count}" for name, count in counts.most_common()), "; ")


def preprocess(
    input_file: str | Path,
    output_file_prefix: str | Path,
    *,
    split_ratio: float,
    seed: int,
    options: Options,
    trees: Accounting,
    format_name: str = AUTO,
    labels_from: str | Path | None = None,
) -> Tally:
    """Write `<prefix>_train.jsonl` and `<prefix>_val.jsonl`; both appear together when complete, or neither.

    Of trees, every root-to-leaf path of two or more messages is a record. `trees` counts each tree, message or row
    (see `Tally.units`) as written, filtered or rejected.

    Raises:
        InputError: an unusable file or argument, or no conversation to write.
        RecordError: an unusable record in strict mode.
    """
    options.check()
    if not 0 <= split_ratio <= 1:
        raise InputError(f"--split_ratio is {split_ratio}; it is the share of trees for training, from 0 to 1")
    chosen = None if format_name == AUTO else format_named(format_name)
    outputs = {part: Path(f"{output_file_prefix}_{part}.jsonl") for part in ("train", "val")}
    require_source(input_file)
    for output in outputs.values():
        require_other_file(output, input_file)
    trees.outputs = tuple(outputs.values())
    allow_deep_json()

    from tqdm import tqdm

    # The two files take their final names last of all, so a failure leaves neither.
    with (
        trees,
        atomic_output(outputs["train"]) as train,
        atomic_output(outputs["val"]) as val,
        Lines(input_file, outputs["train"].parent) as lines,
    ):
        shape = chosen or format_of(lines, str(input_file))
        options = replace(options, schema=options.schema or shape.schema)
        others = None
        if labels_from is not None:
            others = AttributeSource(labels_from, options.schema or NEMO12_LANG, outputs["train"].parent)
        # Records keep the attributes they have, and so the schema that they are known to have.
        told = told_schema(input_file) if options.schema is None else options.schema
        run = _Run(options, shape, trees, Tally(shape.name, schema=told), others)
        source = run.source(lines)
        num_train = int(len(source) * split_ratio)
        order = shuffled_order(len(source), seed)
        for position, unit in enumerate(tqdm(order, desc="Preprocessing", unit=" units", file=sys.stderr)):
            conversations, in_train = source.conversations(unit, position < num_train)
            (train if in_train else val).writelines(line + "\n" for line in to_lines(conversations))
            run.tally.conversations["train" if in_train else "val"] += len(conversations)
        if not trees.counts["written"]:
            raise InputError(f"{input_file}: no conversation to write. {run.tally.units}: {trees.summary()}")
    return run.tally


def conversations_of(
    input_file: str | Path, options: Options, records: Accounting, format_name: str = AUTO, scratch_dir: Path = Path()
) -> Iterator[Conversation]:
    """Every conversation that `preprocess` would write, in the order of the file; `records` as there.

    Records of our own flow keep their type and speakers, and may have a single turn.

    Raises:
        InputError: an unusable file or argument.
    """
    options.check()
    chosen = None if format_name == AUTO else format_named(format_name)
    require_source(input_file)
    allow_deep_json()
    with records, Lines(input_file, scratch_dir) as lines:
        shape = chosen or format_of(lines, str(input_file))
        options = replace(options, schema=options.schema or shape.schema)
        run = _Run(options, shape, records, Tally(shape.name, schema=options.schema), None)
        if isinstance(shape, RowFormat):
            for line in lines:
                yield from run.conversations_of_row(line, shape)
            return
        source = run.source(lines)
        for unit in range(len(source)):
            yield from source.conversations(unit, True)[0]


def split_up(found: Conversation | Pair) -> tuple[Conversation, ...]:
    """What a row is written as: a pair of responses is two conversations in a row, which always stay together."""
    return found.conversations() if isinstance(found, Pair) else (found,)


@dataclass
class _Run:
    """What reading one unit needs to know."""

    options: Options
    format: Format
    trees: Accounting
    tally: Tally
    others: AttributeSource | None  # attributes for turns that lack them

    def __post_init__(self) -> None:
        without = self.options.record_type == VALUE_TO_TEXT and not self.options.compat
        self._role_without_attributes = USER if without else None
        self._leaves_turns = not without and self.others is None and not self.options.fill.items
        if isinstance(self.format, RowFormat) and self.options.filters != Filters():
            raise InputError(
                f"--lang, --drop_deleted and --tree_state filter OpenAssistant data; this file is {self.format.name}"
            )

    def source(self, lines: Lines) -> _Trees | _Messages | _Rows:
        if isinstance(self.format, RowFormat):
            return _Rows(lines, self, self.format)
        return _Messages(lines, self) if self.format.name == OASST_MESSAGES else _Trees(lines, self)

    def reject(self, line: RawLine, reason: str) -> None:
        self.trees.rejected(line.ref, reason, line.raw)

    def conversations_of_row(self, line: RawLine, shape: RowFormat) -> Sequence[Conversation]:
        """Of a row; none if it is unusable, which is then accounted for."""
        record = line.record or {}
        is_own = shape.name == CHAT and {"type", "system"} <= record.keys() and record["type"] in _OWN_TYPES
        is_own = is_own and not has_foreign_speakers(record)
        try:
            found = Conversation.from_record(record, line.ref) if is_own else shape.read(line, self.options)
        except RecordError as err:
            self.reject(line, f"not a conversation: {err.reason}" if is_own else err.reason)
            return ()
        self.trees.written()
        return split_up(found)

    def finished(self, conversations: Sequence[Conversation]) -> Sequence[Conversation]:
        """The conversations of one tree or row as they are written; turns that they share stay shared."""
        self.tally.languages.update(
            turn.lang for conversation in conversations for turn in conversation.turns if turn.lang is not None
        )
        if self._leaves_turns:
            return conversations
        done: dict[int, Turn] = {}
        for conversation in conversations:
            for number, turn in enumerate(conversation.turns, 1):
                if id(turn) not in done:
                    done[id(turn)] = self._finished(turn, conversation.turns[:number])
        return [replace(one, turns=tuple([done[id(turn)] for turn in one.turns])) for one in conversations]

    def _finished(self, turn: Turn, so_far: Sequence[Turn]) -> Turn:
        """With the attributes that it lacks; and without any where training gives it none."""
        attributes = self._completed(turn, so_far)
        if turn.role == self._role_without_attributes:
            return replace(turn, attributes=None, says_null=True)
        return turn if attributes is turn.attributes else replace(turn, attributes=attributes)

    def _completed(self, turn: Turn, so_far: Sequence[Turn]) -> Attributes | None:
        """A turn's attributes, completed from the second file and, for responses that have some, from the defaults."""
        own = full = turn.attributes
        if self.others is not None:
            has_ids = not isinstance(self.format, RowFormat)
            other = self.others.get(turn.id if turn.id is not None or has_ids else said_so_far(so_far))
            self.tally.joined["matched" if other is not None else "unmatched"] += 1
            full = completed(own, other, self.options.schema)
        is_graded = full is not None and any(key != LANG for key, _ in full.items)
        if self.options.fill.items and turn.role != USER and is_graded:
            full = completed(full, self.options.fill, self.options.schema)
        if full is not own and full is not None:
            self.tally.num_filled += len(full.items) - (len(own.items) if own is not None else 0)
        return full

    def kept_paths(self, found: Sequence[oasst.Path]) -> list[oasst.Path]:
        """The paths to write, at least one; those that a filter refuses are counted. Raises Filtered."""
        long_enough = [path for path in found if len(path) > 1]
        if not long_enough:
            raise Filtered("no reply to the prompt")
        left_out: Counter[str] = Counter()
        kept = []
        for path in long_enough:
            if reason := oasst.refused(path, self.options.filters):
                left_out[reason] += 1
            else:
                kept.append(path)
        self.tally.left_out += left_out
        if not kept:
            raise Filtered("every path left out by " + " or ".join(sorted(left_out)))
        return kept

    def refuse_tree(self, tree: Mapping[str, Any]) -> None:
        states = self.options.filters.tree_states
        if states and tree.get("tree_state") not in states:
            raise Filtered("--tree_state")


class Filtered(Exception):
    """A tree of which nothing is to be written, though nothing is wrong with it."""


class _Trees:
    """OpenAssistant trees, one a line."""

    def __init__(self, lines: Lines, run: _Run) -> None:
        self._lines, self._run = lines, run
        self._schema = run.options.schema or NEMO12_LANG
        self._sides: dict[bytes, bool] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def conversations(self, unit: int, in_train: bool) -> tuple[Sequence[Conversation], bool]:
        """The conversations of a tree and whether they belong to the training side."""
        run, line = self._run, self._lines[unit]
        try:
            tree = line.require_record()
            run.refuse_tree(tree)
            kept = run.kept_paths(list(oasst.paths(tree, self._schema, line.ref)))
            tree_id = tree.get("message_tree_id")
            if not isinstance(tree_id, str):
                raise RecordError(line.ref, f"no message_tree_id: keys seen are {shown(sorted(tree))}")
        except Filtered as reason:
            run.trees.filtered(line.ref, str(reason))
        except RecordError as err:
            run.reject(line, err.reason)
        else:
            run.trees.written()
            side = in_train if run.options.compat else self._sides.setdefault(_digest(tree_id), in_train)
            run.tally.num_moved += side != in_train
            return run.finished([oasst.conversation_of(path, tree_id, line.ref, run.options) for path in kept]), side
        return [], in_train


class _Messages:
    """OpenAssistant messages, one a line; each is accounted for by itself."""

    def __init__(self, lines: Lines, run: _Run) -> None:
        self._trees, self._run = MessageTrees(lines, run.reject), run
        self._schema = run.options.schema or NEMO12_LANG

    def __len__(self) -> int:
        return len(self._trees)

    def conversations(self, unit: int, in_train: bool) -> tuple[Sequence[Conversation], bool]:
        """The conversations of a tree and whether they belong to the training side."""
        run, first = self._run, self._trees.first(unit)
        found, line_of = self._trees.paths(unit, self._schema, run.reject)
        conversations: Sequence[Conversation] = []
        try:
            run.refuse_tree(first)
            kept = run.kept_paths(found)
            tree_id = first.get("message_tree_id")
            tree_id = tree_id if isinstance(tree_id, str) else first["message_id"]
            conversations = run.finished(
                [oasst.conversation_of(path, tree_id, line_of[path[-1].turn.id].ref, run.options) for path in kept]
            )
            written = {message.turn.id for path in kept for message in path}
            reason = "every path left out by the filters"
        except Filtered as filtered:
            written, reason = set(), str(filtered)
        for message_id, line in line_of.items():
            if message_id in written:
                run.trees.written()
            else:
                run.trees.filtered(line.ref, reason)
        return conversations, in_train


class _Rows:
    """Any other dataset, one row a line. Rows with the same first question, or the same tree id, are one unit."""

    def __init__(self, lines: Lines, run: _Run, shape: RowFormat) -> None:
        self._lines, self._run, self._format = lines, run, shape
        self._groups: dict[bytes, array[int]] = {}
        for index, line in enumerate(lines):
            try:
                key = _key(split_up(shape.read(line, run.options))[0])
            except RecordError as err:
                run.reject(line, err.reason)
            else:
                self._groups.setdefault(key, array("Q")).append(index)
        self._units = list(self._groups.values())

    def __len__(self) -> int:
        return len(self._units)

    def conversations(self, unit: int, in_train: bool) -> tuple[Sequence[Conversation], bool]:
        """The conversations of rows that stay together and whether they belong to the training side."""
        run = self._run
        conversations: list[Conversation] = []
        for index in self._units[unit]:
            line = self._lines[index]
            conversations += run.finished(split_up(self._format.read(line, run.options)))
            run.trees.written()
            run.tally.unread.update(self._format.unread(line.require_record()))
        return conversations, in_train


def _key(conversation: Conversation) -> bytes:
    """What two conversations must share to stay on one side of the split."""
    tree_id = conversation.tree_id
    return _digest(conversation.turns[0].text if tree_id is None else f"tree {tree_id}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=12).digest()
