"""What is in a file of conversations: lengths, attributes, languages, duplicates, and what files share.

One pass. Memory grows with the number of conversations (some 300 bytes each, to find duplicates), not with their texts.
What is counted is what training would see: a message that several paths of a tree share counts in each.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from steerlm_nemo.attributes import LANG, Attributes
from steerlm_nemo.conversation import Conversation
from steerlm_nemo.correlation import pearson
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.preprocessing import conversations_of
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import Accounting, read_records
from steerlm_nemo.template import ChatTemplate, Tokenizer, num_seen

NO_LANGUAGE = "not given"
MOST_EXAMPLES = 5
MOST_PAIRED = 100  # attributes of a turn that are compared with each other: their pairs are counted
_MOST_LINES = 10_000  # different attribute lines held before they are added up


class AttributeCounts:
    """How often each value of each attribute was given, and how attributes go together. Memory does not grow with the
    turns."""

    def __init__(self) -> None:
        self._lines: Counter[Attributes] = Counter()
        self._counts: dict[str, Counter[int]] = {}
        self._pairs: dict[tuple[str, str], Counter[tuple[int, int]]] = {}  # of values that one turn has

    def add(self, attributes: Attributes) -> None:
        self._lines[attributes] += 1
        if len(self._lines) > _MOST_LINES:
            self._add_up()

    def _add_up(self) -> None:
        for attributes, times in self._lines.items():
            values = [(name, value) for name, value in attributes.items if isinstance(value, int)]
            for name, value in values:
                self._counts.setdefault(name, Counter())[value] += times
            for (one, x), (other, y) in combinations(sorted(values)[:MOST_PAIRED], 2):
                self._pairs.setdefault((one, other), Counter())[x, y] += times
        self._lines.clear()

    def counts(self) -> Mapping[str, Counter[int]]:
        """Attribute -> value -> turns."""
        self._add_up()
        return self._counts

    def correlation(self, one: str, other: str) -> float | None:
        """Pearson's r over the turns that have both; None where one of them never varies."""
        self._add_up()
        if one == other:
            counts = self._counts[one]
            return 1.0 if len(counts) > 1 else None
        pairs = self._pairs.get((min(one, other), max(one, other)), Counter())
        return pearson([x for x, _ in pairs], [y for _, y in pairs], [*pairs.values()])


