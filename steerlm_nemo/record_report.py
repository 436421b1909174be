"""What the step that wrote a file of records tells the next about it: the report beside the file.

`out.jsonl` has `out.jsonl.report.json`; the sides of a split, `p_train.jsonl` and `p_val.jsonl`, share `p.report.json`.
A file from elsewhere has none, and one of an earlier version does not tell all of this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_nemo.attributes import AttributeSchema
from steerlm_nemo.errors import FormatMismatchError, InputError
from steerlm_nemo.records import read_json

SUFFIX = ".report.json"
SCHEMA = "attribute_schema"  # key of the report; null: nobody said
_COMPRESSED = (".gz", ".zst")
_SIDE = re.compile(r"_(train|val)\.jsonl$")


@dataclass(frozen=True)
class RecordReport:
    """A report: where it is, and what it says."""

    path: Path
    facts: Mapping[str, Any]

    @property
    def schema(self) -> AttributeSchema | None:
        """The schema of the records' attributes, if it is told. Raises InputError: it is none."""
        told = self.facts.get(SCHEMA)
        if told is None:
            return None
        try:
            if not isinstance(told, Mapping):
                raise FormatMismatchError("not an object")
            return AttributeSchema.from_dict(told)
        except FormatMismatchError as err:
            raise InputError(f"{self.path}: {SCHEMA!r}: {err}. {_REMEDY}") from err


_REMEDY = "Write the records again, or move this file away and name the schema yourself"


def report_beside(records: str | Path) -> RecordReport | None:
    """The report of a file of records, which need not be there.

    Raises:
        InputError: there is a report, and it cannot be read.
    """
    name = str(records)
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    for path in dict.fromkeys([Path(f"{records}{SUFFIX}"), Path(f"{name}{SUFFIX}"), Path(_SIDE.sub(SUFFIX, name))]):
        if not path.name.endswith(SUFFIX) or not path.exists():
            continue
        try:
            facts = read_json(path)
        except InputError as err:
            raise InputError(f"{err}. {_REMEDY}") from err
        if not isinstance(facts, dict):
            raise InputError(f"{path}: a JSON object is needed, found {type(facts).__name__}. {_REMEDY}")
        return RecordReport(path, facts)
    return None


def told_schema(records: str | Path) -> AttributeSchema | None:
    """The attribute schema of a file of records, if the report beside it tells. Raises as `report_beside` does."""
    report = report_beside(records)
    return None if report is None else report.schema


def schema_facts(schema: AttributeSchema | None) -> dict[str, Any]:
    """What a report says of the schema of the records it belongs to."""
    return {SCHEMA: None if schema is None else schema.to_dict()}
