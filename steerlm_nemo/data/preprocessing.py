"""OpenAssistant trees -> training records of the value model and of the SteerLM model (SteerLM steps 1 and 2).

Output is byte-equal to NeMo's `preprocessing.py` (v1.22 to v2.4) wherever that runs to its end, but for one thing:
in VALUE_TO_TEXT records the label of a User turn is null, because no prompt at inference has one
(`label_user_turns=True` gives the reference's records).

Two passes keep memory flat: the first notes where each line starts, the second reads the lines in shuffled order.
Shuffling the line numbers gives the permutation that shuffling the trees would give.
"""

from __future__ import annotations

import gzip
import random
import shutil
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from steerlm_nemo.attributes import AttributeSchema, schema_named
from steerlm_nemo.conversation import RECORD_TYPES, SYSTEM_PROMPT, USER, VALUE_TO_TEXT, RecordRef
from steerlm_nemo.data.oasst import Message, paths
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import Accounting, RawLine, atomic_output, dump_record, open_bytes, parse_line, require_file

# Python's JSON reader counts two levels per turn, so its default of 1000 refuses a thread of 500 turns.
DEEPEST_JSON = 10_000


class Lines:
    """Random access to the lines of a JSONL file, blank ones left out; 16 bytes of memory per line.

    A gzip file is decompressed once, to an unnamed file in `scratch_dir`.

    Raises:
        InputError: no such file, a directory, or a gzip stream that is damaged or cut off.
    """

    def __init__(self, path: str | Path, scratch_dir: Path) -> None:
        self.path = require_file(path)
        self._starts = array("Q")
        self._line_numbers = array("Q")
        self._file: IO[bytes] = _uncompressed(self.path, scratch_dir)
        start = 0
        for line_number, line in enumerate(self._file, 1):
            if line.strip():
                self._starts.append(start)
                self._line_numbers.append(line_number)
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> RawLine:
        self._file.seek(self._starts[index])
        raw = self._file.readline().rstrip(b"\r\n")
        if self._starts[index] == 0:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        return parse_line(RecordRef(str(self.path), self._line_numbers[index]), raw)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def _uncompressed(path: Path, scratch_dir: Path) -> IO[bytes]:
    source = open_bytes(path)
    if not isinstance(source, gzip.GzipFile):
        return source
    scratch = tempfile.TemporaryFile(dir=scratch_dir)  # noqa: SIM115 - closed by Lines
    try:
        with source:
            shutil.copyfileobj(source, scratch)
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        scratch.close()
        raise InputError(f"{path}: damaged gzip data: {err}. Fetch the file again.") from err
    scratch.seek(0)
    return scratch


def shuffled_order(num_trees: int, seed: int) -> Sequence[int]:
    """The reference's order: Python's `random`, seeded, shuffling in place."""
    order = array("Q", range(num_trees))
    random.Random(seed).shuffle(order)
    return order


def load_schema(name_or_path: str) -> AttributeSchema:
    """A preset by name, or a YAML file with the fields of `AttributeSchema.to_dict`.

    Raises:
        InputError: neither a preset nor a readable YAML file; the message lists the presets.
        FormatMismatchError: the YAML is not a schema.
    """
    if Path(name_or_path).suffix not in (".yaml", ".yml"):
        return schema_named(name_or_path)

    import yaml

    path = require_file(name_or_path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise InputError(f"{path}: not YAML: {err}") from err
    if not isinstance(data, Mapping):
        raise InputError(f"{path}: an attribute schema has the keys name, attributes and languages; found {data!r}")
    return AttributeSchema.from_dict(data)


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
    """What one run did, beyond where each tree went (which is `Accounting`'s)."""

    conversations: Counter[str]  # train, val
    left_out: Counter[str]  # paths, by the option that refused them
    languages: set[str]

    def summary(self, trees: Accounting) -> str:
        text = f"trees: {trees.summary()}\nconversations: " + " + ".join(
            f"{self.conversations[part]} {part}" for part in ("train", "val")
        )
        if self.left_out:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in self.left_out.most_common())
            text += f"\npaths left out: {sum(self.left_out.values())} ({reasons})"
        return text