@dataclass
class Inspection:
    """Of one file. The counters map a size to the number of conversations that have it."""

    name: str
    records: Accounting
    turns: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    first_targets: Counter[int | None] = field(default_factory=Counter)  # where the first target stands, None: nowhere
    characters: Counter[str] = field(default_factory=Counter)  # by speaker
    turns_of: Counter[str] = field(default_factory=Counter)  # by speaker
    graded_turns_of: Counter[str] = field(default_factory=Counter)  # by speaker
    languages: Counter[str] = field(default_factory=Counter)  # turns
    types: Counter[str] = field(default_factory=Counter)
    attributes: AttributeCounts = field(default_factory=AttributeCounts)  # of the speakers that are not masked
    num_responses: int = 0  # their turns
    num_graded_responses: int = 0
    rejects: list[tuple[str, str]] = field(default_factory=list)  # place and reason
    num_with_markers: int = 0
    conversations: dict[bytes, int] = field(default_factory=dict)  # digest -> line of the first one
    prompts: Counter[bytes] = field(default_factory=Counter)  # digest of the first turn -> conversations
    num_duplicates: int = 0
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # examples: line, line of the first one

    def add(self, conversation: Conversation) -> None:
        self.turns[len(conversation.turns)] += 1
        self.types[str(conversation.type)] += 1
        for turn in conversation.turns:
            self.turns_of[turn.role] += 1
            self.characters[turn.role] += len(turn.text)
            is_response = turn.role not in conversation.mask_roles
            self.num_responses += is_response
            values = turn.attributes.as_dict() if turn.attributes is not None else {}
            self.languages[turn.lang or str(values.get(LANG, NO_LANGUAGE))] += 1
            values.pop(LANG, None)
            if values:
                self.graded_turns_of[turn.role] += 1
                if is_response:
                    self.num_graded_responses += 1
                    self.attributes.add(Attributes(tuple(values.items())))
        self._find_duplicate(conversation)

    def add_tokens(self, conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        """Count what training would see, by the function that training uses."""
        rendered = template.render(conversation, tokenizer)
        self.tokens[len(rendered.token_ids)] += 1
        self.first_targets[rendered.first_target] += 1
        self.num_with_markers += rendered.num_markers_removed > 0

    def _find_duplicate(self, conversation: Conversation) -> None:
        digest = _digest(text for turn in conversation.turns for text in (turn.role, turn.text))
        self.prompts[_digest([conversation.turns[0].text])] += 1
        if digest not in self.conversations:
            self.conversations[digest] = conversation.ref.line
            return
        self.num_duplicates += 1
        if len(self.duplicates) < MOST_EXAMPLES:
            self.duplicates.append((conversation.ref.line, self.conversations[digest]))

    @property
    def num_conversations(self) -> int:
        return self.turns.total()

    def longer_than(self, seq_len: int) -> Truncation:
        """What training at `seq_len` loses."""
        seen = num_seen(seq_len)
        longer = [(length, times) for length, times in self.tokens.items() if length > seen]
        return Truncation(
            seq_len,
            sum(times for _, times in longer),
            sum((length - seen) * times for length, times in longer),
            sum(times for first, times in self.first_targets.items() if first is None or first >= seen),
        )


@dataclass(frozen=True)
class Truncation:
    """At a length: conversations cut, tokens beyond it, and conversations left without a target."""

    seq_len: int
    num_cut: int
    num_tokens_lost: int
    num_without_target: int


@dataclass(frozen=True)
class Leakage:
    """What a later file shares with an earlier one: conversations of the later file."""

    of: str
    into: str
    num_same: int  # different ones that are the same from beginning to end
    num_same_prompt: int  # the same first turn
    num_conversations: int
    examples: tuple[tuple[int, int], ...]  # lines: of the later file, of the earlier


def inspect_file(
    name: str,
    options: Options,
    template: ChatTemplate,
    tokenizer: Tokenizer | None,
    format_name: str,
    scratch_dir: Path,
) -> Inspection:
    """Read a file or dataset of any shape that preprocessing reads; tokens are counted if there is a tokenizer.

    Raises:
        InputError: an unusable file, or one without a conversation.
    """
    from tqdm import tqdm

    records = Accounting(scratch_dir / "rejects.jsonl")
    found = Inspection(name, records)
    every = conversations_of(name, options, records, format_name, scratch_dir)
    for conversation in tqdm(every, desc=f"Reading {Path(name).name}", unit=" conversations", file=sys.stderr):
        found.add(conversation)
        if tokenizer is not None:
            found.add_tokens(conversation, template, tokenizer)
    if records.counts["rejected"]:
        found.rejects = [(one["where"], one["reason"]) for _, one in read_records(records.rejects_path)]
    if not found.num_conversations:
        places = "".join(f"\n  {where}: {reason}" for where, reason in found.rejects[:MOST_EXAMPLES])
        raise InputError(f"{name}: no conversation in it: {records.counts.total()} records read{places}")
    return found


def leakage(earlier: Inspection, later: Inspection) -> Leakage:
    same = later.conversations.keys() & earlier.conversations.keys()
    examples = sorted((later.conversations[digest], earlier.conversations[digest]) for digest in same)
    return Leakage(
        later.name,
        earlier.name,
        len(same),
        sum(times for digest, times in later.prompts.items() if digest in earlier.prompts),
        later.num_conversations,
        tuple(examples[:MOST_EXAMPLES]),
    )


def percentile(counts: Mapping[int, int], share: float) -> int:
    """The smallest size that at least `share` of the counted have or stay below."""
    left = share * sum(counts.values())
    for size in sorted(counts):
        left -= counts[size]
        if left <= 0:
            return size
    return 0


def _digest(texts: Iterable[str]) -> bytes:
    """Of texts that are the same but for case and blanks."""
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        digest.update(" ".join(text.casefold().split()).encode("utf-8") + b"\0")
    return digest.digest()
