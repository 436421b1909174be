"""Conversations as the trainer takes them: token ids, loss mask, batches (reference: NeMo GPTSFTChatDataset 3.5).

B conversations of a micro-batch, S tokens of the longest, padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from tqdm import tqdm

from steerlm_nemo.attributes import LANG, PRESETS, Attributes, AttributeSchema
from steerlm_nemo.conversation import Conversation, RecordRef
from steerlm_nemo.errors import ConfigError, InputError, RecordError, clipped, listed
from steerlm_nemo.records import parse_line, read_raw_lines
from steerlm_nemo.template import ChatTemplate, Tokenizer, cut, num_seen
from steerlm_nemo.workers import in_order

MOST_PROBLEMS_SHOWN = 8


class Item(TypedDict):
    """One conversation; both arrays hold max_seq_length + 1 ids at most."""

    token_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class DatasetReport:
    """What became of the records of one file."""

    path: str
    num_records: int
    num_truncated: int
    num_without_target: int
    num_markers_removed: int

    def line(self) -> str:
        text = f"{self.path}: {self.num_records} conversations"
        if self.num_truncated:
            text += f", {self.num_truncated} cut at max_seq_length"
        if self.num_without_target:
            text += f", {self.num_without_target} left out because the cut leaves no target (run data_clean first)"
        if self.num_markers_removed:
            text += f", {self.num_markers_removed} marker texts removed from content"
        return text


@dataclass(frozen=True)
class _Prepared:
    """One conversation: its type and what training sees of it, or why it cannot be used."""

    type: str | None = None
    item: Item | None = None  # None where the cut leaves no target
    num_tokens: int = 0  # before the cut
    num_markers_removed: int = 0
    problem: RecordError | None = None
    names: frozenset[str] = frozenset()  # of its attributes


@dataclass(frozen=True)
class _Preparation:
    """What is done to each line of a file."""

    tokenizer: Tokenizer
    template: ChatTemplate
    max_seq_length: int
    schema: AttributeSchema

    def __call__(self, raw_line: tuple[RecordRef, bytes]) -> tuple[RecordRef, _Prepared]:
        line = parse_line(*raw_line)
        ref, item, names = line.ref, None, frozenset[str]()
        try:
            conversation = Conversation.from_record(line.require_record(), ref)
            names = names_in(conversation)
            _require_schema(conversation, self.schema)
        except RecordError as err:
            return ref, _Prepared(problem=err, names=names)
        rendered = self.template.render(conversation, self.tokenizer)
        seen = cut(rendered, self.max_seq_length)
        if seen.first_target is not None:
            item = Item(
                token_ids=np.array(seen.token_ids, dtype=np.int32), loss_mask=np.array(seen.loss_mask, dtype=np.int8)
            )
        return ref, _Prepared(conversation.type, item, len(rendered.token_ids), rendered.num_markers_removed)


class ChatDataset(torch.utils.data.Dataset[Item]):
    """A JSONL file of conversations, tokenised once, targets known.

    Conversations whose targets all lie beyond `max_seq_length` are left out and counted: in the reference they give
    a loss of 0/0 (D-11). `num_workers` processes tokenise.

    Raises:
        InputError: the file cannot be used, or some of its records; the message has place and reason of each, and the
            counts.
        RecordError: the only record cannot be used.
        ConfigError: no conversation is left, or the records are of several types or not of `record_type`.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_seq_length: int,
        pad_to_multiple: int,
        record_type: str | None,
        schema: AttributeSchema,
        num_workers: int = 1,
    ) -> None:
        self.eos_id = tokenizer.eos_id
        self.max_seq_length = max_seq_length
        self.pad_to_multiple = pad_to_multiple
        self.items: list[Item] = []
        first_of_type: dict[str | None, RecordRef] = {}
        problems: list[RecordError] = []
        names: frozenset[str] = frozenset()
        num_read = num_truncated = num_markers = 0
        preparation = _Preparation(tokenizer, template, max_seq_length, schema)
        prepared_lines = in_order(preparation, read_raw_lines(path), num_workers)
        for ref, prepared in tqdm(prepared_lines, desc=f"tokenising {Path(path).name}", unit=" conversations"):
            num_read += 1
            if prepared.problem is not None:
                problems.append(prepared.problem)
                names |= prepared.names
                continue
            first_of_type.setdefault(prepared.type, ref)
            num_markers += prepared.num_markers_removed
            num_truncated += prepared.num_tokens > num_seen(max_seq_length)
            if prepared.item is not None:
                self.items.append(prepared.item)
        if problems:
            raise _refusal(path, problems, num_read, names, schema)
        self.report = DatasetReport(str(path), len(self.items), num_truncated, num_read - len(self.items), num_markers)
        if not self.items:
            raise ConfigError(f"{path}: no conversation with a target within max_seq_length {max_seq_length}")
        self.record_type = _one_type(first_of_type, record_type)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each conversation in a batch, padding aside."""
        return [len(item["token_ids"]) - 1 for item in self.items]

    def collate_fn(self, batch: Sequence[Item]) -> dict[str, torch.Tensor]:
        """tokens, labels [B,S] int64, loss_mask [B,S] float32, position_ids [B,S]; right-padded with EOS.

        No attention mask: the model's is causal, and padding stands only to the right.
        """
        longest = min(max(len(item["token_ids"]) - 1 for item in batch), self.max_seq_length)
        length = min(-(-longest // self.pad_to_multiple) * self.pad_to_multiple, self.max_seq_length)
        tokens = torch.full((len(batch), length), self.eos_id, dtype=torch.int64)
        labels = torch.full((len(batch), length), self.eos_id, dtype=torch.int64)
        loss_mask = torch.zeros((len(batch), length), dtype=torch.float32)
        for row, item in enumerate(batch):
            ids = torch.from_numpy(item["token_ids"].astype(np.int64))
            tokens[row, : len(ids) - 1] = ids[:-1]
            labels[row, : len(ids) - 1] = ids[1:]
            loss_mask[row, : len(ids) - 1] = torch.from_numpy(item["loss_mask"][1:].astype(np.float32))
        position_ids = torch.arange(length, dtype=torch.int64).expand(len(batch), length).contiguous()
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}


def _require_schema(conversation: Conversation, schema: AttributeSchema) -> None:
    """Attributes must be what the schema, which goes into the `.nemo`, says they are.

    Languages outside the schema's list are let through: OASST has more of them than the reference's annotator knows.
    """
    for index, turn in enumerate(conversation.turns):
        if turn.attributes is None:
            continue
        values = Attributes(tuple(item for item in turn.attributes.items if item[0] != LANG))
        try:
            in_order = schema.order(values.as_dict())
        except InputError as err:
            raise SchemaError(conversation.ref, f"{err} (schema {schema.name})", index) from err
        if in_order != values:
            problem = f"the attributes are {values.line}, but schema {schema.name} orders {in_order.line}"
            raise SchemaError(conversation.ref, problem, index)


class SchemaError(RecordError):
    """A record whose attributes are not those of the schema."""


def names_in(conversation: Conversation) -> frozenset[str]:
    """The attributes of a conversation, `lang` aside."""
    return frozenset(key for turn in conversation.turns if turn.attributes for key, _ in turn.attributes.items) - {LANG}


def _refusal(
    path: str | Path, problems: list[RecordError], num_read: int, names: frozenset[str], schema: AttributeSchema
) -> InputError | RecordError:
    """The problems of a file, each reason once. Training starts with every record or not at all."""
    hint = ""
    if any(isinstance(problem, SchemaError) for problem in problems):
        known = names <= {*schema.names}  # a value is out of range, or the order another
        fitting = [one for one in PRESETS.values() if names <= {*one.names} and not known]
        fitting.sort(key=lambda one: len(one.names))
        hint = (
            f"\nThe records have {listed(sorted(names))}; the schema here is {schema.name}. Set "
            "model.data.attribute_schema to the schema that they were preprocessed with"
            + (f"; {listed(one.name for one in fitting)} would fit" if fitting else "")
        )
    if num_read == len(problems) == 1:
        return RecordError(problems[0].ref, problems[0].problem + hint, problems[0].turn)
    counts = Counter(problem.problem for problem in problems)
    first = {problem.problem: problem for problem in reversed(problems)}
    shown = counts.most_common(MOST_PROBLEMS_SHOWN)
    lines = [
        f"{count:,} records: {clipped(reason, 250)} (first: {first[reason].place})"
        if count > 1
        else f"{first[reason].place}: {clipped(reason, 250)}"
        for reason, count in shown
    ]
    if more := len(problems) - sum(count for _, count in shown):
        lines.append(f"and {more:,} more, for {len(counts) - len(shown):,} other reasons")
    only_schema = all(isinstance(problem, SchemaError) for problem in problems)
    told = (
        ""
        if only_schema
        else "; scripts/data_clean.py writes the others, and these with their reasons to a reject file"
    )
    return InputError(
        "\n  ".join([f"{path}: {len(problems)} of {num_read} records cannot be used{told}:", *lines]) + hint
    )


def _one_type(types: dict[str | None, RecordRef], wanted: str | None) -> str | None:
    if len(types) > 1:
        seen = listed(f"{kind} at {ref}" for kind, ref in types.items())
        raise ConfigError(f"the records are of several types ({seen}); train on one type at a time")
    (kind, first), *_ = types.items()
    if wanted is not None and kind != wanted:
        raise ConfigError(
            f"{first}: type is {kind}, but model.data.record_type asks for {wanted}. A value model is trained on "
            "TEXT_TO_VALUE records, a SteerLM model on VALUE_TO_TEXT ones; preprocess or annotate with the other type"
        )
    return kind
