"""Datasets -> training records of the value model and of the SteerLM model (SteerLM steps 1 and 2).

For OpenAssistant trees the output is byte-equal to NeMo's `preprocessing.py` (v1.22 to v2.4) wherever that runs to its
end, but for two things (`compat=True` gives the reference's records): in VALUE_TO_TEXT records the label of a User turn
is null, because no prompt at inference has one, and trees of the same id end in the same split.

Two passes keep memory flat: the first notes where each record starts, the second reads them in shuffled order.
Shuffling the numbers of the trees gives the permutation that shuffling the trees would give. What must not be torn
apart is one unit of the shuffle: a tree; of other datasets, the rows that ask the same question.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from json.encoder import encode_basestring  # type: ignore[attr-defined]  # json.dumps(text, ensure_ascii=False), bare
from pathlib import Path
from typing import Any, NamedTuple

from steerlm_nemo.attributes import LANG, NEMO12_LANG, Attributes, AttributeSchema
from steerlm_nemo.conversation import (
    ASSISTANT,
    RECORD_TYPES,
    SYSTEM_PROMPT,
    USER,
    VALUE_TO_TEXT,
    Conversation,
    RecordRef,
    RecordType,
)
from steerlm_nemo.data.label_source import LabelSource, completed, said_so_far
from steerlm_nemo.data.rows import Lines, require_source
from steerlm_nemo.data.sources.adapter import Sample
from steerlm_nemo.data.sources.formats import CHAT, OASST_MESSAGES, OASST_TREES, Format, format_named, format_of
from steerlm_nemo.data.sources.oasst import Message, paths
from steerlm_nemo.data.sources.oasst_messages import MessageTrees
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import Accounting, RawLine, atomic_output, dump_record, require_other_file

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


@dataclass(frozen=True)
class Filters:
    """What to leave out on request. The reference keeps everything: a value model should see poor data too."""

    languages: tuple[str, ...] = ()  # empty: all
    tree_states: tuple[str, ...] = ()  # empty: all
    drop_deleted: bool = False

    def refuse_path(self, path: Sequence[Message]) -> str | None:
        """Why a path is left out, or None if it stays. One message is enough to refuse it."""
        if self.drop_deleted and any(message.deleted for message in path):
            return "--drop_deleted"
        if self.languages and any(message.lang not in self.languages for message in path):
            return "--lang"
        return None


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
    return "; ".join(f"{name}: {count}" for name, count in counts.most_common())


@dataclass(frozen=True)
class Options:
    """How records are written. `schema` None: the format's own."""

    mask_role: str = USER
    record_type: RecordType = RECORD_TYPES[0]
    schema: AttributeSchema | None = None
    filters: Filters = field(default_factory=Filters)
    compat: bool = False  # the reference's bytes where they are not what a user would want
    system: str | None = None  # instead of the system prompt of records that have none of their own
    fill: Attributes = field(default_factory=lambda: Attributes(()))  # for graded responses that lack these

    def check(self) -> None:
        """Raise InputError for a type or a speaker that no record can have."""
        if self.record_type not in RECORD_TYPES:
            raise InputError(f"--type is {self.record_type!r}; it must be {' or '.join(RECORD_TYPES)}")
        for role in self.mask_role.split(","):
            if role.strip() not in (USER, ASSISTANT):
                near = difflib.get_close_matches(role.strip().capitalize(), (USER, ASSISTANT), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(
                    f"--mask_role is {self.mask_role!r}, but the speakers are {USER} and {ASSISTANT}{hint} With any "
                    "other, data_clean would leave out every record"
                )


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
    allow_deep_json()

    from tqdm import tqdm

    # The two files take their final names last of all, so a failure leaves neither.
    with (
        trees,
        atomic_output(outputs["train"]) as train,
        atomic_output(outputs["val"]) as val,
        Lines(input_file, outputs["train"].parent) as lines,
    ):
        shape = chosen or format_of((lines[index] for index in range(len(lines))), str(input_file))
        labels = None
        if labels_from is not None:
            labels = LabelSource(labels_from, options.schema or shape.schema or NEMO12_LANG, outputs["train"].parent)
        run = _Run(options, shape, trees, Tally(shape.name, schema=options.schema or shape.schema), labels)
        source = run.source(lines)
        num_train = int(len(source) * split_ratio)
        order = shuffled_order(len(source), seed)
        for position, unit in enumerate(tqdm(order, desc="Preprocessing", unit=" units", file=sys.stderr)):
            records, in_train = source.records(unit, position < num_train)
            (train if in_train else val).writelines(record + "\n" for _, record in records)
            run.tally.conversations["train" if in_train else "val"] += len(records)
        if not trees.counts["written"]:
            raise InputError(f"{input_file}: no conversation to write. {run.tally.units}: {trees.summary()}")
    return run.tally


class Thread(NamedTuple):
    """A conversation as it would be written, and the language of each turn where the source says so."""

    conversation: Conversation
    langs: tuple[str | None, ...]


def threads(
    input_file: str | Path, options: Options, records: Accounting, format_name: str = AUTO, scratch_dir: Path = Path()
) -> Iterator[Thread]:
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
        shape = chosen or format_of((lines[index] for index in range(len(lines))), str(input_file))
        run = _Run(options, shape, records, Tally(shape.name, schema=options.schema or shape.schema), None)
        if shape.adapter is not None:
            for index in range(len(lines)):
                yield from run.row_threads(lines[index])
            return
        source = run.source(lines)
        for unit in range(len(source)):
            for ref, text in source.records(unit, True)[0]:
                yield _own_thread(json.loads(text), ref)


def _own_thread(record: Mapping[str, Any], ref: RecordRef) -> Thread:
    conversation = Conversation.from_record(record, ref)
    conversation.require_unicode()
    return Thread(conversation, tuple(turn.get("lang") for turn in record["conversations"]))


@dataclass
class _Run:
    """What reading one unit needs to know."""

    options: Options
    format: Format
    trees: Accounting
    tally: Tally
    labels: LabelSource | None

    def __post_init__(self) -> None:
        self.schema = self.tally.schema
        unlabelled = self.options.record_type == VALUE_TO_TEXT and not self.options.compat
        self.unlabelled_role = USER if unlabelled else None
        if self.format.adapter is not None and self.options.filters != Filters():
            raise InputError(
                f"--lang, --drop_deleted and --tree_state filter OpenAssistant data; this file is {self.format.name}"
            )

    def source(self, lines: Lines) -> _Trees | _Messages | _Rows:
        if self.format.adapter is not None:
            return _Rows(lines, self)
        return _Messages(lines, self) if self.format.name == OASST_MESSAGES else _Trees(lines, self)

    def reject(self, line: RawLine, problem: str) -> None:
        self.trees.rejected(line.ref, problem, line.raw)

    def row_threads(self, line: RawLine) -> list[Thread]:
        """The conversations of a row; none if it is unusable, which is then accounted for."""
        record = line.record or {}
        is_own = self.format.name == CHAT and {"type", "system"} <= record.keys() and record["type"] in _OWN_TYPES
        try:
            if is_own:
                found = [_own_thread(record, line.ref)]
            else:
                found = []
                for sample in self.format.samples(line, self.schema):
                    mask = self.options.mask_role if sample.mask is None else sample.mask
                    conversation = replace(
                        sample.conversation,
                        type=self.options.record_type,
                        mask_roles=tuple(role.strip() for role in mask.split(",")),
                    )
                    conversation.require_unicode()
                    found.append(Thread(conversation, tuple(sample.langs) or (None,) * len(conversation.turns)))
        except RecordError as err:
            kind = "not a conversation: " if is_own else ""
            self.reject(line, kind + str(err).removeprefix(f"{line.ref}: ").removeprefix(f"{line.ref} "))
            return []
        self.trees.written()
        return found

    def attributes(self, own: Attributes | None, role: str, message_id: str | None) -> Attributes | None:
        """A turn's attributes, completed from the label file and, for graded responses, from the defaults."""
        full = own
        if self.labels is not None:
            other = self.labels.get(message_id)
            self.tally.joined["matched" if other is not None else "unmatched"] += 1
            full = completed(own, other, self.schema)
        if self.options.fill.items and role != USER and full is not None and any(key != LANG for key, _ in full.items):
            full = completed(full, self.options.fill, self.schema)
        if full is not own and full is not None:
            self.tally.num_filled += len(full.items) - (len(own.items) if own is not None else 0)
        return full

    def kept_paths(self, found: Sequence[tuple[Message, ...]]) -> list[tuple[Message, ...]]:
        """The paths to write, at least one; those that a filter refuses are counted. Raises Filtered."""
        conversations = [path for path in found if len(path) > 1]
        if not conversations:
            raise Filtered("no reply to the prompt")
        left_out: Counter[str] = Counter()
        kept = []
        for path in conversations:
            if reason := self.options.filters.refuse_path(path):
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

    def dump_paths(self, kept: Sequence[tuple[Message, ...]], tree_id: str) -> list[str]:
        """One record per path. A message is written out once, however many paths share it.

        Raises:
            UnicodeEncodeError: a text holds a lone surrogate, which UTF-8 cannot carry.
        """
        # As the reference writes it: json.dumps of the whole record, default separators, non-ASCII literal.
        tail = (
            f'], "tree_id": {encode_basestring(tree_id)}, '
            f'"system": {encode_basestring(SYSTEM_PROMPT if self.options.system is None else self.options.system)}, '
            f'"mask": {encode_basestring(self.options.mask_role)}, '
            f'"type": {encode_basestring(self.options.record_type)}}}'
        )
        tail.encode("utf-8")
        turns: dict[int, str] = {}
        for path in kept:
            for message in path:
                if id(message) not in turns:
                    turns[id(message)] = turn = self._dump_message(message)
                    turn.encode("utf-8")
        return ['{"conversations": [' + ", ".join([turns[id(message)] for message in path]) + tail for path in kept]

    def _dump_message(self, message: Message) -> str:
        attributes = self.attributes(message.attributes, message.role, message.id)
        text = f'{{"value": {encode_basestring(message.text)}, "from": "{message.role}"'
        if message.role == self.unlabelled_role:
            text += ', "label": null'
        elif attributes is not None:
            text += f', "label": {encode_basestring(attributes.line)}'
        if message.lang is not None:
            self.tally.languages.add(message.lang)
            text += f', "lang": "{message.lang}"'
        return text + "}"

    def dump_sample(self, sample: Sample) -> str:
        """The record of a row's conversation; `label` is null where nobody graded the turn.

        Raises:
            UnicodeEncodeError: a text holds a lone surrogate.
        """
        conversation = sample.conversation
        turns = []
        for number, turn in enumerate(conversation.turns):
            message_id = sample.message_ids[number] if sample.message_ids else None
            if message_id is None and self.labels is not None:
                message_id = said_so_far(conversation.turns[: number + 1])
            attributes = self.attributes(turn.attributes, turn.role, message_id)
            unlabelled = turn.role == self.unlabelled_role or attributes is None
            raw: dict[str, Any] = {
                "value": turn.text,
                "from": turn.role,
                "label": None if unlabelled or attributes is None else attributes.line,
            }
            if sample.langs and sample.langs[number] is not None:
                raw["lang"] = sample.langs[number]
                self.tally.languages.add(raw["lang"])
            turns.append(raw)
        record: dict[str, Any] = {"conversations": turns}
        if sample.tree_id is not None:
            record["tree_id"] = sample.tree_id
        system = conversation.system
        if self.options.system is not None and not sample.has_own_system:
            system = self.options.system
        mask = self.options.mask_role if sample.mask is None else sample.mask
        record.update(system=system, mask=mask, type=self.options.record_type)
        return dump_record({**record, **sample.fields})


Placed = tuple[RecordRef, str]  # a record as it is written, and where it came from


class Filtered(Exception):
    """A tree of which nothing is to be written, though nothing is wrong with it."""


def _surrogate(err: UnicodeEncodeError) -> str:
    return f"lone surrogate: a text holds {err.object[err.start]!r}"


class _Trees:
    """OpenAssistant trees, one a line."""

    def __init__(self, lines: Lines, run: _Run) -> None:
        self._lines, self._run = lines, run
        self._sides: dict[bytes, bool] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def records(self, unit: int, in_train: bool) -> tuple[list[Placed], bool]:
        """The records of a tree and whether they belong to the training side."""
        run, line = self._run, self._lines[unit]
        try:
            if line.record is None:
                raise RecordError(f"{line.ref}: {line.problem}")
            run.refuse_tree(line.record)
            assert run.schema is not None
            kept = run.kept_paths(list(paths(line.record, run.schema, line.ref)))
            tree_id = line.record.get("message_tree_id")
            if not isinstance(tree_id, str):
                raise RecordError(f"{line.ref}: no message_tree_id: keys seen are {sorted(line.record)}")
            records = [(line.ref, record) for record in run.dump_paths(kept, tree_id)]
        except Filtered as reason:
            run.trees.filtered(str(reason))
        except UnicodeEncodeError as err:
            run.reject(line, _surrogate(err))
        except RecordError as err:
            run.reject(line, str(err).removeprefix(f"{line.ref}: "))
        else:
            run.trees.written()
            side = in_train if run.options.compat else self._sides.setdefault(_digest(tree_id), in_train)
            run.tally.num_moved += side != in_train
            return records, side
        return [], in_train


class _Messages:
    """OpenAssistant messages, one a line; each is accounted for by itself."""

    def __init__(self, lines: Lines, run: _Run) -> None:
        self._trees, self._run = MessageTrees(lines, run.reject), run

    def __len__(self) -> int:
        return len(self._trees)

    def records(self, unit: int, in_train: bool) -> tuple[list[Placed], bool]:
        """The records of a tree and whether they belong to the training side."""
        run, first = self._run, self._trees.first(unit)
        rejected: set[int] = set()

        def reject(line: RawLine, problem: str) -> None:
            rejected.add(line.ref.line)
            run.reject(line, problem)

        assert run.schema is not None
        found, line_of = self._trees.paths(unit, run.schema, reject)
        records: list[Placed] = []
        try:
            run.refuse_tree(first)
            kept = run.kept_paths(found)
            tree_id = first.get("message_tree_id")
            dumped = run.dump_paths(kept, tree_id if isinstance(tree_id, str) else first["message_id"])
            records = [(line_of[str(path[-1].id)].ref, record) for path, record in zip(kept, dumped, strict=True)]
            written = {message.id for path in kept for message in path}
            reason = "every path left out by the filters"
        except Filtered as filtered:
            written, reason = set(), str(filtered)
        except UnicodeEncodeError as err:
            for line in line_of.values():
                run.reject(line, _surrogate(err) + " in this tree")
            return [], in_train
        for message_id in line_of:
            if message_id in written:
                run.trees.written()
            else:
                run.trees.filtered(reason)
        return records, in_train


class _Rows:
    """Any other dataset, one row a line. Rows with the same first question, or the same tree id, are one unit."""

    def __init__(self, lines: Lines, run: _Run) -> None:
        self._lines, self._run = lines, run
        self._groups: dict[bytes, array[int]] = {}
        for index in range(len(lines)):
            line = lines[index]
            try:
                key = _key(self._samples(line)[0])
            except RecordError as err:
                run.reject(line, str(err).removeprefix(f"{line.ref}: "))
            else:
                self._groups.setdefault(key, array("Q")).append(index)
        self._units = list(self._groups.values())

    def __len__(self) -> int:
        return len(self._units)

    def _samples(self, line: RawLine) -> list[Sample]:
        return self._run.format.samples(line, self._run.schema)

    def records(self, unit: int, in_train: bool) -> tuple[list[Placed], bool]:
        """The records of rows that stay together and whether they belong to the training side."""
        run, records = self._run, []
        for index in self._units[unit]:
            line = self._lines[index]
            assert line.record is not None
            try:
                found = [run.dump_sample(sample) for sample in self._samples(line)]
            except UnicodeEncodeError as err:
                run.reject(line, _surrogate(err))
                continue
            records += [(line.ref, record) for record in found]
            run.trees.written()
            run.tally.unread.update(run.format.unread(line.record))
        return records, in_train


def _key(sample: Sample) -> bytes:
    """What two conversations must share to stay on one side of the split."""
    return _digest(sample.conversation.turns[0].text if sample.tree_id is None else f"tree {sample.tree_id}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
