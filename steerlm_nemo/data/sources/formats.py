"""Which dataset has which shape: the table that `--format` chooses from and that detection reads.

A file's shape is that of the first of its records that has one. Rows are tried from top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG, AttributeSchema
from steerlm_nemo.conversation import RecordRef
from steerlm_nemo.data.sources import chat, helpsteer, instructions, pairs, templated
from steerlm_nemo.data.sources.adapter import Sample
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import RawLine

Adapter = Callable[[Mapping[str, Any], RecordRef, AttributeSchema | None], list[Sample]]
OASST_TREES, OASST_MESSAGES, CHAT = "oasst-trees", "oasst-messages", "chat"
_RECORDS_LOOKED_AT = 100


@dataclass(frozen=True)
class Format:
    """A dataset's shape. `adapter` is None for OpenAssistant's, whose records are not conversations one by one."""

    name: str
    needs: frozenset[str]  # keys of every record
    reads: frozenset[str]  # keys that may be there too
    adapter: Adapter | None
    schema: AttributeSchema | None  # unless another is asked for; None: keep every attribute

    def samples(self, line: RawLine, schema: AttributeSchema | None) -> list[Sample]:
        """The conversations of a row of a dataset that has an adapter. Raises RecordError."""
        if line.record is None:
            raise RecordError(f"{line.ref}: {line.problem}")
        if missing := self.needs - line.record.keys():
            raise RecordError(
                f"{line.ref}: missing key: {', '.join(sorted(missing))}; keys seen are {sorted(line.record)}"
            )
        assert self.adapter is not None
        return self.adapter(line.record, line.ref, schema)

    def unread(self, record: Mapping[str, Any]) -> Iterable[str]:
        """Keys of a record that the adapter does not look at."""
        return record.keys() - self.needs - self.reads


def _format(name: str, needs: str, reads: str, adapter: Adapter | None, schema: AttributeSchema | None) -> Format:
    return Format(name, frozenset(needs.split()), frozenset(reads.split()), adapter, schema)


_RATINGS = " ".join(HELPSTEER5.names)
_HELPSTEER2 = "helpsteer2-preference"
_HELPSTEER2_PAIR = "prompt response_1 response_2 preference_strength"
_KEYS = "system mask type tree_id"
# fmt: off
FORMATS = (
    #       name               needs                                        reads too adapter, schema
    _format(OASST_MESSAGES,    "message_id text role",                      "",       None, NEMO12_LANG),
    _format(OASST_TREES,       "message_tree_id",                           "",       None, NEMO12_LANG),
    _format(OASST_TREES,       "replies",                                   "",       None, NEMO12_LANG),
    _format(CHAT,              "conversations",                             _KEYS,    chat.conversations, None),
    _format("messages",        "messages",                                  _KEYS,    chat.messages, None),
    _format(_HELPSTEER2,       _HELPSTEER2_PAIR,                            "",       helpsteer.preference, None),
    _format("helpsteer",       "prompt response helpfulness",               _RATINGS, helpsteer.ratings, HELPSTEER5),
    _format("cvalues",         "prompt pos_resp neg_resp pos_type neg_type", "",      pairs.cvalues, None),
    _format("pairs",           "prompt chosen rejected",                    "",       pairs.prompted, None),
    _format("hh-rlhf",         "chosen rejected",                           "",       pairs.hh_rlhf, None),
    _format("instruction",     "instruction output",                        "input",  instructions.instruction, None),
    _format("prompt-response", "prompt response",                           "",       instructions.prompted, None),
    _format("text-output",     "text output",                               "",       instructions.text, None),
    _format("templated",       "text",                                      "label",  templated.templated, None),
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
    raise InputError(
        f"{source}: unknown shape; the keys seen are {', '.join(seen)}. Shapes known, by the keys they need:\n{shapes}"
    )