def preprocess(
    input_file: str | Path,
    output_file_prefix: str | Path,
    *,
    mask_role: str,
    record_type: str,
    split_ratio: float,
    seed: int,
    schema: AttributeSchema,
    filters: Filters,
    label_user_turns: bool,
    trees: Accounting,
) -> Tally:
    """Write `<prefix>_train.jsonl` and `<prefix>_val.jsonl`; both appear together when complete, or neither.

    Every root-to-leaf path of two or more messages is a record. The split is by tree. `trees` counts each tree as
    written, filtered or rejected.

    Raises:
        InputError: an unusable file or argument, or no conversation to write.
        RecordError: an unusable tree in strict mode.
    """
    if record_type not in RECORD_TYPES:
        raise InputError(f"--type is {record_type!r}; it must be {' or '.join(RECORD_TYPES)}")
    if not 0 <= split_ratio <= 1:
        raise InputError(f"--split_ratio is {split_ratio}; it is the share of trees for training, from 0 to 1")
    outputs = {part: Path(f"{output_file_prefix}_{part}.jsonl") for part in ("train", "val")}
    require_file(input_file)
    for output in outputs.values():
        if output.exists() and output.samefile(input_file):
            raise InputError(f"{output} is the input itself; choose another --output_file_prefix")
    sys.setrecursionlimit(max(sys.getrecursionlimit(), DEEPEST_JSON))

    from tqdm import tqdm

    tally = Tally(Counter(), Counter(), set())
    unlabelled_role = USER if record_type == VALUE_TO_TEXT and not label_user_turns else None
    # The two files take their final names last of all, so a failure leaves neither.
    with (
        trees,
        atomic_output(outputs["train"]) as train,
        atomic_output(outputs["val"]) as val,
        Lines(input_file, outputs["train"].parent) as lines,
    ):
        num_train = int(len(lines) * split_ratio)
        order = shuffled_order(len(lines), seed)
        for position, index in enumerate(tqdm(order, desc="Preprocessing", unit=" trees", file=sys.stderr)):
            part, file = ("train", train) if position < num_train else ("val", val)
            line = lines[index]
            left_out: Counter[str] = Counter()
            try:
                kept = _kept_paths(line, schema, filters, left_out)
                records = [_dump(line, path, mask_role, record_type, unlabelled_role) for path in kept]
            except Filtered as reason:
                trees.filtered(str(reason))
                tally.left_out += left_out
                continue
            except RecordError as err:
                trees.rejected(line.ref, str(err).removeprefix(f"{line.ref}: "), line.raw)
                continue
            file.writelines(record + "\n" for record in records)
            tally.conversations[part] += len(records)
            tally.languages.update(message.lang for path in kept for message in path if message.lang is not None)
            tally.left_out += left_out
            trees.written()
        if not trees.counts["written"]:
            raise InputError(f"{input_file}: no conversation to write. Trees: {trees.summary()}")
    return tally


class Filtered(Exception):
    """A tree of which nothing is to be written, though nothing is wrong with it."""


def _kept_paths(
    line: RawLine, schema: AttributeSchema, filters: Filters, left_out: Counter[str]
) -> list[tuple[Message, ...]]:
    """The paths to write, at least one; those that a filter refuses are counted in `left_out`."""
    if line.record is None:
        raise RecordError(f"{line.ref}: {line.problem}")
    if filters.tree_states and line.record.get("tree_state") not in filters.tree_states:
        raise Filtered("--tree_state")
    conversations = [path for path in paths(line.record, schema, line.ref) if len(path) > 1]
    if not conversations:
        raise Filtered("no reply to the prompt")
    kept = []
    for path in conversations:
        if reason := filters.refuse_path(path):
            left_out[reason] += 1
        else:
            kept.append(path)
    if not kept:
        raise Filtered("every path left out by " + " or ".join(sorted(left_out)))
    return kept


def _dump(line: RawLine, path: Sequence[Message], mask_role: str, record_type: str, unlabelled_role: str | None) -> str:
    assert line.record is not None
    if not isinstance(line.record.get("message_tree_id"), str):
        raise RecordError(f"{line.ref}: no message_tree_id: keys seen are {sorted(line.record)}")
    record = {
        "conversations": [_turn(message, unlabelled_role) for message in path],
        "tree_id": line.record["message_tree_id"],
        "system": SYSTEM_PROMPT,
        "mask": mask_role,
        "type": record_type,
    }
    try:
        return dump_record(record)
    except UnicodeEncodeError as err:
        raise RecordError(f"{line.ref}: lone surrogate: a text holds {err.object[err.start]!r}") from err


def _turn(message: Message, unlabelled_role: str | None) -> dict[str, Any]:
    turn: dict[str, Any] = {"value": message.text, "from": message.role}
    if message.role == unlabelled_role:
        turn["label"] = None
    elif message.attributes is not None:
        turn["label"] = message.attributes.line
    if message.lang is not None:
        turn["lang"] = message.lang
    return turn
