"""Which dataset has which shape: the table that `--format` chooses from and that detection reads.

A file's shape is that of the first of its records that has one. Rows are tried from top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from steerlm_nemo.attributes import COMBINED9, HELPSTEER5, NEMO12_LANG, AttributeSchema
from steerlm_nemo.conversation import OF_PREFERENCE, PREPROCESS, Conversation, Pair, RecordRef, told_by_keys
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.sources import chat, helpsteer, instructions, pairs, templated
from steerlm_nemo.errors import InputError, RecordError, listed, shown
from steerlm_nemo.records import RawLine

Adapter = Callable[[Mapping[str, Any], RecordRef, Options], Conversation | Pair]
OASST_TREES, OASST_MESSAGES, CHAT = "oasst-trees", "oasst-messages", "chat"
HELPSTEER2_PAIRS = "helpsteer2-preference"
_RECORDS_LOOKED_AT = 100


@dataclass(frozen=True)
class Format:
    """A dataset's shape."""

    name: str
    needs: frozenset[str]  # keys of every record
    schema: AttributeSchema | None  # unless another is asked for; None: keep every attribute


@dataclass(frozen=True)
class RowFormat(Format):
    """The shape of a dataset whose records are conversations, or pairs of responses, one by one."""

    reads: frozenset[str]  # keys that may be there too
    adapter: Adapter

    def read(self, line: RawLine, options: Options) -> Conversation | Pair:
        """What a row holds. Raises RecordError."""
        record = line.require_record()
        if missing := self.needs - record.keys():
            seen = shown(sorted(record))
            raise RecordError(line.ref, f"missing key: {', '.join(sorted(missing))}; keys seen are {seen}")
        try:
            return self.adapter(record, line.ref, options)
        except RecordError as err:
            if self.name != CHAT or "preference" not in record:
                raise
            raise RecordError(err.ref, f"{err.problem}{OF_PREFERENCE}", err.turn) from err

    def unread(self, record: Mapping[str, Any]) -> set[str]:
        """What a sound record holds that the adapter does not look at: its keys, and those of its messages."""
        keys = {*(record.keys() - self.needs - self.reads)}
        if self.adapter is chat.messages:
            keys.update(chat.unread_in("messages", record))
        elif self.adapter is chat.conversations:
            keys.update(chat.unread_in("conversations", record))
        return keys


def _rows(name: str, needs: str, reads: str, adapter: Adapter, schema: AttributeSchema | None) -> RowFormat:
    return RowFormat(name, frozenset(needs.split()), schema, frozenset(reads.split()), adapter)


_RATINGS = " ".join(HELPSTEER5.names)
_HELPSTEER2_PAIR = "prompt response_1 response_2 preference_strength"
_KEYS = "system mask type tree_id"
# fmt: off
FORMATS: tuple[Format, ...] = (
    Format(OASST_MESSAGES, frozenset({"message_id", "text", "role"}), NEMO12_LANG),
    Format(OASST_TREES, frozenset({"message_tree_id"}), NEMO12_LANG),
    Format(OASST_TREES, frozenset({"replies"}), NEMO12_LANG),
    #     name               needs                                        reads too adapter, schema
    _rows(CHAT,              "conversations",                             _KEYS,    chat.conversations, None),
    _rows("messages",        "messages",                                  _KEYS,    chat.messages, None),
    _rows(HELPSTEER2_PAIRS,  _HELPSTEER2_PAIR,                            "",       helpsteer.preference, None),
    _rows("helpsteer",       "prompt response helpfulness",               _RATINGS, helpsteer.ratings, HELPSTEER5),
    _rows("cvalues",         "prompt pos_resp neg_resp pos_type neg_type", "",      pairs.cvalues, None),
    _rows("pairs",           "prompt chosen rejected",                    "",       pairs.prompted, None),
    _rows("hh-rlhf",         "chosen rejected",                           "",       pairs.hh_rlhf, None),
    _rows("instruction",     "instruction output",                        "input",  instructions.instruction, None),
    _rows("prompt-response", "prompt response",                           "system", instructions.prompted, None),
    _rows("text-output",     "text output",                               "",       instructions.text, None),
    _rows("templated",       "text",                                      "label",  templated.templated, COMBINED9),
)
# fmt: on


def format_named(name: str) -> Format:
    """Raises InputError listing the formats."""
    for known in FORMATS:
        if known.name == name:
            return known
    raise InputError(f"--format is {name!r}; known: {', '.join(dict.fromkeys(known.name for known in FORMATS))}")


def format_of(lines: Iterable[RawLine], source: str) -> Format:
    """The shape of a file, by the keys of its first records.

    Raises:
        InputError: no shape fits; the message shows the keys seen and the shapes known.
    """
    seen = None
    for line, _ in zip(lines, range(_RECORDS_LOOKED_AT), strict=False):
        if line.record is None:
            continue
        seen = seen or sorted(line.record)
        for known in FORMATS:
            if known.needs <= line.record.keys():
                return known
    if seen is None:
        # Nothing to tell a shape by. Every line will be rejected with its own reason.
        return format_named(OASST_TREES)
    shapes = "\n".join(f"  {known.name}: {', '.join(sorted(known.needs))}" for known in FORMATS)
    hint = told_by_keys(dict.fromkeys(seen))
    raise InputError(
        f"{source}: unknown shape{'' if PREPROCESS in hint else hint}; the keys seen are {listed(seen)}. "
        f"Shapes known, by the keys they need:\n{shapes}"
    )
